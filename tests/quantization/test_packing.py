import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odyssey.quantization.packing import pack_values, unpack_values


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 33),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(rows, columns, bits, signed, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    drawn = np.random.default_rng(seed).integers(low, high, (rows, columns))
    values = torch.from_numpy(drawn.astype(np.int8 if signed else np.uint8))
    packed = pack_values(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 2) if bits <= 4 else columns)
    restored = unpack_values(packed, bits, columns, signed=signed)
    assert restored.dtype == values.dtype
    assert torch.equal(restored, values)


def test_byte_layout():
    packed = pack_values(torch.tensor([[-8, 7, -1]], dtype=torch.int8), 4)
    assert packed.tolist() == [[0x78, 0x0F]]


@pytest.mark.parametrize(("value", "bits"), [(8, 4), (-9, 4), (4, 3)])
def test_values_outside_the_range_are_refused(value, bits):
    with pytest.raises(ValueError, match="values must lie in"):
        pack_values(torch.tensor([[value]], dtype=torch.int8), bits)
