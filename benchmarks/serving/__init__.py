"""Serving over HTTP: the same load on FlowKV and on others, and what FlowKV's services cost."""
