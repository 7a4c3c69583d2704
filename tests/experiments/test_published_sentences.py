"""The sentences of README.md and docs/ that give measured times, against the committed records and the paper.

{} stands for each figure. A sentence that was worded anew has to be worded anew here, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from helpers.published import PROJECT, Sentence, products, record

from experiments import paper

DECODE, PREFILL = "h100/gemm/2026-11-23-decode.json", "h100/gemm/2026-11-23-prefill.json"
ALL_TOKENS, KINDS = "h100/gemm/2026-11-23-all-tokens.json", "h100/gemm/2026-11-23-kinds.json"
END_TO_END = "h100/end_to_end/2026-11-23-{}.json"
SEVEN, THIRTEEN = END_TO_END.format("llama2-7b"), END_TO_END.format("llama2-13b")
PEERS, PEERS_13B = END_TO_END.format("llama2-7b-peers"), END_TO_END.format("llama2-13b-peers")
LATER = [END_TO_END.format(name) for name in ("llama3-8b", "qwen2.5-7b")]
SEVENTY, H200 = END_TO_END.format("llama2-70b-batch-1"), "h200/end_to_end/2026-11-23-llama2-70b.json"
PREFILL_FIRST = "h100/gemm/2026-11-23-prefill-first.json"
OLDER_KINDS = "h100/gemm/2026-11-22-kinds.json"


def ratios(name: str, kernel: str, *others: str, tokens: Iterable[int] | None = None, key="time_us") -> list[float]:
    """Time of the fastest of `others` over that of `kernel`, at each size and number of tokens of a record."""
    rows = products(name)
    return [
        min(rows[size, m, other][key] for other in others) / row[key]
        for (size, m, each), row in rows.items()
        if each == kernel and (tokens is None or m in tokens) and key in row
    ]


def over(name: str, kernel: str, base: str, tokens: Iterable[int] | None = None) -> list[float]:
    """Time of `kernel` over that of `base`."""
    return [1 / ratio for ratio in ratios(name, kernel, base, tokens=tokens)]


def percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def row(name: str, method: str, batch: int = 1) -> dict:
    (found,) = (each for each in record(name)["rows"] if (each["method"], each["batch_size"]) == (method, batch))
    return found


def total(name: str, method: str, batch: int = 1) -> float:
    return row(name, method, batch)["total_ms"]


def groups() -> tuple[list[float], list[float]]:
    """Total ms of W4A8 with groups of 128 on 7B at every batch, and their ratios to W4A8."""
    batches = (1, 4, 16, 32, 64)
    times = [total(SEVEN, "w4a8-g128", batch) for batch in batches]
    return times, [time / total(SEVEN, "w4a8", batch) for time, batch in zip(times, batches, strict=True)]


def in_turns_and_alone() -> list[float]:
    """Times as fast as fp16, and percent behind and ahead of the best peer: in turns, then each alone."""
    found = []
    for key in ("time_us", "sustained_us"):
        fp16 = ratios(PREFILL, "fastgemm", "cublas-fp16", key=key)
        best = ratios(PREFILL, "fastgemm", "cutlass-w8a8", "humming", key=key)
        found += [min(fp16), max(fp16), -percent(min(best)), percent(max(best))]
    return found


def first_run() -> list[float]:
    """Percent by which the ratios to fp16 of two runs differ at most."""
    earlier, later = products(PREFILL_FIRST), products(PREFILL)
    key, found = "speedup_over_fp16", [each for each in earlier if each[2] == "fastgemm"]
    return [max(abs(percent(earlier[each][key] / later[each][key])) for each in found)]


def all_tokens() -> list[float]:
    fp16 = ratios(ALL_TOKENS, "fastgemm", "cublas-fp16")
    return [min(fp16), max(fp16), percent(max(over(ALL_TOKENS, "fastgemm", "w8a8")))]


def best_peer() -> list[float]:
    found = ratios(DECODE, "fastgemm", "cutlass-w8a8", "humming")
    return [min(found), max(found)]


def our_w8a8() -> list[float]:
    found = [ratio for name in (DECODE, PREFILL) for ratio in ratios(name, "w8a8", "cutlass-w8a8")]
    return [-percent(min(found)), min(found), max(found)]


def ready() -> list[float]:
    gain, loss = (percent(max(over(DECODE, *pair))) for pair in itertools.permutations(("fastgemm", "fastgemm-ready")))
    one = products(DECODE)["22016 x 4096", 1, "fastgemm-ready"]
    return [gain, loss, one["time_us"], one["speedup_over_fp16"]]


def kinds() -> list[float]:
    few, many = over(KINDS, "grouped", "fastgemm", (1, 16, 64)), over(KINDS, "grouped", "fastgemm", (256, 1024, 4096))
    zero = over(KINDS, "asymmetric", "fastgemm")
    unfused = over(KINDS, "unfused", "fastgemm", (1,))
    return [*map(percent, (min(few), max(few), min(many), max(many), max(zero))), min(unfused), max(unfused)]


def transformers() -> list[float]:
    eager, compiled, ours = (total(PEERS, name) for name in (
        "transformers-fp16", "transformers-compiled-fp16", "w4a8",
    ))  # fmt: skip
    return [eager, eager / ours, ours, compiled, compiled / ours]


def transformers_13b() -> list[float]:
    return [total(PEERS_13B, "transformers-fp16"), *over_ours("transformers-fp16", PEERS_13B)]


def transformers_steps() -> list[float]:
    eager, ratio, _, compiled, compiled_ratio = transformers()
    steps = [row(PEERS, f"transformers-{name}fp16")["decode_ms_per_token"] for name in ("", "compiled-")]
    return [eager, steps[0], ratio, compiled, steps[1], compiled_ratio]


def over_ours(method: str, *names: str) -> list[float]:
    return [total(name, method) / total(name, "w4a8") for name in names]


def floor() -> list[float]:
    """Milliseconds a token and TB/s, TOP/s, TFLOP/s and milliseconds of a prefill, milliseconds in all."""
    ceilings, found = record(SEVEN)["ceilings"], row(SEVEN, "w4a8")["floor"]
    rates = [ceilings[key] / 1e12 for key in ("read_bytes_per_s", "int8_ops_per_s", "float_ops_per_s")]
    return [found["decode_ms_per_token"], *rates, found["prefill_ms"], found["total_ms"]]


def fp16_over_floor() -> list[float]:
    """Over the rows of the table end to end; and 7B at batch 1."""
    found = {}
    for name in (SEVEN, THIRTEEN, H200, *LATER):
        for each in record(name)["rows"]:
            if (each["method"], each["outcome"]) == ("fp16", "ok"):
                found[each["model"], each["batch_size"]] = each["total_ms"] / each["floor_ms"]
    return [min(found.values()), max(found.values()), found["llama2-7b", 1]]


def alone_at_4096() -> list[float]:
    rows, found = products(PREFILL), []
    sizes = ("57344 x 8192", "8192 x 28672", "22016 x 4096")
    for kernel in ("fastgemm", "cublas-fp16"):
        timed = [rows[size, 4096, kernel] for size in sizes]
        clocks = [each["sustained_clocks"]["sm_mhz"]["mean"] / 1e3 for each in timed]
        rates = [2e-9 * each["m"] * each["n"] * each["k"] / each["sustained_us"] for each in timed]
        clocks, rates = [min(clocks), max(clocks)], [min(rates), max(rates)]
        found += [*clocks, *rates] if kernel == "fastgemm" else [*rates, *clocks]
    over_fp16 = [
        rows[size, 4096, "cublas-fp16"]["sustained_us"] / rows[size, 4096, "fastgemm"]["sustained_us"] for size in sizes
    ]
    return [*found, min(over_fp16), max(over_fp16)]


def between_others_at_4096() -> list[float]:
    found = []
    for kernel in ("fastgemm", "cublas-fp16"):
        rates = [each["tops"] / 1e3 for (_, m, name), each in products(KINDS).items() if (m, name) == (4096, kernel)]
        found += [min(rates), max(rates)]
    return found


def company() -> list[float]:
    return [products(name)["57344 x 8192", 1024, "fastgemm"]["time_us"] for name in (OLDER_KINDS, PREFILL)]


def runs(transformers: bool) -> tuple[list[int], float]:
    """The numbers of runs of all rows of the engine or of Transformers, and percent by which the runs of one differ."""
    names = sorted(path.relative_to(PROJECT / "results") for path in PROJECT.glob("results/*/end_to_end/*.json"))
    samples = [
        each["samples"]["total_ms"]
        for name in names
        for each in record(str(name))["rows"]
        if each["outcome"] == "ok" and each["method"].startswith("transformers") == transformers
    ]
    return [len(each) for each in samples], max(percent(max(each) / min(each)) for each in samples)


def runs_of_the_engine() -> list[float]:
    counts, apart = runs(transformers=False)
    return [min(counts), max(counts), apart]


def runs_by_batch() -> list[float]:
    (few, many), apart = runs_of_the_engine()[:2], runs_of_the_engine()[2]
    counts = [len(row(SEVEN, "w4a8", batch)["samples"]["total_ms"]) for batch in (1, 4, 16)]
    return [few, many, *counts, apart, runs(transformers=True)[1]]


def reported(quantity: str, *keys: str) -> list[float]:
    """The paper's figures whose key ends with each of `keys` in turn, in the order of its models."""
    return [figure.value for key in keys for found, figure in paper.reported(quantity).items() if found[-1] == key]


