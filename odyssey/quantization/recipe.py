"""The OdysseyLLM recipe: learned weight clipping, then Hessian-based compensation on the clipped grid.

Per decoder block (arXiv 2311.09550, section 3): learn the clipping of all linear layers together, freeze the
grid it gives, run GPTQ on that grid layer group by layer group, in execution order, with inputs from the
block as quantized so far. `clipping` and `compensation` switch the two steps off for the paper's ablation
(vanilla, + LWC, + LWC + GPTQ).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import nn

from odyssey.quantization.clipping import (
    LearnedClippingSettings,
    SearchSettings,
    learn_clipping,
    search_clipping,
)
from odyssey.quantization.compensation import (
    CompensationSettings,
    collect_hessians,
    gptq,
    relative_output_error,
)
from odyssey.quantization.fake_quant import fake_quantized
from odyssey.quantization.grid import check_finite, minmax_grid, per_column, round_to_nearest
from odyssey.quantization.method import BlockCalibration, BlockResult
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme, check_bits


@dataclass
class OdysseySettings:
    """The recipe's settings; the defaults are the W4A8 recipe.

    bits:             weight bits, 2..8.
    group_size:       input features per scale; -1 (the paper's) for one scale per output channel.
    activation_bits:  8 (per token, dynamic) or 16.
    clipping:         none, search (per-channel error search, no training) or learned (LWC).
    compensation:     none (round to nearest) or gptq.
    start_from:       what GPTQ quantizes: the unclipped weight, so that the clamping error is compensated
                      too, or the weight clipped to the grid's range.
    """

    bits: int = 4
    group_size: int = PER_CHANNEL
    activation_bits: int = 8
    clipping: str = "learned"
    compensation: str = "gptq"
    start_from: str = "unclipped"
    lwc: LearnedClippingSettings = field(default_factory=LearnedClippingSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    gptq: CompensationSettings = field(default_factory=CompensationSettings)

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for name, choices in (
            ("clipping", ("none", "search", "learned")),
            ("compensation", ("none", "gptq")),
            ("start_from", ("unclipped", "clipped")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(self.bits, self.group_size, symmetric=True, activation_bits=self.activation_bits)


class OdysseyMethod:
    """The recipe as a `Method`."""

    name = "odyssey"

    def __init__(self, settings: OdysseySettings | None = None) -> None:
        self.settings = settings or OdysseySettings()
        self.scheme = self.settings.scheme
        self.needs_calibration = self.settings.clipping != "none" or self.settings.compensation != "none"

    def quantize_block(self, block: nn.Module, calibration: BlockCalibration | None) -> BlockResult:
        """Quantize all linear layers of `calibration.linear_groups`.

        Metrics: step_seconds, `lwc` (losses per epoch, best epoch), `layers` (per layer: kept_range, the mean ratio
        of its scales to the unclipped ones, and the metrics of `gptq`). Raises ValueError, naming the layer, for
        weights or activations with NaN or Inf.
        """
        if calibration is None:
            if self.needs_calibration:
                raise ValueError(
                    f"clipping {self.settings.clipping} with compensation {self.settings.compensation} "
                    "needs calibration data"
                )
            names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        else:
            names = list(calibration.linear_names())
        for name in names:
            check_finite(block.get_submodule(name).weight, f"the weight of {name}")
        for index, hidden in enumerate(calibration.inputs if calibration else ()):
            check_finite(hidden, f"the block's input in calibration sample {index}")

        metrics: dict = {"step_seconds": {}, "layers": {name: {} for name in names}}
        scales = self._clip(block, calibration, names, metrics)
        for name, clipped in scales.items():
            unclipped, _ = minmax_grid(block.get_submodule(name).weight.detach(), self.scheme)
            metrics["layers"][name]["kept_range"] = float((clipped / unclipped).mean())
        started = time.perf_counter()
        if self.settings.compensation == "gptq":
            weights = self._compensate(block, calibration, scales, metrics)
        else:
            weights = {
                name: round_to_nearest(block.get_submodule(name).weight.detach(), self.scheme, scales.get(name))
                for name in names
            }
        metrics["step_seconds"]["compensation"] = time.perf_counter() - started
        return BlockResult(weights=weights, metrics=metrics)

    def _clip(
        self, block: nn.Module, calibration: BlockCalibration, names: list[str], metrics: dict
    ) -> dict[str, torch.Tensor]:
        """The fixed grid of every layer, or none where the min/max grid of the weight is to be used."""
        settings = self.settings
        if settings.clipping == "none":
            return {}
        started = time.perf_counter()
        ratios = None
        if settings.clipping == "search" or settings.lwc.initialization == "search":
            calibration.report("clip search")
            ratios = self._search(block, calibration, names)
            metrics["step_seconds"]["search"] = time.perf_counter() - started
        if settings.clipping == "search":
            return {
                name: minmax_grid(block.get_submodule(name).weight.detach(), self.scheme)[0] * ratio
                for name, ratio in ratios.items()
            }
        result = learn_clipping(block, calibration, self.scheme, settings.lwc, ratios)
        metrics["step_seconds"]["lwc"] = result.seconds
        metrics["lwc"] = {"losses": result.losses, "best_epoch": result.best_epoch}
        return result.scales

    def _search(self, block: nn.Module, calibration: BlockCalibration, names: list[str]) -> dict[str, torch.Tensor]:
        hessians: dict[str, torch.Tensor] = {}
        if self.settings.search.objective != "weight":
            firsts = [group[0] for group in calibration.linear_groups]
            found = collect_hessians(block, firsts, calibration.forward, calibration.inputs, self._quantized_inputs)
            hessians = {name: found[group[0]] for group in calibration.linear_groups for name in group}
        return {
            name: search_clipping(
                block.get_submodule(name).weight.detach(),
                self.scheme,
                self.settings.search,
                hessians.get(name),
            )
            for name in names
        }

    def _compensate(
        self,
        block: nn.Module,
        calibration: BlockCalibration,
        scales: dict[str, torch.Tensor],
        metrics: dict,
    ) -> dict[str, QuantizedWeight]:
        weights: dict[str, QuantizedWeight] = {}
        for group in calibration.linear_groups:
            calibration.report(f"gptq {', '.join(name.rpartition('.')[2] for name in group)}")
            with fake_quantized(block, weights):
                hessian = collect_hessians(
                    block, group[:1], calibration.forward, calibration.inputs, self._quantized_inputs
                )[group[0]]
            for name in group:
                weight = block.get_submodule(name).weight.detach().float()
                if self.settings.start_from == "clipped" and name in scales:
                    start = self._clipped(weight, scales[name])
                else:
                    start = weight
                try:
                    weights[name], layer = gptq(
                        start, hessian, self.scheme, scales.get(name), settings=self.settings.gptq
                    )
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                layer["relative_error"] = relative_output_error(weight, weights[name], hessian)
                metrics["layers"][name].update(layer)
        return weights

    def _clipped(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        columns = per_column(scales, weight.shape[1], self.scheme.group_size)
        return torch.clamp(weight, columns * self.scheme.qmin, columns * self.scheme.qmax)

    @property
    def _quantized_inputs(self) -> bool:
        return self.settings.gptq.quantized_inputs and self.scheme.activation_bits == 8
