"""A FlowKV cluster as discrete events, around the very scheduler code that serves."""
