"""What FlowKV's services share. Importing this package loads nothing heavy; `engine`, `kv` and `node` do."""

__version__ = "0.1.0"
