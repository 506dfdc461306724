"""The engine that runs GGUF files in llama.cpp, unconverted, through llama-cpp-python's low-level interface."""
