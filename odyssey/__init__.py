"""Odyssey: OdysseyLLM W4A8 quantization (arXiv 2311.09550) and the benchmark harness around it."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "load_quantized"]


def __getattr__(name: str):
    # Loaded on demand: importing torch and transformers takes seconds, and `run.py --help` needs neither.
    if name == "load_quantized":
        from odyssey.quantization.checkpoint import load_quantized

        return load_quantized
    raise AttributeError(f"module 'odyssey' has no attribute {name!r}")
