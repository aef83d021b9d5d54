"""What each idea of the paper is worth: one request's KV cache, process to process, over each transport."""
