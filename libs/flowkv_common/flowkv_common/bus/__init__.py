"""NATS as FlowKV uses it: a connection, services on it, ordered token streams and the registry of nodes."""
