"""SmoothQuant (arXiv 2211.10438): W8A8 after moving activation outliers into the weights.

The scale of input feature j is s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (equation 4), with the maximum of W taken
over all layers that read the input. The norm in front is divided by s, the columns behind it are multiplied by it.
Layers without a norm in front (attention output, MLP down) are quantized as they are. Weights are int8 per channel,
activations int8 per token, dynamic.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from baselines.folding import fold_into_norm
from odyssey.quantization.fake_quant import fake_quantized
from odyssey.quantization.grid import check_finite, round_to_nearest
from odyssey.quantization.method import BlockCalibration, BlockResult
from odyssey.quantization.observation import AbsMaximum, observe_inputs
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme

# Smallest maximum of an activation or weight that goes into a scale.
MINIMUM = 1e-5


@dataclass
class SmoothQuantSettings:
    """alpha:           how much of the activations' range moves into the weights, 0..1. The authors use 0.85 for
                     LLaMA-2 7B and 13B, 0.9 for 70B, 0.5 for OPT.
    alpha_search:    choose alpha block by block out of `alpha_grid`: the one whose quantized block comes closest to
                     the full-precision block's outputs; `alpha` is then not used.
    alpha_grid:      the candidates of the search.
    search_samples:  calibration samples that the search looks at.
    """

    alpha: float = 0.5
    alpha_search: bool = False
    alpha_grid: list[float] = field(default_factory=lambda: [0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
    search_samples: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be 0..1, not {self.alpha}")
        if not self.alpha_grid or not all(0 <= alpha <= 1 for alpha in self.alpha_grid):
            raise ValueError(f"alpha_grid must hold values in 0..1, not {self.alpha_grid}")
        if self.search_samples < 1:
            raise ValueError(f"search_samples must be at least 1, not {self.search_samples}")


def smoothing_scales(activation_maximum: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), float32 [in_features]; both maxima are at least 1e-5.

    activation_maximum: [in_features]; weights: [out_features, in_features] of all layers that read the input.
    """
    weight_maximum = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    return activation_maximum.clamp(min=MINIMUM) ** alpha / weight_maximum.clamp(min=MINIMUM) ** (1 - alpha)


class SmoothQuantMethod:
    """SmoothQuant as a `Method`."""

    name = "smoothquant"
    scheme = QuantScheme(weight_bits=8, group_size=PER_CHANNEL, symmetric=True, activation_bits=8)
    needs_calibration = True

    def __init__(self, settings: SmoothQuantSettings | None = None) -> None:
        self.settings = settings or SmoothQuantSettings()

    @torch.no_grad()
    def quantize_block(self, block: nn.Module, calibration: BlockCalibration | None) -> BlockResult:
        """Smooth the layers behind the block's norms and quantize all of `calibration.linear_groups`.

        Activation maxima are those of the full-precision chain, as in the authors' code. Metrics: `alpha`, `smoothing`
        (range of each norm's scales) and, of a search, `alpha_errors` (mean squared error of the block's output).
        Raises ValueError, naming the layer, for weights or activations with NaN or Inf.
        """
        if calibration is None:
            raise ValueError("smoothquant needs calibration data")
        for name in calibration.linear_names():
            check_finite(block.get_submodule(name).weight, f"the weight of {name}")
        calibration.report("activation maxima")
        maxima = self._activation_maxima(block, calibration)
        metrics: dict = {}
        alpha = self.settings.alpha
        if self.settings.alpha_search:
            errors = self._search(block, calibration, maxima)
            alpha = min(errors, key=errors.get)
            metrics["alpha_errors"] = {str(candidate): error for candidate, error in errors.items()}
        result = self._smooth_and_quantize(block, calibration, maxima, alpha)
        result.metrics = {"alpha": alpha, **metrics, **result.metrics}
        return result

    def _activation_maxima(self, block: nn.Module, calibration: BlockCalibration) -> dict[int, torch.Tensor]:
        """Linear group index -> max|X_j| of its input [in_features], for the groups behind a norm."""
        observers = {index: AbsMaximum() for index in calibration.input_norms}
        firsts = {index: calibration.linear_groups[index][0] for index in observers}
        observe_inputs(
            block,
            {firsts[index]: [observer] for index, observer in observers.items()},
            calibration.forward,
            calibration.reference_inputs,
        )
        for index, observer in observers.items():
            check_finite(observer.value, f"the activation maxima of {firsts[index]}")
        return {index: observer.value for index, observer in observers.items()}

    def _smooth_and_quantize(
        self, block: nn.Module, calibration: BlockCalibration, maxima: dict[int, torch.Tensor], alpha: float
    ) -> BlockResult:
        """Changes the block's norms and weights in place."""
        tensors, smoothing = {}, {}
        for index, norm in calibration.input_norms.items():
            group = calibration.linear_groups[index]
            scales = smoothing_scales(maxima[index], [block.get_submodule(name).weight for name in group], alpha)
            folded, effective = fold_into_norm(block, norm, group, scales)
            tensors.update(folded)
            smoothing[norm] = {"min": float(effective.min()), "max": float(effective.max())}
        weights: dict[str, QuantizedWeight] = {
            name: round_to_nearest(block.get_submodule(name).weight, self.scheme) for name in calibration.linear_names()
        }
        return BlockResult(weights, tensors, {"smoothing": smoothing})

    def _search(
        self, block: nn.Module, calibration: BlockCalibration, maxima: dict[int, torch.Tensor]
    ) -> dict[float, float]:
        """Mean squared error of the quantized block's outputs against the full-precision block's, per alpha."""
        count = min(self.settings.search_samples, len(calibration.inputs))
        samples = [position * len(calibration.inputs) // count for position in range(count)]
        errors = {}
        for alpha in self.settings.alpha_grid:
            calibration.report(f"alpha {alpha:g}")
            candidate = copy.deepcopy(block)
            weights = self._smooth_and_quantize(candidate, calibration, maxima, alpha).weights
            total = 0.0
            with fake_quantized(candidate, weights):
                for index in samples:
                    output = calibration.forward(candidate, calibration.inputs[index].float())
                    total += float((output - calibration.targets[index]).square().mean())
            errors[alpha] = total / count
        return errors
