"""packllm: several language models answer as one."""
