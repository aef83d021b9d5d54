"""A node: one process, one device, one KV pool, one engine thread, and two roles: prefill and decode."""
