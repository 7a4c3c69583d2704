"""AWQ (arXiv 2306.00978): activation-aware scaling and clipping of weights, W4A16 with groups of 128, asymmetric.

Per block, on the full-precision chain's activations as in the authors' code: for the layers that read one input, where
an operation in front can be divided by a scale, search the scale and fold it; then search how far each group's range is
clipped; then round to nearest. Both searches belong to the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from baselines.autoawq_backend import BlockQuantizer
from baselines.folding import fold_into_linear, fold_into_norm
from baselines.reference_packages import NATIVE, check_backend
from odyssey.quantization.compensation import HessianAccumulator
from odyssey.quantization.fake_quant import FakeQuantLinear, swapped_modules
from odyssey.quantization.grid import (
    check_finite,
    dequantize,
    group_range,
    minmax_grid,
    per_column,
    quantize_weight,
    round_to_nearest,
)
from odyssey.quantization.method import BlockCalibration, BlockResult
from odyssey.quantization.observation import AbsMean, TokenSample, observe_inputs, record_calls
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme, check_bits

# Exponents of the scale search: 0, 1/20, .., 19/20. The clip search shrinks by 0, 1/20, .., 9/20.
SCALE_STEPS, CLIP_STEPS, CLIP_CANDIDATES = 20, 20, 10
MINIMUM_SCALE = 1e-4
# The linear layer in front, feature by feature, of layers that no norm precedes.
PRODUCERS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
# Clipping queries and keys would change products of two quantized layers that the clip search does not see.
NOT_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")
# Weights that the clip search holds copies of at a time.
CLIP_CHUNK = 2**24


@dataclass
class AwqSettings:
    """bits:           2..8.
    group_size:     input features per scale; -1 for one scale per output channel.
    symmetric:      without a zero point.
    search_tokens:  tokens (whole samples, evenly spaced) on which the scale search compares a module's outputs; their
                    inputs and outputs are held at a time. The authors' amount is 128 x 512.
    clip_tokens:    tokens (evenly spaced) of the clip search.
    duo_scaling:    divide the scales by the mean relative magnitude of the weights, ^(1 - ratio), as AutoAWQ does
                    unless told otherwise; the paper's search does not.
    backend:        native, or autoawq: that package's quantizer in place of ours (see baselines/autoawq_backend.py).
    checkpoint:     a directory with an existing AWQ checkpoint (GEMM layout): read, not quantized; its format is what
                    it says itself.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    search_tokens: int = 65536
    clip_tokens: int = 512
    duo_scaling: bool = False
    backend: str = NATIVE
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend, (NATIVE, "autoawq"), self.checkpoint)
        check_bits(self.bits)
        for name in ("search_tokens", "clip_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.backend == "autoawq" and (self.bits != 4 or self.symmetric or self.group_size < 1):
            raise ValueError("backend=autoawq: the package packs 4 bits with zero points in groups; use backend=native")


@dataclass
class ScalePair:
    """What is divided by a scale, and the layers behind it. inspected: the module whose output the search compares."""

    producer: str
    consumers: tuple[str, ...]
    inspected: str
    behind_norm: bool


def scale_pairs(block: nn.Module, calibration: BlockCalibration) -> list[ScalePair]:
    """The pairs of a block in execution order: norm -> q, k, v; v -> o; norm -> gate, up; up -> down.

    v -> o is left out where v has fewer features than o reads (grouped-query attention).
    """
    pairs = []
    for index, group in enumerate(calibration.linear_groups):
        norm = calibration.input_norms.get(index)
        if norm is not None:
            pairs.append(ScalePair(norm, group, group[0].rpartition(".")[0], behind_norm=True))
            continue
        producer = PRODUCERS.get(group[0])
        if producer is None or len(group) != 1:
            continue
        if block.get_submodule(producer).out_features == block.get_submodule(group[0]).in_features:
            pairs.append(ScalePair(producer, group, group[0], behind_norm=False))
    return pairs


def awq_scales(
    mean_magnitude: torch.Tensor, ratio: float, weight_magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """s = max(x^ratio, 1e-4), divided by sqrt(max(s) min(s)); x = mean|X_j| [in_features].

    weight_magnitude: with it (see `relative_magnitude`) x^ratio is divided by w^(1 - ratio) + 1e-4 first.
    """
    scales = mean_magnitude**ratio
    if weight_magnitude is not None:
        scales = scales / (weight_magnitude ** (1 - ratio) + MINIMUM_SCALE)
    scales = scales.clamp(min=MINIMUM_SCALE)
    return scales / (scales.max() * scales.min()).sqrt()


def relative_magnitude(weights: list[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean over all rows of |W_ij| / (largest magnitude of its group + 1e-6), float32 [in_features]."""
    total, rows = 0.0, 0
    for weight in weights:
        magnitude = weight.float().abs()
        _, largest = group_range(magnitude, group_size)
        relative = magnitude / (per_column(largest, weight.shape[1], group_size) + 1e-6)
        total, rows = total + relative.sum(dim=0, dtype=torch.float64), rows + len(weight)
    return (total / rows).float()


def fake_quantize(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The weight rounded to its own min/max grid, float32 [out_features, in_features]."""
    scales, zeros = minmax_grid(weight, scheme)
    return dequantize(QuantizedWeight(quantize_weight(weight, scales, zeros, scheme), scales, scheme, zeros))


def search_clipping(weight: torch.Tensor, x: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Largest magnitude to keep of every group, float32 [out_features, num_groups].

    Of absmax * (1 - i / 20), i = 0..9, the one whose clipped and rounded group w_q changes the group's part of the
    output least: mean over tokens of (x (w_q - w)^T)^2. weight: [out_features, in_features]; x: [tokens, in_features].
    """
    in_features = weight.shape[1]
    whole = scheme.group_size == PER_CHANNEL or scheme.group_size >= in_features
    width = in_features if whole else scheme.group_size
    # Zeros behind a shorter last group change neither its range, which holds 0 anyway, nor its output.
    padding = (0, -in_features % width)
    groups = nn.functional.pad(x.float(), padding).view(len(x), -1, width).transpose(0, 1)
    gram = groups.transpose(1, 2) @ groups / len(x)
    padded = nn.functional.pad(weight.float(), padding)
    grouped = QuantScheme(scheme.weight_bits, width, scheme.symmetric, scheme.activation_bits)
    limits = []
    for rows in padded.split(max(1, CLIP_CHUNK // padded.shape[1])):
        low, high = group_range(rows, width)
        absmax = torch.maximum(low.abs(), high.abs())
        best, best_error = absmax.clone(), torch.full_like(absmax, torch.inf)
        for step in range(CLIP_CANDIDATES):
            limit = absmax * (1 - step / CLIP_STEPS)
            bound = per_column(limit, padded.shape[1], width)
            change = fake_quantize(rows.clamp(-bound, bound), grouped) - rows
            change = change.view(len(rows), -1, width).transpose(0, 1)
            error = ((change @ gram) * change).sum(dim=2).t()
            better = error < best_error
            best = torch.where(better, limit, best)
            best_error = torch.where(better, error, best_error)
        limits.append(best)
    return torch.cat(limits)


class AwqMethod:
    """AWQ as a `Method`."""

    name = "awq"
    needs_calibration = True

    def __init__(self, settings: AwqSettings | None = None) -> None:
        self.settings = settings or AwqSettings()
        self.scheme = QuantScheme(
            self.settings.bits, self.settings.group_size, self.settings.symmetric, activation_bits=16
        )

    @torch.no_grad()
    def quantize_block(self, block: nn.Module, calibration: BlockCalibration | None) -> BlockResult:
        """Scale, clip and round the layers of `calibration.linear_groups`; changes the block in place.

        Metrics: `scaling`, per divided operation the exponent (`ratio`) and the inspected module's relative squared
        error with the scale and without; `layers`, per layer the mean part of the groups' range that clipping keeps.
        Raises ValueError, naming the layer, for weights or activations with NaN or Inf.
        """
        if calibration is None:
            raise ValueError("awq needs calibration data")
        for name in calibration.linear_names():
            check_finite(block.get_submodule(name).weight, f"the weight of {name}")
        if self.settings.backend == "autoawq":
            calibration.report("autoawq")
            return BlockQuantizer(block, calibration, self.settings).quantize()
        pairs = scale_pairs(block, calibration)
        calibration.report("activation statistics")
        magnitudes, grams, tokens = self._observe(block, calibration, pairs)

        tensors: dict[str, torch.Tensor] = {}
        scaling: dict[str, dict] = {}
        for pair in pairs:
            calibration.report(f"scale {', '.join(name.rpartition('.')[2] for name in pair.consumers)}")
            first = pair.consumers[0]
            candidates = self._candidates(block, pair, magnitudes[first])
            if pair.behind_norm:
                errors = self._module_errors(block, calibration, pair, candidates)
            else:
                errors = self._layer_errors(block.get_submodule(first).weight, grams.pop(first), candidates)
            best = min(range(SCALE_STEPS), key=errors.__getitem__)
            scaling[pair.producer] = {
                "ratio": best / SCALE_STEPS, "relative_error": errors[best], "relative_error_unscaled": errors[0],
            }  # fmt: skip
            fold = fold_into_norm if pair.behind_norm else fold_into_linear
            changed, effective = fold(block, pair.producer, pair.consumers, candidates[best])
            tensors.update(changed)
            tokens[first] /= effective

        weights, layers = {}, {}
        for group in calibration.linear_groups:
            for name in group:
                weight = block.get_submodule(name).weight.float()
                if name not in NOT_CLIPPED:
                    calibration.report(f"clip {name.rpartition('.')[2]}")
                    weight, kept = self._clip(weight, tokens[group[0]])
                    layers[name] = {"kept_range": kept}
                weights[name] = round_to_nearest(weight, self.scheme)
        return BlockResult(weights, tensors, {"scaling": scaling, "layers": layers})

    def _candidates(self, block: nn.Module, pair: ScalePair, magnitude: torch.Tensor) -> list[torch.Tensor]:
        """The scales of every exponent of the search, each float32 [in_features]."""
        weight_magnitude = None
        if self.settings.duo_scaling:
            weights = [block.get_submodule(name).weight for name in pair.consumers]
            weight_magnitude = relative_magnitude(weights, self.settings.group_size)
        return [awq_scales(magnitude, step / SCALE_STEPS, weight_magnitude) for step in range(SCALE_STEPS)]

    def _observe(
        self, block: nn.Module, calibration: BlockCalibration, pairs: list[ScalePair]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """By each group's first layer: mean|X|, Gram matrices where a layer alone is inspected, tokens to clip on."""
        samples = calibration.reference_inputs
        total = len(samples) * samples[0].shape[1]
        firsts = [group[0] for group in calibration.linear_groups]
        means = {name: AbsMean() for name in firsts}
        sampled = {name: TokenSample(total, self.settings.clip_tokens) for name in firsts}
        grams = {
            name: HessianAccumulator(block.get_submodule(name).in_features, calibration.device)
            for name in (pair.inspected for pair in pairs if not pair.behind_norm)
        }
        observers = {name: [means[name], sampled[name], *([grams[name]] if name in grams else [])] for name in firsts}
        observe_inputs(block, observers, calibration.forward, samples)
        for name in firsts:
            check_finite(means[name].value, f"the mean activation of {name}")
        return (
            {name: mean.value for name, mean in means.items()},
            {name: gram.hessian for name, gram in grams.items()},
            {name: sample.value for name, sample in sampled.items()},
        )

    def _module_errors(
        self, block: nn.Module, calibration: BlockCalibration, pair: ScalePair, candidates: list[torch.Tensor]
    ) -> list[float]:
        """Relative squared error of the inspected module's output for every candidate, on `search_tokens` tokens."""
        samples = calibration.reference_inputs
        count = min(len(samples), -(-self.settings.search_tokens // samples[0].shape[1]))
        chosen = (samples[position * len(samples) // count] for position in range(count))
        calls = record_calls(block, pair.inspected, calibration.forward, chosen)
        module = block.get_submodule(pair.inspected)
        targets = [_output(module, call) for call in calls]
        norm = sum(float(target.double().square().sum()) for target in targets)
        errors = []
        for scales in candidates:
            replacements = {}
            for name in pair.consumers:
                layer = block.get_submodule(name)
                rounded = fake_quantize(layer.weight * scales, self.scheme).div_(scales)
                replacements[name] = FakeQuantLinear(rounded, layer.bias, self.scheme.activation_bits)
            with swapped_modules(block, replacements):
                error = sum(
                    float((_output(module, call) - target).square().sum(dtype=torch.float64))
                    for call, target in zip(calls, targets, strict=True)
                )
            errors.append(error / norm if norm else error)
        return errors

    def _layer_errors(self, weight: torch.Tensor, gram: torch.Tensor, candidates: list[torch.Tensor]) -> list[float]:
        """Relative squared error of one layer's output on all tokens, for every candidate."""
        weight = weight.float()
        norm = float(((weight @ gram) * weight).sum(dtype=torch.float64))
        errors = []
        for scales in candidates:
            change = fake_quantize(weight * scales, self.scheme).div_(scales).sub_(weight)
            error = float(((change @ gram) * change).sum(dtype=torch.float64))
            errors.append(error / norm if norm else error)
        return errors

    def _clip(self, weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        limits = search_clipping(weight, x, self.scheme)
        low, high = group_range(weight, self.scheme.group_size)
        absmax = torch.maximum(low.abs(), high.abs())
        kept = torch.where(absmax > 0, limits / absmax, torch.ones_like(limits)).mean()
        bound = per_column(limits, weight.shape[1], self.scheme.group_size)
        return weight.clamp(-bound, bound), float(kept)


def _output(module: nn.Module, call: tuple[tuple, dict]) -> torch.Tensor:
    args, kwargs = call
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output
