"""The distribution that tokens are drawn from, against Transformers' own filters and against frequencies."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from odyssey.engine.greedy import finish_step
from odyssey.engine.sampling import GREEDY, Sampling, choose, filtered_probabilities


def _logits(rows=4, vocabulary=97):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(2)) * 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 10, 97, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
def test_filtered_probabilities_are_transformers(temperature, top_k, top_p):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, _logits()).softmax(-1)
    actual = filtered_probabilities(_logits(), Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_draws_follow_the_distribution():
    count = 40000
    sampling = Sampling(temperature=1.0, top_k=6)
    probabilities = filtered_probabilities(_logits(1), sampling)[0]
    out = torch.empty(count, dtype=torch.int64)
    choose(_logits(1).expand(count, -1), sampling, out, torch.Generator().manual_seed(7))
    frequencies = torch.bincount(out, minlength=97) / count
    # Five standard deviations of a frequency.
    assert ((frequencies - probabilities).abs() <= 5 * (probabilities * (1 - probabilities) / count).sqrt()).all()


def test_greedy_takes_the_maximum():
    out = torch.empty(4, dtype=torch.int64)
    choose(_logits(), GREEDY, out)
    assert torch.equal(out, _logits().argmax(-1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("vocabulary", [5, 1024, 8192, 32000, 128256])
def test_the_end_of_a_greedy_step(vocabulary, device):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(4)).half().to(device)
    logits[1, vocabulary // 2 :] = logits[1].max()
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    lengths = torch.tensor([0, 7, 1000], dtype=torch.int32, device=device)
    finish_step(logits, tokens, lengths)
    assert torch.equal(tokens.cpu(), logits.float().cpu().argmax(-1))
    assert lengths.tolist() == [1, 8, 1001]


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_values_out_of_range_are_refused(values):
    (name,) = values
    with pytest.raises(ValueError, match=name):
        Sampling(**values)
