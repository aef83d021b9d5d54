"""What FlowKV measures about itself: `python -m benchmarks` lists it all."""


class BenchmarkFailed(Exception):
    """There is no result; the message says why."""
