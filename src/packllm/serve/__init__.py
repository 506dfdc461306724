"""An OpenAI-compatible server of a pack (extra `serve`). Routes are in app.py, `packllm serve` is in command.py."""
