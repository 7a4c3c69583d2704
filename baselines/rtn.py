"""Round to nearest: every weight goes to the closest point of its min/max grid; no calibration data.

With 4 bits, per channel and 8-bit activations this is the "vanilla W4A8" of arXiv 2311.09550, table 6.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from odyssey.quantization.grid import check_finite, round_to_nearest
from odyssey.quantization.method import BlockCalibration, BlockResult
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme, check_bits


@dataclass
class RtnSettings:
    """bits: 2..8; group_size: -1 for one scale per output channel; symmetric: without a zero point;
    activation_bits: 8 for per-token dynamic int8 activations, 16 for none."""

    bits: int = 4
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    activation_bits: int = 8

    def __post_init__(self) -> None:
        check_bits(self.bits)


class RtnMethod:
    """Round to nearest as a `Method`."""

    name = "rtn"
    needs_calibration = False

    def __init__(self, settings: RtnSettings | None = None) -> None:
        self.settings = settings or RtnSettings()
        self.scheme = QuantScheme(
            self.settings.bits,
            self.settings.group_size,
            self.settings.symmetric,
            self.settings.activation_bits,
        )

    def quantize_block(self, block: nn.Module, calibration: BlockCalibration | None) -> BlockResult:
        """Quantize the linear layers of `calibration.linear_groups`, or every nn.Linear of the block without
        it.

        Raises ValueError, naming the layer, for weights with NaN or Inf.
        """
        if calibration is None:
            names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        else:
            names = list(calibration.linear_names())
        weights = {}
        for name in names:
            weight = block.get_submodule(name).weight.detach()
            check_finite(weight, f"the weight of {name}")
            weights[name] = round_to_nearest(weight, self.scheme)
        return BlockResult(weights=weights)
