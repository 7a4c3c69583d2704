"""Small decoder blocks with heavy-tailed weights, outlier channels and calibration inputs, for tests of methods."""

from __future__ import annotations

import math

import torch
from helpers.outliers import inject_activation_outliers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from odyssey.models.architecture import LlamaFamily
from odyssey.quantization.fake_quant import fake_quantized
from odyssey.quantization.method import BlockCalibration

HIDDEN, INTERMEDIATE = 64, 112
NAMES = [name for group in LlamaFamily.linear_groups for name in group]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy_tailed(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """Weights with outliers (a normal value cubed in part), for which clipping pays."""
    normal = torch.randn(out_features, in_features, generator=generator(seed))
    return (normal + 0.15 * normal**3) / math.sqrt(in_features)


def make_model(
    kv_heads: int = 4,
    bias: bool = False,
    outlier_factor: float = 1.0,
    outlier_channels: tuple[int, ...] = (3, 17, 40),
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A model of one block with 4 heads; parameters are float32 holding values that `dtype` holds too.

    kv_heads: 4 for plain attention, less for grouped-query attention. bias: in every linear layer.
    """
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=kv_heads, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
            normal = torch.randn(parameter.shape, generator=generator(seed))
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * normal)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * normal)
            else:
                parameter.copy_((normal + 0.15 * normal**3) / math.sqrt(parameter.shape[1]))
        if outlier_factor != 1:
            inject_activation_outliers(model, outlier_channels, outlier_factor)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).float())
    return model


def calibrate(
    model: LlamaForCausalLM, samples: int = 6, seqlen: int = 32, seed: int = 0, drift: float = 0.0
) -> BlockCalibration:
    """Calibration of the model's first block. drift: distance of the quantized chain from the full-precision one."""

    def forward(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        return block(hidden, position_embeddings=model.model.rotary_emb(hidden, positions))

    # Correlated features, as hidden states have them.
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator(9)) / 8 + torch.eye(HIDDEN)
    shape = (1, seqlen, HIDDEN)
    reference = [torch.randn(shape, generator=generator(100 * seed + index)) @ mixing for index in range(samples)]
    inputs = [
        hidden + drift * torch.randn(shape, generator=generator(5000 + index)) for index, hidden in enumerate(reference)
    ]
    with torch.no_grad():
        targets = [forward(model.model.layers[0], hidden) for hidden in reference]
    return BlockCalibration(
        inputs=inputs, reference_inputs=reference, targets=targets, forward=forward,
        linear_groups=LlamaFamily.linear_groups, input_norms=LlamaFamily.input_norms, device=torch.device("cpu"),
    )  # fmt: skip


@torch.no_grad()
def block_error(block: nn.Module, calibration: BlockCalibration, result) -> float:
    """Mean squared error of the quantized block's output; the changed tensors are put into `block` for good."""
    install(block, result.tensors)
    with fake_quantized(block, result.weights):
        errors = [
            functional.mse_loss(calibration.forward(block, hidden), target).item()
            for hidden, target in zip(calibration.inputs, calibration.targets, strict=True)
        ]
    return sum(errors) / len(errors)


@torch.no_grad()
def install(block: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        block.get_parameter(name).copy_(tensor)


@torch.no_grad()
def layer_inputs(block: nn.Module, calibration: BlockCalibration, names, inputs=None) -> dict[str, torch.Tensor]:
    """Inputs [tokens, in_features] of the named layers, all samples, by hooks written for the tests alone."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: rows[name].append(args[0][0].clone())
        )
        for name in names
    ]
    for hidden in calibration.reference_inputs if inputs is None else inputs:
        calibration.forward(block, hidden)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}
