"""Figures of the paper, typed here once more, and what must hold between them."""

import pytest

from experiments import paper


@pytest.mark.parametrize(
    ("quantity", "key", "value", "unit", "source"),
    [
        (paper.LAMBADA, ("llama-7b", "fp16"), 73.74, "%", "table 2"),
        (paper.LAMBADA, ("llama-7b", "awq"), 66.80, "%", "table 2"),
        (paper.LAMBADA, ("llama-65b", "gptq"), 78.77, "%", "table 2"),
        (paper.LAMBADA, ("llama2-7b", "odyssey"), 70.81, "%", "table 2"),
        (paper.LAMBADA, ("llama2-70b", "smoothquant"), 78.71, "%", "table 2"),
        (paper.WIKITEXT2, ("llama-7b", "fp16"), 5.73, "", "table 2"),
        (paper.WIKITEXT2, ("llama-13b", "smoothquant"), 5.21, "", "table 2"),
        (paper.WIKITEXT2, ("llama-65b", "odyssey"), 3.92, "", "table 2"),
        (paper.COMMONSENSE, ("llama-13b", "fp16", "WinoGrande"), 0.7277, "", "table 3"),
        (paper.COMMONSENSE, ("llama-13b", "smoothquant", "HellaSwag"), 0.7836, "", "table 3"),
        (paper.COMMONSENSE, ("llama2-70b", "odyssey", "average"), 0.8099, "", "table 3"),
        (paper.LATENCY, ("llama2-7b", "trtllm-fp16"), 1411, "ms", "table 4"),
        (paper.LATENCY, ("llama2-13b", "odyssey"), 1139, "ms", "table 4"),
        (paper.LATENCY, ("llama2-70b", "trtllm-w8a8"), 3087, "ms", "table 4"),
        (paper.LATENCY, ("llama2-13b", "odyssey over trtllm-fp16"), 2.23, "x", "table 4"),
        (paper.LATENCY, ("llama2-70b", "odyssey over trtllm-w8a8"), 1.36, "x", "table 4"),
        (paper.ENGINE_SPEEDUP, ("llama2-13b",), 2.15, "x", "figure 6"),
        (paper.QUIK_GEMM, ("context decoding", "quik-w4a4"), 0.139, "ms", "table 5"),
        (paper.QUIK_GEMM, ("self-decoding", "fastgemm"), 0.012, "ms", "table 5"),
        (paper.QUIK_GEMM, ("self-decoding", "fastgemm over quik-w4a4"), 4.33, "x", "table 5"),
        (paper.GEMM_KINDS, ("grouped",), 264000, "ns", "figure 7"),
        (paper.GEMM_KINDS, ("fastgemm",), 87000, "ns", "figure 7"),
        (paper.ABLATION, ("llama-7b", "LWC"), 6.25, "", "table 6"),
        (paper.ABLATION, ("llama2-7b", "LWC + GPTQ"), 6.11, "", "table 6"),
    ],
)
def test_figures(quantity, key, value, unit, source):
    figure = paper.reported(quantity)[key]
    assert (figure.value, figure.unit, figure.source) == (value, unit, source)


def test_how_many_cells_each_table_has():
    counts = {
        quantity: len(paper.reported(quantity))
        for quantity in (paper.LAMBADA, paper.WIKITEXT2, paper.COMMONSENSE, paper.LATENCY, paper.ENGINE_SPEEDUP,
                         paper.QUIK_GEMM, paper.GEMM_KINDS, paper.ABLATION)
    }  # fmt: skip
    assert list(counts.values()) == [30, 9, 30, 15, 3, 6, 3, 6]
    # Keys are unique, so nothing was overwritten.
    assert sum(counts.values()) == len(paper.REPORTED)


def test_cells_that_are_not_available_are_absent():
    perplexity = paper.reported(paper.WIKITEXT2)
    assert not [key for key in perplexity if key[0].startswith("llama2") or key[1] in ("awq", "gptq", "rtn")]


def test_printed_ratios_and_averages_follow_from_the_figures():
    latency = paper.reported(paper.LATENCY)
    for model in ("llama2-7b", "llama2-13b", "llama2-70b"):
        for engine in ("trtllm-fp16", "trtllm-w8a8"):
            ratio = latency[model, engine].value / latency[model, "odyssey"].value
            # The paper cuts digits off as often as it rounds.
            assert ratio == pytest.approx(latency[model, f"odyssey over {engine}"].value, abs=0.02)
    accuracy = paper.reported(paper.COMMONSENSE)
    for model, method in {key[:2] for key in accuracy}:
        tasks = [accuracy[model, method, task].value for task in ("WinoGrande", "PIQA", "HellaSwag", "ARC-e")]
        assert sum(tasks) / 4 == pytest.approx(accuracy[model, method, "average"].value, abs=1.01e-4)


def test_ablation_ends_at_the_recipe():
    assert (
        paper.reported(paper.ABLATION)["llama-7b", "LWC + GPTQ"].value
        == paper.reported(paper.WIKITEXT2)["llama-7b", "odyssey"].value
    )
