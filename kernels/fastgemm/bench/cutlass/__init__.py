"""CUTLASS's W8A8 GEMM for Hopper as a peer of the benchmark: built from a checkout of CUTLASS, called through ctypes.

CUTLASS is no part of this project. `$CUTLASS_DIR` names a checkout (4.0 or newer) to build from, with nvcc, and
`$FASTGEMM_CUTLASS_LIBRARY` a library that `python -m fastgemm.bench.cutlass.build` has made elsewhere.
"""