def paper_ranges() -> list[float]:
    found = [reported(paper.LATENCY, f"odyssey over trtllm-{method}") for method in ("fp16", "w8a8")]
    return [limit for ratios in found for limit in (min(ratios), max(ratios))]


def paper_groups() -> list[float]:
    grouped, ours = reported(paper.GEMM_KINDS, "grouped", "fastgemm")
    return [grouped / ours]


README, ENGINE, FASTGEMM = "README.md", "docs/engine.md", "docs/fastgemm.md"
SENTENCES = {
    "all tokens": Sentence(
        README,
        "W4A8 is between {} and {} times as fast as cuBLAS fp16, and nowhere more than {} % behind our W8A8.",
        all_tokens,
    ),
    "peers": Sentence(README, "it beats every peer at every size ({} to {} times as fast)", best_peer),
    "prefill": Sentence(
        README,
        "at M = 1024 and 4096 W4A8 is, in turns, {} to {} times as fast as fp16 and between {} % behind and {} % ahead "
        "of the best peer, the tuned CUTLASS W8A8; alone {} to {} times as fast as fp16, {} % behind at one size and "
        "up to {} % ahead at the others.",
        in_turns_and_alone,
    ),
    "first run": Sentence(README, "has ratios to fp16 in turns that differ by up to {} %,", first_run),
    "our W8A8": Sentence(
        README, "is within {} % of the tuned CUTLASS at every size ({} to {} times its speed,", our_w8a8
    ),
    "weights_ready": Sentence(
        README,
        "decode gains up to {} % more, but 4096 x 4096 at M = 64 takes {} % longer; 22016 x 4096, M = 1: {} us, {}x.",
        ready,
    ),
    "kinds": Sentence(
        README,
        "a scale per group of 128 costs {} to {} % up to 64 tokens and {} to {} % from 256 on; a zero point per "
        "channel up to {} %; unpacking in a kernel of its own makes a token {} to {} times as expensive.",
        kinds,
    ),
    "groups": Sentence(
        README,
        "W4A8 with groups of 128 ({}, {}, {}, {}, {} ms for 7B) is {} to {} % slower than W4A8",
        lambda: [*groups()[0], percent(min(groups()[1])), percent(max(groups()[1]))],
    ),
    "groups, engine": Sentence(
        ENGINE,
        "{}, {}, {}, {}, {} ms for 7B at batches 1 to 64, {} to {} times W4A8.",
        lambda: [*groups()[0], min(groups()[1]), max(groups()[1])],
    ),
    "Transformers": Sentence(
        README,
        "Transformers takes {} ms for 7B fp16 at batch 1, {} times as long as W4A8 in the same run ({} ms there), and "
        "compiled with a static cache {} ms, {} times as long; for 13B it takes {} ms, {} times as long (",
        lambda: [*transformers(), *transformers_13b()],
    ),
    "Transformers, engine": Sentence(
        ENGINE,
        "Transformers fp16, 7B, batch 1: {} ms eagerly ({} ms a token), {} times W4A8 in the same run; compiled with a "
        "static cache {} ms ({} ms a token), {} times. 13B eagerly: {} ms, {} times.",
        lambda: [*transformers_steps(), *transformers_13b()],
    ),
    "over FP16": Sentence(
        ENGINE,
        "W4A8 over FP16 at batch 1: {}x (7B), {}x (13B), {}x (70B, one H200)",
        lambda: over_ours("fp16", SEVEN, THIRTEEN, H200),
    ),
    "over W8A8": Sentence(
        ENGINE,
        "Over W8A8: {}x, {}x, {}x (70B; {}x on an H200)",
        lambda: over_ours("w8a8", SEVEN, THIRTEEN, SEVENTY, H200),
    ),
    "floor": Sentence(
        ENGINE,
        "{} ms at {} TB/s; 1024 tokens at {} TOP/s (the best int8 product of that run) and {} TFLOP/s are {} ms; "
        "together {} ms for 1024 + 128.",
        floor,
    ),
    "FP16 over its floor": Sentence(
        ENGINE, "FP16 is {}x to {}x its own floor ({}x for 7B at batch 1).", fp16_over_floor
    ),
    "power": Sentence(
        FASTGEMM,
        "draw 700 W at {}-{} GHz and give {}-{} POP/s, cuBLAS fp16 {}-{} PFLOP/s at {}-{} GHz, a ratio of {}-{}.",
        alone_at_4096,
    ),
    "less power": Sentence(FASTGEMM, "W4A8 gives {}-{} POP/s and cuBLAS {}-{} PFLOP/s.", between_others_at_4096),
    "company": Sentence(
        FASTGEMM,
        "57344 x 8192, M = 1024 took {} us between kernels that draw little power (`2026-11-22-kinds.json`), and {} "
        "us,",
        company,
    ),
    "runs": Sentence(README, "Medians of {} to {} runs, which are at most {} % apart.", runs_of_the_engine),
    "runs, Transformers": Sentence(README, "(its runs are up to {} % apart)", lambda: [runs(transformers=True)[1]]),
    "runs, engine": Sentence(
        ENGINE,
        "Medians of {} to {} runs (7B: {} at batch 1, {} at 4, {} from 16 on), at most {} % apart, Transformers' up to "
        "{} %.",
        runs_by_batch,
    ),
    "paper": Sentence(
        README, "The paper reports {}x to {}x over FP16 and {}x to {}x over W8A8 at batch 1,", paper_ranges
    ),
    "paper's groups": Sentence(README, "The paper's figure 7 has {}x for groups at one token:", paper_groups),
    "paper, engine": Sentence(
        ENGINE,
        "the paper: {}x, {}x and {}x in its own engine on A100s.",
        lambda: reported(paper.ENGINE_SPEEDUP, "llama2-7b", "llama2-13b", "llama2-70b"),
    ),
    "paper over W8A8, engine": Sentence(
        ENGINE,
        "the paper: {}x, {}x, {}x over TensorRT-LLM's.",
        lambda: reported(paper.LATENCY, "odyssey over trtllm-w8a8"),
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_every_figure_is_the_records(name):
    sentence = SENTENCES[name]
    assert sentence.problems((PROJECT / sentence.file).read_text()) == []


@pytest.mark.parametrize("name", SENTENCES)
def test_every_changed_figure_is_found(name):
    sentence = SENTENCES[name]
    assert all(map(sentence.problems, sentence.misprints((PROJECT / sentence.file).read_text())))


def test_of_70b_only_two_methods_took_turns():
    """README and docs/engine.md say so; all other rows of the tables took turns with all methods beside them."""
    together = {}
    for path in PROJECT.glob("results/*/end_to_end/*.json"):
        rows = [each for each in record(str(path.relative_to(PROJECT / "results")))["rows"] if each["outcome"] == "ok"]
        for each in rows:
            same = {other["method"] for other in rows if other["batch_size"] == each["batch_size"]}
            found = together.setdefault((path.parts[-3], each["model"] == "llama2-70b"), set())
            found.add((each["method"], set(each["interleaved_with"]) == same, len(each["interleaved_with"])))
    assert all(turns for _, turns, _ in together["h100", False])
    assert {(method, count) for method, _, count in together["h100", True]} == {("w8a8", 1), ("w4a8", 1)}
    assert {(method, count) for method, _, count in together["h200", True]} == {("fp16", 1), ("w8a8", 2), ("w4a8", 2)}
