"""The sentences of README.md and docs/ on accuracy, quantizing and the baselines, against the committed records.

{} stands for each figure. A sentence that was worded anew has to be worded anew here, too.
"""

from __future__ import annotations

import math
import statistics
from functools import cache

import pytest
from helpers.published import PROJECT, Sentence, record

from odyssey.accuracy.items import read_items
from odyssey.accuracy.statistics import PairedComparison, compare_accuracy


def quantizing() -> list[float]:
    found = [
        record(f"{cell}/record.json")
        for cell in (
            "cpu/testbed-28m/odyssey-cd17d99bd987",
            "h100/testbed-28m/odyssey-f5594e5eb665",
            "h100/testbed-28m/odyssey-32883522f346",
        )
    ]
    seconds = [each["quantization"]["seconds"] for each in found]
    memory = [
        each["memory"]["peak_cuda_bytes" if number else "peak_rss_bytes"] / 1e9 for number, each in enumerate(found)
    ]
    perplexity = [each["accuracy"]["perplexity"]["file"]["value"] for each in found]
    return [seconds[0], memory[0], seconds[1], memory[1], perplexity[1], seconds[2], memory[2], perplexity[2]]


SEEDS = {
    "odyssey": (
        "odyssey-cd17d99bd987",
        "odyssey-cfc07c930582",
        "odyssey-fa2ece257936",
        "odyssey-347b8c05beb0",
        "odyssey-0c0ff908dcda",
    ),
    "gptq": (
        "gptq-7a6f5dd32339",
        "gptq-e8417f99a53c",
        "gptq-38743e133a14",
        "gptq-bde9f1afbd46",
        "gptq-cc523499f76a",
    ),
}


def of_seeds(method: str) -> list[float]:
    """Perplexities of seeds 0 to 4."""
    records = [record(f"cpu/testbed-28m/{cell}/record.json") for cell in SEEDS[method]]
    assert [each["seeds"] for each in records] == [{"seed": seed, "calibration": seed} for seed in range(5)]
    return [each["accuracy"]["perplexity"]["file"]["value"] for each in records]


def over_seeds() -> list[float]:
    return [figure(of_seeds(method)) for method in SEEDS for figure in (statistics.mean, statistics.stdev)]


def sizes() -> list[float]:
    ours, full = (record(f"cpu/testbed-28m/{name}/record.json")["size"] for name in (
        "odyssey-cd17d99bd987", "fp16-1ef72c4106bb",
    ))  # fmt: skip
    return [ours["bits_per_weight"], ours["disk_bytes"] / 1e6, full["disk_bytes"] / 1e6]


TASKS = {
    "testbed-28m": ("h100/testbed-28m-tasks", "fp16-633fec0a2bfe", "rtn-bdf1033971d4", "odyssey-a6a04caced97"),
    "stories260k": ("h100/stories260k-tasks", "fp16-4abe7b7fd39a", "rtn-1595166864b4", "odyssey-933703ccf43d"),
}


@cache
def against_fp16(model: str) -> dict[tuple[str, str], PairedComparison]:
    """RTN and OdysseyLLM against FP16, by method and task."""
    folder, *cells = TASKS[model]
    items = {}
    for cell in cells:
        tasks = record(f"{folder}/{cell}/record.json")["accuracy"]["tasks"]
        for task, result in tasks.items():
            found = read_items(PROJECT / "results" / folder / cell, result)
            items[cell.partition("-")[0], task] = found, result["metric"]
    return {
        (method, task): compare_accuracy(items["fp16", task][0], found, metric)
        for (method, task), (found, metric) in items.items()
        if method != "fp16"
    }


def most_flips(model: str) -> list[float]:
    """Percent of changed answers in the task with most, RTN's and OdysseyLLM's."""
    found = against_fp16(model)
    return [
        100 * max(each.flips for (name, _), each in found.items() if name == method) for method in ("rtn", "odyssey")
    ]


