"""packllm for LangChain."""
