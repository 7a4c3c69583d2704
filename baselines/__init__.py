"""Baseline methods the recipe is compared with; each is a `Method` (odyssey.quantization.method)."""
