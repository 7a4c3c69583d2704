"""Weight clipping: the learned clipping (LWC) of the OdysseyLLM recipe and a clip search without training.

LWC (arXiv 2311.09550 section 3, after arXiv 2308.13137 section 3.2) gives every output channel the scale

    S = max(|sigmoid(gamma) * max(W)|, |sigmoid(beta) * min(W)|) / (2^(b-1) - 1)

and learns gamma and beta, block by block, from the mean squared error between the full-precision block on the
full-precision chain's inputs and the quantized block on the quantized chain's inputs, with straight-through
rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from odyssey.quantization.fake_quant import (
    fake_quant_per_token,
    fake_quant_weight,
    int8_linear,
    swapped_modules,
)
from odyssey.quantization.grid import (
    group_range,
    minmax_grid,
    per_column,
    quantize_weight,
    sum_groups,
    symmetric_scales,
)
from odyssey.quantization.method import BlockCalibration
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme

# A sigmoid at 1 cannot be written as a logit; a channel that the search leaves unclipped starts here.
LARGEST_INITIAL_RATIO = 0.999


@dataclass
class LearnedClippingSettings:
    """How the clipping of one block is learned.

    The paper's LWC is schedule "constant" with initialization "constant". The defaults start where the clip search
    ends and let the learning rate fall, which needs far fewer steps: a logit moves by about the learning rate in a
    step, so that the way from 4.0 to a usual ratio of 0.7 alone takes more than 300.

    epochs:              passes over the calibration samples.
    learning_rate:       AdamW's, without weight decay.
    schedule:            constant, or cosine from learning_rate to a hundredth of it.
    batch_size:          calibration samples per step.
    initialization:      constant: every logit starts at `initial_logit`; search: at the clip search's ratio.
    initial_logit:       4.0 in the paper (sigmoid 0.982).
    targets:             reference: the full-precision block on the full-precision chain's inputs (the paper's);
                         quantized: the full-precision block on the quantized chain's inputs.
    evaluation_samples:  samples on which the parameters are compared after every epoch (the best are kept).
    shuffle:             visit the samples in a new order, drawn from the seed, in every epoch.
    tf32_gradients:      on CUDA, multiply gradients in TF32; outputs and losses stay exact.
    """

    epochs: int = 20
    learning_rate: float = 1e-2
    schedule: str = "cosine"
    batch_size: int = 1
    initialization: str = "search"
    initial_logit: float = 4.0
    targets: str = "reference"
    evaluation_samples: int = 32
    shuffle: bool = True
    tf32_gradients: bool = True

    def __post_init__(self) -> None:
        _check_choice("lwc.schedule", self.schedule, ("constant", "cosine"))
        _check_choice("lwc.initialization", self.initialization, ("constant", "search"))
        _check_choice("lwc.targets", self.targets, ("reference", "quantized"))
        for name in ("epochs", "batch_size", "evaluation_samples"):
            if getattr(self, name) < (0 if name == "epochs" else 1):
                raise ValueError(f"lwc.{name} must not be {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"lwc.learning_rate must be positive, not {self.learning_rate}")


@dataclass
class SearchSettings:
    """The clip search: the ratio of a channel's absmax with the smallest error on a linear grid of ratios.

    objective:  weight: sum (W - Q)^2; diagonal: the same weighted with each input's mean square;
                output: e H e^T with e = W - Q, the squared error of the layer's output.
    steps:      ratios tried, from 1 down to `smallest`.
    """

    objective: str = "weight"
    steps: int = 71
    smallest: float = 0.3

    def __post_init__(self) -> None:
        _check_choice("search.objective", self.objective, ("weight", "diagonal", "output"))
        if self.steps < 1:
            raise ValueError(f"search.steps must be at least 1, not {self.steps}")
        if not 0 < self.smallest <= 1:
            raise ValueError(f"search.smallest must be in (0, 1], not {self.smallest}")


@dataclass
class ClippingResult:
    """scales: linear layer name -> float32 [out, num_groups]; losses[0]: block MSE before the first epoch."""

    scales: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0


def search_clipping(
    weight: torch.Tensor,
    scheme: QuantScheme,
    settings: SearchSettings | None = None,
    hessian: torch.Tensor | None = None,
) -> torch.Tensor:
    """Ratio of absmax to keep, float32 [out, num_groups] in [smallest, 1], with the least error of rounding.

    hessian: float32 [in, in] (any multiple of sum x x^T); needed by the objectives diagonal and output.
    """
    settings = settings or SearchSettings()
    if not scheme.symmetric:
        raise ValueError("the clip search is for symmetric schemes")
    if settings.objective != "weight" and hessian is None:
        raise ValueError(f"search.objective {settings.objective} needs a Hessian")
    weight = weight.float()
    full_scales, _ = minmax_grid(weight, scheme)
    best_error = torch.full_like(full_scales, math.inf)
    best_ratio = torch.ones_like(full_scales)
    for ratio in torch.linspace(1.0, settings.smallest, settings.steps).tolist():
        scales = full_scales * ratio
        values = quantize_weight(weight, scales, None, scheme).float()
        error = values.mul_(per_column(scales, weight.shape[1], scheme.group_size)).sub_(weight)
        total = _weighted_error(error, settings.objective, hessian, scheme.group_size)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best_ratio = torch.where(better, ratio, best_ratio)
    return best_ratio


def _weighted_error(error: torch.Tensor, objective: str, hessian: torch.Tensor | None, group_size: int) -> torch.Tensor:
    if objective == "weight":
        return sum_groups(error.square(), group_size)
    if objective == "diagonal":
        return sum_groups(error.square() * hessian.diagonal(), group_size)
    if group_size == PER_CHANNEL or group_size >= error.shape[1]:
        return ((error @ hessian) * error).sum(dim=1, keepdim=True)
    # Errors of different groups are taken as independent: each group sees its own block of the Hessian.
    totals = []
    for start in range(0, error.shape[1], group_size):
        part = slice(start, start + group_size)
        totals.append(((error[:, part] @ hessian[part, part]) * error[:, part]).sum(dim=1))
    return torch.stack(totals, dim=1)


class LearnedClippingLinear(nn.Module):
    """A linear layer whose float32 weight is fake-quantized with learned clipping.

    gamma, beta: logits of the kept part of each group's maximum and minimum, [out, num_groups].
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scheme: QuantScheme,
        logits: torch.Tensor | float = 4.0,
        tf32_gradients: bool = False,
    ) -> None:
        super().__init__()
        if not scheme.symmetric:
            raise ValueError("learned weight clipping is symmetric here, as in the paper")
        self.scheme, self.tf32_gradients = scheme, tf32_gradients
        self.register_buffer("weight", weight.detach().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        low, high = group_range(self.weight, scheme.group_size)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        initial = torch.as_tensor(logits, dtype=torch.float32, device=low.device).expand_as(low)
        self.gamma = nn.Parameter(initial.clone())
        self.beta = nn.Parameter(initial.clone())

    def scales(self) -> torch.Tensor:
        """S of this file's docstring, float32 [out, num_groups]; differentiable in gamma and beta."""
        high = (torch.sigmoid(self.gamma) * self.high).abs()
        low = (torch.sigmoid(self.beta) * self.low).abs()
        return symmetric_scales(torch.maximum(high, low), self.scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = self.scales()
        if self.scheme.activation_bits == 8 and scales.shape[1] == 1:
            return int8_linear(x, self.weight, scales, self.bias, self.scheme, self.tf32_gradients)
        if self.scheme.activation_bits == 8:
            x = fake_quant_per_token(x)
        return functional.linear(x, fake_quant_weight(self.weight, scales, self.scheme), self.bias)


def learn_clipping(
    block: nn.Module,
    calibration: BlockCalibration,
    scheme: QuantScheme,
    settings: LearnedClippingSettings | None = None,
    ratios: dict[str, torch.Tensor] | None = None,
) -> ClippingResult:
    """Learn the clipping of all linear layers of a block together.

    ratios: linear layer name -> kept ratio [out, num_groups] to start from (initialization "search").

    The block is unchanged afterwards. The parameters returned are those with the smallest loss among the
    initial ones and the ones after every epoch, so that learning never ends worse than it started. Raises
    ValueError when the loss is NaN or Inf.
    """
    settings = settings or LearnedClippingSettings()
    started = time.perf_counter()
    inputs, targets = calibration.inputs, calibration.targets
    if settings.targets == "quantized":
        with torch.no_grad():
            targets = [calibration.forward(block, hidden) for hidden in inputs]
    modules = _learnable_modules(block, calibration, scheme, settings, ratios)
    parameters = [p for module in modules.values() for p in (module.gamma, module.beta)]
    evaluated = _batches(range(len(inputs)), inputs, settings.batch_size, settings.evaluation_samples)
    generator = torch.Generator().manual_seed(calibration.seed)

    # The block's other parameters (norms) need no gradient.
    frozen = [p for p in block.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with swapped_modules(block, modules), _deterministic_attention(calibration.device):
            losses = [_evaluate(block, calibration, inputs, targets, evaluated)]
            best, best_epoch = [p.detach().clone() for p in parameters], 0
            optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
            steps_per_epoch = len(_batches(range(len(inputs)), inputs, settings.batch_size))
            step = 0
            for epoch in range(1, settings.epochs + 1):
                order = range(len(inputs))
                if settings.shuffle:
                    order = torch.randperm(len(inputs), generator=generator).tolist()
                for batch in _batches(order, inputs, settings.batch_size):
                    rate = _learning_rate(settings, step / (settings.epochs * steps_per_epoch))
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    loss = _batch_loss(block, calibration, inputs, targets, batch)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    step += 1
                losses.append(_evaluate(block, calibration, inputs, targets, evaluated))
                if not math.isfinite(losses[-1]):
                    raise ValueError(f"learned weight clipping: the block's loss is {losses[-1]} in epoch {epoch}")
                if losses[-1] < losses[best_epoch]:
                    best, best_epoch = [p.detach().clone() for p in parameters], epoch
                calibration.report(f"lwc {epoch}/{settings.epochs}, mse {losses[0]:.3g} -> {losses[best_epoch]:.3g}")
            with torch.no_grad():
                for parameter, value in zip(parameters, best, strict=True):
                    parameter.copy_(value)
                scales = {name: module.scales().clone() for name, module in modules.items()}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return ClippingResult(scales, losses, best_epoch, time.perf_counter() - started)


@contextmanager
def _deterministic_attention(device: torch.device) -> Iterator[None]:
    """On CUDA, take the attention kernel whose backward pass adds in a fixed order."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _learnable_modules(
    block: nn.Module,
    calibration: BlockCalibration,
    scheme: QuantScheme,
    settings: LearnedClippingSettings,
    ratios: dict[str, torch.Tensor] | None,
) -> dict[str, LearnedClippingLinear]:
    if settings.initialization == "search" and ratios is None:
        raise ValueError("lwc.initialization search needs the clip search's ratios")
    modules = {}
    for name in calibration.linear_names():
        linear = block.get_submodule(name)
        logits: torch.Tensor | float = settings.initial_logit
        if settings.initialization == "search":
            logits = torch.logit(ratios[name].clamp(max=LARGEST_INITIAL_RATIO))
        modules[name] = LearnedClippingLinear(linear.weight, linear.bias, scheme, logits, settings.tf32_gradients)
    return modules


def _batches(
    order: Sequence[int], inputs: Sequence[torch.Tensor], batch_size: int, limit: int | None = None
) -> list[list[int]]:
    """Consecutive samples of one shape, at most `batch_size` together, of the first `limit` in `order`."""
    batches: list[list[int]] = []
    for index in list(order)[:limit]:
        last = batches[-1] if batches else []
        if 0 < len(last) < batch_size and inputs[last[0]].shape == inputs[index].shape:
            last.append(index)
        else:
            batches.append([index])
    return batches


def _batch_loss(
    block: nn.Module,
    calibration: BlockCalibration,
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    batch: list[int],
) -> torch.Tensor:
    hidden = torch.cat([inputs[i].float() for i in batch])
    target = torch.cat([targets[i].float() for i in batch])
    return functional.mse_loss(calibration.forward(block, hidden), target)


def _evaluate(
    block: nn.Module,
    calibration: BlockCalibration,
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    batches: list[list[int]],
) -> float:
    total = torch.zeros((), dtype=torch.float64, device=calibration.device)
    with torch.no_grad():
        for batch in batches:
            total += _batch_loss(block, calibration, inputs, targets, batch).double() * len(batch)
    return float(total) / sum(len(batch) for batch in batches)


def _learning_rate(settings: LearnedClippingSettings, progress: float) -> float:
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
