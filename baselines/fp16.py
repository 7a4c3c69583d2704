"""The model as it is: the reference of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from odyssey.quantization.method import BlockCalibration, BlockResult
from odyssey.quantization.scheme import QuantScheme


@dataclass
class Fp16Settings:
    """No settings: checkpoints keep their dtype (bf16 stays bf16; float32 on CPU), and the record says which."""


class Fp16Method:
    """Leaves every linear layer alone; nothing is written, the source checkpoint itself is measured."""

    name = "fp16"
    scheme = QuantScheme(weight_bits=16, activation_bits=16)
    needs_calibration = False

    def __init__(self, settings: Fp16Settings | None = None) -> None:
        self.settings = settings or Fp16Settings()

    def quantize_block(self, block: nn.Module, calibration: BlockCalibration | None) -> BlockResult:
        return BlockResult(weights={})
