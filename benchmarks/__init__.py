"""Benchmarks beside the rivals: ``python -m benchmarks.NAME [--quick] [--only ROW] [--json]``."""
