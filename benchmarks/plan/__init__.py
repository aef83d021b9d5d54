"""How many nodes, and which, a service needs."""
