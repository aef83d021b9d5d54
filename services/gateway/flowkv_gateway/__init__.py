"""Gateway: OpenAI-style REST and SSE in front of the bus."""
