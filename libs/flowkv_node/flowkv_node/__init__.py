"""A node: one process, one device, one KV pool, one engine thread, and the guests that it hosts."""
