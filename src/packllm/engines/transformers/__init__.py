"""Members that are torch models of transformers: all code that knows such models lives here."""