def outside_noise(model: str) -> set[tuple[str, str]]:
    return {cell for cell, each in against_fp16(model).items() if not each.within_noise}


def items_of_testbed() -> list[float]:
    return [sum(each.items for (method, _), each in against_fp16("testbed-28m").items() if method == "rtn")]


def below_fp16() -> list[float]:
    found = against_fp16("stories260k")
    return [-100 * found["odyssey", task].difference for task in ("mmlu", "lambada_openai")]


def compared(name: str) -> list[dict]:
    """The rows of a comparison with another library (results/reference)."""
    return [each for each in record("reference/report.json")["rows"] if each["comparison"] == name]


def other_libraries() -> list[float]:
    """The largest difference of a perplexity, percent rounded up."""
    found = [abs(each["relative difference"]) for each in compared("Perplexity on the first 24 windows")]
    return [math.ceil(1e4 * max(found)) / 100]


def auto_gptq() -> list[float]:
    return [100 * min(each["equal integers"] for each in compared("GPTQ: auto-gptq, same grid"))]


def divisor_7() -> list[float]:
    found = [each["ratio"] for each in compared("GPTQ: auto-gptq, divisor 7 (full_range=false) and 7.5")]
    return [100 * (min(found) - 1), 100 * (max(found) - 1)]


README, BASELINES = "README.md", "docs/baselines.md"
SENTENCES = {
    "over seeds": Sentence(
        README, "OdysseyLLM has {} with a standard deviation of {}, GPTQ {} with {} (`python", over_seeds
    ),
    "quantizing": Sentence(
        README,
        "Quantizing takes {} s and {} GB of memory on one CPU thread, with the same settings {} s and {} GB of GPU "
        "memory on an H100 (perplexity {}), and with 128 x 2048 calibration tokens {} s and {} GB there ({};",
        quantizing,
    ),
    "items": Sentence(README, "MMLU; {},{} items,", lambda: divmod(items_of_testbed()[0], 1000)),
    "flips": Sentence(
        README,
        "RTN changes up to {} % of the answers of a task and OdysseyLLM up to {} %.",
        lambda: most_flips("testbed-28m"),
    ),
    "flips, stories260k": Sentence(
        README,
        "RTN changes up to {} % of the answers of a task, OdysseyLLM up to {} %.",
        lambda: most_flips("stories260k"),
    ),
    "below FP16": Sentence(
        README, "OdysseyLLM's MMLU and LAMBADA are {} and {} points below FP16's, outside the noise,", below_fp16
    ),
    "other libraries": Sentence(README, "integers, scales, and perplexities within {} %)", other_libraries),
    "auto-gptq": Sentence(
        BASELINES, "the integers are the same, all of them in nearly every layer, {} % in the worst", auto_gptq
    ),
    "divisor 7": Sentence(BASELINES, "with {} to {} % more squared output error of a layer", divisor_7),
    "sizes": Sentence(README, "{} bits per weight, {} MB in place of {} MB.", sizes),
}


def test_what_is_said_of_the_seeds():
    ours, gptq = of_seeds("odyssey"), of_seeds("gptq")
    assert sum(mine < other for mine, other in zip(ours, gptq, strict=True)) == 4
    assert sorted(ours).index(ours[0]) == 1
    assert max(gptq) == gptq[0]


@pytest.mark.parametrize("name", SENTENCES)
def test_every_figure_is_the_records(name):
    sentence = SENTENCES[name]
    assert sentence.problems((PROJECT / sentence.file).read_text()) == []


@pytest.mark.parametrize("name", SENTENCES)
def test_every_changed_figure_is_found(name):
    sentence = SENTENCES[name]
    assert all(map(sentence.problems, sentence.misprints((PROJECT / sentence.file).read_text())))


def test_which_accuracies_are_outside_the_noise():
    assert outside_noise("testbed-28m") == set()
    assert outside_noise("stories260k") == {("odyssey", "mmlu"), ("odyssey", "lambada_openai")}
