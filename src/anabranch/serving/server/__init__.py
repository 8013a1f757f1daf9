"""The server: OpenAI's interface over HTTP in front, the engine in a worker process behind it."""
