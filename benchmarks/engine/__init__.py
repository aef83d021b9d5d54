"""The bare engine, without services: decode and prefill beside other engines, and the floor under them."""
