"""What FlowKV's services share. None of it loads torch or numpy."""

__version__ = "0.1.0"
