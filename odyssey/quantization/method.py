"""The interface every quantization method implements.

A method has one job: turn the linear layers of one decoder block into quantized ones, given that block's calibration
inputs. Everything around it (streaming blocks, carrying activations, writing shards, resuming) is the pipeline's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from odyssey.quantization.scheme import QuantizedWeight, QuantScheme


@dataclass
class BlockCalibration:
    """Calibration data of one decoder block. Every sample is [1, seqlen, hidden_size] on `device`.

    inputs:            the quantized chain's activations: what this block sees after the blocks before it are quantized.
    reference_inputs:  the full-precision chain's activations (equal to `inputs` in the first block).
    targets:           the full-precision block's outputs on `reference_inputs`.
    forward:           forward(block, hidden) -> hidden runs a decoder block with its mask and position embeddings;
                       differentiable with respect to the block's parameters and `hidden`.
    linear_groups:     names, relative to the block, of the linear layers that read the same input, in execution order:
                       (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ...).
    input_norms:       linear group index -> name of the norm whose output the group reads (absent: no norm in front).
    report:            report(text) shows a short status next to the progress bar.
    """

    inputs: Sequence[torch.Tensor]
    reference_inputs: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    linear_groups: tuple[tuple[str, ...], ...]
    input_norms: dict[int, str]
    device: torch.device
    seed: int = 0
    report: Callable[[str], None] = field(default=lambda text: None)

    def linear_names(self) -> Iterator[str]:
        for group in self.linear_groups:
            yield from group


@dataclass
class BlockResult:
    """What a method returns for one block.

    weights:   linear layer name (relative to the block) -> its integers; a layer left out stays in floating point.
    tensors:   other tensors of the block that the method changed (a norm's folded weight), by parameter name.
    metrics:   JSON-ready figures for the record (losses, damping, seconds), free-form.
    """

    weights: dict[str, QuantizedWeight]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)


class Method(Protocol):
    """A quantization method. `needs_calibration` False lets the pipeline skip the calibration forward passes."""

    name: str
    scheme: QuantScheme
    needs_calibration: bool

    def quantize_block(self, block: nn.Module, calibration: BlockCalibration | None) -> BlockResult:
        """Quantize the linear layers of `block` (float32 parameters on the calibration device).

        The method may change the block's weights in place; the pipeline replaces them by the result's integers.
        """
        ...
