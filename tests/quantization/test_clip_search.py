"""The clip search against every ratio of its grid in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.blocks import generator, heavy_tailed
from hypothesis import given, settings
from hypothesis import strategies as st

from odyssey.quantization.clipping import (
    SearchSettings,
    search_clipping,
)
from odyssey.quantization.grid import minmax_grid
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme


@given(
    group_size=st.one_of(st.just(PER_CHANNEL), st.integers(1, 25)),
    bits=st.integers(2, 5),
    objective=st.sampled_from(["weight", "diagonal", "output"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_search_finds_the_ratio_with_the_least_error(group_size, bits, objective, seed):
    scheme = QuantScheme(bits, group_size)
    weight = heavy_tailed(4, 19, seed)
    x = torch.randn(50, 19, generator=generator(seed + 1)) @ torch.randn(19, 19, generator=generator(seed + 2))
    hessian = x.t() @ x
    found = search_clipping(weight, scheme, SearchSettings(objective, 12, 0.5), hessian)
    full, _ = minmax_grid(weight, scheme)
    matrix = {
        "weight": np.eye(19),
        "diagonal": np.diag(np.diag(hessian.double().numpy())),
        "output": hessian.double().numpy(),
    }[objective]

    def errors(ratio: torch.Tensor) -> np.ndarray:
        scales = full * ratio
        totals = []
        for group in range(full.shape[1]):
            size = 19 if group_size == PER_CHANNEL else group_size
            part = slice(group * size, (group + 1) * size)
            s, w = scales[:, group : group + 1].double().numpy(), weight[:, part].double().numpy()
            e = np.clip(np.rint(w / s), scheme.qmin, scheme.qmax) * s - w
            totals.append(np.einsum("oi,ij,oj->o", e, matrix[part, part], e))
        return np.stack(totals, axis=1)

    best = np.min([errors(torch.full_like(full, r)) for r in torch.linspace(1, 0.5, 12).tolist()], axis=0)
    np.testing.assert_allclose(errors(found), best, rtol=1e-3, atol=1e-9)
    assert torch.all((found >= 0.5) & (found <= 1))


def test_search_refuses_bad_arguments():
    with pytest.raises(ValueError, match="needs a Hessian"):
        search_clipping(torch.ones(2, 2), QuantScheme(), SearchSettings("output"))
    with pytest.raises(ValueError, match="symmetric"):
        search_clipping(torch.ones(2, 2), QuantScheme(symmetric=False))
    with pytest.raises(ValueError, match="objective"):
        SearchSettings("mse")
    with pytest.raises(ValueError, match="smallest"):
        SearchSettings(smallest=0)
