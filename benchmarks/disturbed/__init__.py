"""Short chats disturbed by long prompts: two nodes of one core each against one node of two."""
