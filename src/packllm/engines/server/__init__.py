"""Members that OpenAI-compatible servers run; everything that knows of HTTP is in here."""
