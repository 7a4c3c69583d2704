"""Latency: end to end and per GEMM, interleaved, with raw samples."""
