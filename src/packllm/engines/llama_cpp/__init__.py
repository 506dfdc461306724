"""The engine of GGUF files as they are: llama.cpp, through the low-level interface of llama-cpp-python."""
