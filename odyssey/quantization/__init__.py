"""Quantization: integer grids, clipping (LWC), compensation (GPTQ), the block-by-block pipeline, checkpoints."""
