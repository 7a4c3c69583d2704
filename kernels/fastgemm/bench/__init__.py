"""Benchmark of single matrix products: `python -m fastgemm.bench --help`."""
