"""The version of moa_ops: the only place that says it (setup.py reads it)."""

__version__ = "0.1.0"
