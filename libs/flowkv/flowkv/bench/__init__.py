"""`flowkv bench`: load for any OpenAI server, and figures as vLLM defines them."""
