"""Nodes without a model: all of FlowKV but the engine is real, and a step takes a stated time.

Many of them fit on one core, so they show what scheduling does where real engines would only fight for cores.
"""
