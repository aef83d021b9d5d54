"""The model side of a node: packed batches in, sampled tokens out. Knows no requests and no network."""
