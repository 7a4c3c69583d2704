"""Layout v1 against its element-by-element definition, and pack / unpack as exact inverses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgemm import reference
from fastgemm.packing import pack, packed_shape, unpack


def random_int4(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k"), [(16, 32), (64, 64), (80, 96), (144, 160)])
def test_pack_follows_the_definition(n, k):
    w = random_int4(n, k)
    np.testing.assert_array_equal(pack(w).numpy(), reference.pack(w.numpy()))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), k=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(n, k, seed):
    w = random_int4(16 * n, 32 * k, seed)
    packed = pack(w)
    assert tuple(packed.shape) == packed_shape(16 * n, 32 * k)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, 16 * n, 32 * k), w)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_pack_inverts_unpack_on_any_bytes_of_whole_tiles(seed):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (2, 3, 2048), dtype=torch.uint8, generator=generator)
    assert torch.equal(pack(unpack(packed, 128, 192)), packed)


def test_padding_is_zero():
    packed = pack(torch.full((16, 32), -1, dtype=torch.int8))
    assert int((packed != 0).sum()) == 16 * 32 // 2


def test_pack_accepts_strided_weights():
    w = random_int4(64, 128)
    assert torch.equal(pack(w.t().contiguous().t()), pack(w))


def test_packing_on_the_meta_device_gives_the_shape():
    w = torch.empty(80, 96, dtype=torch.int8, device="meta")
    assert tuple(pack(w).shape) == (2, 2, 2048)
    assert tuple(unpack(pack(w), 80, 96).shape) == (80, 96)


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (torch.zeros(16, 32), TypeError, "w must be an int8 tensor"),
        (np.zeros((16, 32), dtype=np.int8), TypeError, "w must be an int8 tensor"),
        (torch.zeros(16, dtype=torch.int8), ValueError, r"w must have shape \[N, K\]"),
        (torch.zeros(24, 32, dtype=torch.int8), ValueError, "N .* multiple of 16"),
        (torch.zeros(16, 48, dtype=torch.int8), ValueError, "K .* multiple of 32"),
        (torch.zeros(0, 32, dtype=torch.int8), ValueError, "N .* positive"),
        (torch.zeros(16, 0, dtype=torch.int8), ValueError, "K .* positive"),
        (torch.zeros(16, 131072, dtype=torch.int8), ValueError, "K .* at most 131040"),
        (torch.full((16, 32), 8, dtype=torch.int8), ValueError, r"int4 values in \[-8, 7\], found 8..8"),
        (torch.full((16, 32), -9, dtype=torch.int8), ValueError, r"found -9..-9"),
    ],
)
def test_pack_refuses(w, error, message):
    with pytest.raises(error, match=message):
        pack(w)


@pytest.mark.parametrize(
    ("packed", "n", "k", "error", "message"),
    [
        (torch.zeros(1, 1, 2048, dtype=torch.int8), 16, 32, TypeError, "packed must be a uint8 tensor"),
        (
            torch.zeros(1, 1, 2048, dtype=torch.uint8),
            80,
            32,
            ValueError,
            r"packed must have shape \[2, 1, 2048\]",
        ),
        (torch.zeros(1, 1, 2048, dtype=torch.uint8), 16, 33, ValueError, "K .* multiple of 32"),
    ],
)
def test_unpack_refuses(packed, n, k, error, message):
    with pytest.raises(error, match=message):
        unpack(packed, n, k)
