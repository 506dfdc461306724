"""packllm for LlamaIndex."""
