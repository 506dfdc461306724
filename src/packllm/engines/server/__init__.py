"""Members that run on OpenAI-compatible servers, and all code of the HTTP client."""
