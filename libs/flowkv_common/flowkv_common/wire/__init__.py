"""Every message and every subject that crosses NATS. Knows no transport and no tensor."""
