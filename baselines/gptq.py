"""GPTQ (arXiv 2210.17323): weight-only quantization with Hessian-based compensation, W4A16 with groups of 128.

The mathematics is `odyssey.quantization.compensation.gptq`, which the W4A8 recipe shares. What makes it this baseline:
groups whose scales come from the updated weights, Hessians of the inputs as they are (no int8 rounding), no clipping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from baselines import auto_gptq_backend
from baselines.reference_packages import NATIVE, check_backend
from odyssey.quantization.compensation import CompensationSettings, collect_hessians, gptq
from odyssey.quantization.fake_quant import fake_quantized
from odyssey.quantization.grid import check_finite
from odyssey.quantization.method import BlockCalibration, BlockResult
from odyssey.quantization.scheme import QuantizedWeight, QuantScheme, check_bits


@dataclass
class GptqSettings:
    """bits:        2..8.
    group_size:  input features per scale; -1 for one scale per output channel.
    symmetric:   without a zero point (what GPTQ checkpoints are usually deployed with).
    act_order:   quantize columns by falling Hessian diagonal; the groups' scales are then those of the original
                 weight (static groups), so that the deployed layout stays in order.
    damping:     part of the Hessian's mean diagonal that is added to the diagonal; raised tenfold, and recorded,
                 where the factorization fails.
    block_size:  columns whose errors are collected before the columns behind them are updated.
    full_range:  symmetric scales absmax / 7.5 (for 4 bits) as in the authors' code, AutoGPTQ and llm-compressor; false:
                 absmax / 7, as in the recipe.
    backend:     native, or auto-gptq: that package's quantizer in place of ours (see baselines/auto_gptq_backend.py).
    checkpoint:  a directory with an existing GPTQ checkpoint: read, not quantized; its format is what it says itself.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    damping: float = 0.01
    block_size: int = 128
    full_range: bool = True
    backend: str = NATIVE
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend, (NATIVE, "auto-gptq"), self.checkpoint)
        check_bits(self.bits)
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")


class GptqMethod:
    """GPTQ as a `Method`."""

    name = "gptq"
    needs_calibration = True

    def __init__(self, settings: GptqSettings | None = None) -> None:
        self.settings = settings or GptqSettings()
        self.scheme = QuantScheme(
            self.settings.bits, self.settings.group_size, self.settings.symmetric, activation_bits=16
        )
        self._compensation = CompensationSettings(
            self.settings.damping, self.settings.block_size, self.settings.act_order, quantized_inputs=False,
            full_range=self.settings.full_range,
        )  # fmt: skip

    @torch.no_grad()
    def quantize_block(self, block: nn.Module, calibration: BlockCalibration | None) -> BlockResult:
        """Quantize the layers of `calibration.linear_groups`, group by group in execution order.

        A group's Hessian comes from the quantized chain's inputs, with the groups before it already quantized. Metrics:
        `layers`, per layer those of `compensation.gptq` (damping used, dead columns, loss, relative output error).
        Raises ValueError, naming the layer, for weights or activations with NaN or Inf.
        """
        if calibration is None:
            raise ValueError("gptq needs calibration data")
        for name in calibration.linear_names():
            check_finite(block.get_submodule(name).weight, f"the weight of {name}")
        weights: dict[str, QuantizedWeight] = {}
        metrics: dict[str, dict] = {}
        for group in calibration.linear_groups:
            calibration.report(f"gptq {', '.join(name.rpartition('.')[2] for name in group)}")
            with fake_quantized(block, weights):
                if self.settings.backend == NATIVE:
                    found = self._quantize_group(block, group, calibration)
                else:
                    found = auto_gptq_backend.quantize_group(block, group, calibration, self.scheme, self.settings)
            weights.update(found[0])
            metrics.update(found[1])
        return BlockResult(weights, metrics={"layers": metrics})

    def _quantize_group(
        self, block: nn.Module, group: tuple[str, ...], calibration: BlockCalibration
    ) -> tuple[dict[str, QuantizedWeight], dict[str, dict]]:
        """Integers and metrics of layers that read one input."""
        first = group[0]
        hessian = collect_hessians(block, [first], calibration.forward, calibration.inputs, False)[first]
        weights, metrics = {}, {}
        for name in group:
            weight = block.get_submodule(name).weight
            try:
                weights[name], metrics[name] = gptq(weight, hessian, self.scheme, settings=self._compensation)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return weights, metrics
