"""Decode: running sequences, one token per step."""
