"""How many copies a request's cache takes in a pool long in use: traces through the allocator."""
