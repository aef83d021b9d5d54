"""Prefill: prompts in, first tokens and KV caches out."""
