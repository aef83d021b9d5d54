"""The KV cache of one node: its memory, the states of its blocks, and what is reserved for handoffs."""
