"""Benchmarks of zerolith beside its peers. From the repository root: `python -m benchmarks.step_time`."""
