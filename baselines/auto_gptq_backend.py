"""`method=gptq method.backend=auto-gptq`: the quantizer of the package auto-gptq inside the block-by-block pipeline.

Its GPTQ class gathers the Hessians and rounds; which inputs a layer sees (the quantized chain, layers of one input
together) is as for the native backend. What differs from it by the package's own arithmetic: symmetric scales are
absmax / 7.5 (the native `full_range`), dead columns get 1 on the diagonal, a Hessian that is not positive definite is
not damped further, and where a group is smaller than `block_size` its range is that before the block's own updates.
"""

from __future__ import annotations

import torch
from torch import nn

from baselines.reference_packages import auto_gptq_module, version, without_cuda_synchronization
from odyssey.quantization.compensation import relative_output_error
from odyssey.quantization.grid import check_finite, per_column
from odyssey.quantization.method import BlockCalibration
from odyssey.quantization.observation import observe_inputs
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme


class _Accumulator:
    """auto-gptq's GPTQ object of a layer as an observer of its inputs."""

    def __init__(self, weight: torch.Tensor) -> None:
        holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        holder.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)
        self.gptq = auto_gptq_module("quantization.gptq").GPTQ(holder)

    def add(self, x: torch.Tensor) -> None:
        self.gptq.add_batch(x.detach(), None)


@torch.no_grad()
def quantize_group(
    block: nn.Module, names: tuple[str, ...], calibration: BlockCalibration, scheme: QuantScheme, settings
) -> tuple[dict[str, QuantizedWeight], dict[str, dict]]:
    """Quantize linear layers that read one input; the layers before them are in `block` as they will be shipped.

    settings: a `GptqSettings`. Returns integers and metrics by layer name. Raises ValueError, naming the layer, for
    activations with NaN or Inf and for a Hessian that the package cannot factorize.
    """
    first = _Accumulator(block.get_submodule(names[0]).weight)
    observe_inputs(block, {names[0]: [first]}, calibration.forward, calibration.inputs)
    hessian, samples = first.gptq.H, first.gptq.nsamples
    check_finite(hessian, f"the activations of {names[0]}")
    weights, metrics = {}, {}
    for name in names:
        original = block.get_submodule(name).weight
        layer = _Accumulator(original)
        # The layers read the same input, so theirs would be the same Hessian.
        layer.gptq.H, layer.gptq.nsamples = hessian.clone(), samples
        layer.gptq.quantizer.configure(scheme.weight_bits, perchannel=True, sym=scheme.symmetric, mse=False)
        static = settings.act_order and scheme.group_size != PER_CHANNEL
        try:
            with without_cuda_synchronization():
                scales, zeros, _ = layer.gptq.fasterquant(
                    blocksize=settings.block_size, percdamp=settings.damping, group_size=scheme.group_size,
                    actorder=settings.act_order, static_groups=static,
                )  # fmt: skip
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"{name}: auto-gptq: the Hessian is not positive definite; raise method.damping, or use backend=native"
            ) from error
        weights[name] = _integers(layer.gptq.layer.weight.data, scales, zeros, scheme)
        metrics[name] = {
            "damping": settings.damping,
            "dead_columns": int((hessian.diagonal() == 0).sum()),
            "relative_error": relative_output_error(original, weights[name], hessian),
            "backend": f"auto-gptq {version('auto-gptq')}",
        }
    return weights, metrics


def _integers(
    dequantized: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: QuantScheme
) -> QuantizedWeight:
    """The integers behind the package's dequantized weights scale * (value - zero)."""
    scales = scales.float().contiguous()
    steps = torch.round(dequantized / per_column(scales, dequantized.shape[1], scheme.group_size))
    if scheme.symmetric:
        # The package's zero point is the middle of its range, which is 0 of the signed integers.
        return QuantizedWeight(steps.to(torch.int8), scales, scheme)
    values = steps + per_column(zeros.float(), dequantized.shape[1], scheme.group_size)
    return QuantizedWeight(values.to(torch.uint8), scales, scheme, zeros.to(torch.uint8).contiguous())
