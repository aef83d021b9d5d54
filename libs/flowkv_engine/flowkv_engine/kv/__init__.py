"""The KV cache of one node: its memory, who holds which block, and how blocks reach another node's pool."""
