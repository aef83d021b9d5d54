"""What sending KV while later chunks compute is worth, and what the second node costs a request."""
