"""Benchmarks of moa_ops beside the alternatives and beside the floor: ``python -m benchmarks --help``."""
