"""Benchmarks: ours and the peer interleaved in one run, medians and ratios. `python -m bench NAME [--json]`."""
