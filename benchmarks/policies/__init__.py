"""Policies to compare FlowKV's with: functions with the signature of `Chooser` in `planner.py`."""
