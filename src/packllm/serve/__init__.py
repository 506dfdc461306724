"""An OpenAI-compatible server of a pack (extra `serve`): app.py has the routes, command.py `packllm serve`."""
