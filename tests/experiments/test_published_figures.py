"""The tables of README.md and of docs/ that give measured figures against the committed records, cell by cell.

A figure has to be that of the record at the precision in which it is printed; ratios are recomputed from unrounded
values of one record. Which record a row is from stands here, as in the text beside the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from helpers.published import NUMBER, PROJECT, Cells, Table, products, record

# Products: the record of a number of tokens (README, "FastGEMM, one product on an H100").
DECODE, PREFILL = "h100/gemm/2026-11-23-decode.json", "h100/gemm/2026-11-23-prefill.json"
KINDS = "h100/gemm/2026-11-23-kinds.json"
GEMM_RECORDS = {1: DECODE, 16: DECODE, 64: DECODE, 128: DECODE, 256: DECODE, 1024: PREFILL, 4096: PREFILL}
SHAPES = {
    "57344 x 8192": "70B gate+up", "8192 x 28672": "70B down", "22016 x 4096": "7B gate+up", "4096 x 4096": "7B o",
}  # fmt: skip
PEERS = ("cutlass-w8a8", "humming")
# End to end: the model and the records of a row, by the model's name in the table and the batch.
H100, H200 = "h100/end_to_end/2026-11-23-{}.json", "h200/end_to_end/2026-11-23-{}.json"
MODELS = {
    "7B": "llama2-7b", "13B": "llama2-13b", "70B": "llama2-70b", "70B, H200": "llama2-70b",
    "Llama-3-8B": "llama3-8b", "Qwen2.5-7B": "qwen2.5-7b",
}  # fmt: skip
END_TO_END_RECORDS = {
    **{("7B", batch): [H100.format("llama2-7b")] for batch in (1, 4, 16, 32, 64)},
    **{("13B", batch): [H100.format("llama2-13b")] for batch in (1, 4, 16, 32)},
    ("13B", 64): [H100.format("llama2-13b-batch-64"), H100.format("llama2-13b-batch-64-fp16")],
    ("70B", 1): [H100.format("llama2-70b-batch-1")],
    **{("70B", batch): [H100.format("llama2-70b")] for batch in (4, 16)},
    **{("70B, H200", batch): [H200.format("llama2-70b")] for batch in (1, 4, 16)},
    **{("Llama-3-8B", batch): [H100.format("llama3-8b")] for batch in (1, 16, 64)},
    **{("Qwen2.5-7B", batch): [H100.format("qwen2.5-7b")] for batch in (1, 16, 64)},
}
METHODS = ("fp16", "w8a8", "w4a16-g128", "w4a8")
# docs/fastgemm.md: the kinds of figure 7 and what each is held against; the measured times beside the limits.
KIND_ROWS = {
    "a scale per group of 128, Hopper": ("grouped", "fastgemm"),
    "a scale per group of 128, mma.sync": ("grouped-sm80", "fastgemm-sm80"),
    "a zero point per channel, Hopper": ("asymmetric", "fastgemm"),
    "a zero point per channel, mma.sync": ("asymmetric-sm80", "fastgemm-sm80"),
    "unpacking in a kernel of its own": ("unfused", "fastgemm"),
}
BOTH, ALONE = "{} µs, ready {} µs", "{} µs in turns, {} µs alone"
REGIMES = {
    "57344 x 8192, 1": (BOTH, DECODE, "device memory ({}, {} TB/s)"),
    "8192 x 28672, 1": (BOTH, DECODE, "device memory ({}, {} TB/s)"),
    "22016 x 4096, 1": (BOTH, DECODE, "device memory, launch"),
    "12288 x 4096, 1": ("{} µs", KINDS, "device memory, launch"),
    "4096 x 11008, 1": ("{} µs", KINDS, "96 CTAs of the best plan: latency of requests"),
    "4096 x 4096, 1": (BOTH, DECODE, "latency of launch, load, reduction"),
    "57344 x 8192, 64": (BOTH, DECODE, "device memory ({}, {} TB/s)"),
    "57344 x 8192, 256": (BOTH, DECODE, "tensor cores, 3.39 waves"),
    "57344 x 8192, 4096": (ALONE, PREFILL, "power (700 W)"),
}
# The recipe: the records of W4A8 and W3A8, and those of each method without and with outliers.
RECIPE = {
    "FP16 (computed in float32)": ("fp16-1ef72c4106bb", "fp16-1ef72c4106bb"),
    "vanilla (round to nearest)": ("rtn-eb53a29b8dac", "rtn-6cad67907942"),
    "+ LWC": ("odyssey-ab70493ae20a", "odyssey-ba2a8065df1f"),
    "+ LWC + GPTQ (OdysseyLLM)": ("odyssey-cd17d99bd987", "odyssey-919f9db03a4a"),
}
TESTBED = {
    ("FP16", "W16A16"): ("fp16-1ef72c4106bb", "fp16-ce18452236b4"),
    ("RTN", "W8A8"): ("rtn-89356f0a85d4", "rtn-86685fec17bf"),
    ("SmoothQuant", "W8A8"): ("smoothquant-3e997632f902", "smoothquant-8971bf1b7c09"),
    ("RTN", "W4A16-g128"): ("rtn-309937528e59", "rtn-e37a21973707"),
    ("AWQ", "W4A16-g128"): ("awq-4a1d0d49c726", "awq-3d00f4b28393"),
    ("GPTQ", "W4A16-g128"): ("gptq-7a6f5dd32339", "gptq-445cb2064acb"),
    ("RTN", "W4A8"): ("rtn-eb53a29b8dac", "rtn-d8d8137974f5"),
    ("OdysseyLLM", "W4A8"): ("odyssey-cd17d99bd987", "odyssey-0a679132d805"),
}
# docs/baselines.md: those, in its order, and two that it has beside them.
BASELINES = {key: TESTBED[key] for key in (
    ("FP16", "W16A16"), ("RTN", "W8A8"), ("SmoothQuant", "W8A8"), ("RTN", "W4A8"), ("OdysseyLLM", "W4A8"),
    ("RTN", "W4A16-g128"),
)} | {
    ("RTN, asymmetric", "W4A16-g128"): ("rtn-34b184681cd3", "rtn-68d6dffef48f"),
    ("GPTQ", "W4A16-g128"): TESTBED["GPTQ", "W4A16-g128"],
    ("GPTQ, `full_range=false`", "W4A16-g128"): ("gptq-a1c59da4577e", "gptq-d9617fe87572"),
    ("AWQ", "W4A16-g128"): TESTBED["AWQ", "W4A16-g128"],
}  # fmt: skip


def one_product(size: str, tokens: str) -> Cells:
    size, tokens = size.partition(" (")[0], int(tokens)
    rows = products(GEMM_RECORDS[tokens])
    time = {kernel: rows[size, tokens, kernel]["time_us"] for kernel in ("cublas-fp16", "w8a8", *PEERS, "fastgemm")}
    yield from (("{}", [each]) for each in time.values())
    best = min(time[peer] for peer in PEERS)
    yield from (("{}x", [other / time["fastgemm"]]) for other in (time["cublas-fp16"], time["w8a8"], best))


def one_product_alone(size: str, tokens: str) -> Cells:
    rows, kernels = products(PREFILL), ("cublas-fp16", "w8a8", *PEERS, "fastgemm")
    time = {kernel: rows[size, int(tokens), kernel]["sustained_us"] for kernel in kernels}
    yield from (("{}", [each]) for each in time.values())
    yield "{}x", [time["cublas-fp16"] / time["fastgemm"]]
    yield "{}x", [time["cutlass-w8a8"] / time["w8a8"]]
    yield "{}x", [min(time[peer] for peer in PEERS) / time["fastgemm"]]


def end_to_end(model: str, batch: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """A row's methods that were timed, all in one record, and those that were not, by method."""
    timed, refused = {}, {}
    for name in END_TO_END_RECORDS[model, int(batch)]:
        for row in record(name)["rows"]:
            size = (row["model"], row["batch_size"], row["input_len"], row["output_len"])
            if size != (MODELS[model], int(batch), 1024, 128):
                continue
            (timed if row["outcome"] == "ok" else refused)[row["method"]] = row | {"record": name}
    assert len({row["record"] for row in timed.values()}) == 1, "methods of different records took no turns"
    return timed, refused


def methods(model: str, batch: str) -> Cells:
    timed, refused = end_to_end(model, batch)
    for method in METHODS:
        if method in timed:
            row = timed[method]
            yield "{} ({} + {})", [row["total_ms"], row["prefill_ms"], row["decode_ms_per_token"]]
        elif method in refused:
            yield "needs {} GiB", [float(re.match(r"predicted ([\d.]+) GiB", refused[method]["reason"])[1])]
        else:
            yield "", []


def over_floor(model: str, batch: str) -> tuple[str, Sequence[float]]:
    row = end_to_end(model, batch)[0]["w4a8"]
    return "{}x", [row["total_ms"] / row["floor_ms"]]


def readme_end_to_end(model: str, batch: str) -> Cells:
    timed, _ = end_to_end(model, batch)
    yield from methods(model, batch)
    for method in ("fp16", "w8a8"):
        yield (("{}x", [timed[method]["total_ms"] / timed["w4a8"]["total_ms"]]) if method in timed else ("", []))
    yield over_floor(model, batch)


def engine_end_to_end(model: str, batch: str) -> Cells:
    yield from methods(model, batch)
    yield over_floor(model, batch)


def perplexity(cell: str, model: str = "testbed-28m") -> float:
    (found,) = record(f"cpu/{model}/{cell}/record.json")["accuracy"]["perplexity"].values()
    return found["value"]


def recipe(name: str) -> Cells:
    full, vanilla = (RECIPE[each] for each in list(RECIPE)[:2])
    for column, cell in enumerate(RECIPE[name]):
        lost = perplexity(vanilla[column]) - perplexity(full[column])
        won = 100 * (perplexity(vanilla[column]) - perplexity(cell)) / lost
        yield "{}", [perplexity(cell)]
        yield ("", []) if cell == full[column] else ("{} %", [won])


def methods_of_testbed(method: str, label: str) -> Cells:
    plain, outliers = TESTBED[method, label]
    found = record(f"cpu/testbed-28m/{plain}/record.json")
    assert found["method"]["label"] == label
    yield "{}", [found["size"]["bits_per_weight"]]
    yield "{}", [perplexity(plain)]
    yield "{}", [perplexity(outliers, "testbed-28m-outliers")]


def baselines(method: str, label: str) -> Cells:
    cells, full_precision = BASELINES[method, label], BASELINES["FP16", "W16A16"]
    found = record(f"cpu/testbed-28m/{cells[0]}/record.json")
    assert found["method"]["label"] == label
    for column, model in enumerate(("testbed-28m", "testbed-28m-outliers")):
        found_here, full = (perplexity(each[column], model) for each in (cells, full_precision))
        yield "{}", [found_here]
        yield "+{} %", [100 * (found_here / full - 1)]
    yield "{}", [found["size"]["bits_per_weight"]]
    yield "{}", [found["size"]["disk_bytes"] / 1e6]
    yield ("", []) if method == "FP16" else ("{}", [found["quantization"]["seconds"]])
    yield "{}", [found["memory"]["peak_rss_bytes"] / 1e6]


def over_base(kernel: str, base: str, tokens: Sequence[int]) -> list[float]:
    """Times over those of `base` at these numbers of tokens, all sizes of the record of kinds."""
    times = products(KINDS)
    return [
        row["time_us"] / times[size, m, base]["time_us"]
        for (size, m, each), row in times.items()
        if each == kernel and m in tokens
    ]


def kinds(name: str) -> Cells:
    for tokens in ((1, 16, 64), (256, 1024, 4096)):
        found = over_base(*KIND_ROWS[name], tokens)
        yield "{} to {}", [min(found), max(found)]


def regimes(name: str) -> Cells:
    measured, name_of_record, bound = REGIMES[name]
    size, tokens = name.split(", ")
    n, k = map(int, size.split(" x "))
    rows, m = products(name_of_record), int(tokens)
    yield "{} µs", [n * k / 2 / 3.11e6]
    yield "{} µs", [2 * m * n * k / 1.7e9]
    first, ready = rows[size, m, "fastgemm"], rows.get((size, m, "fastgemm-ready"), {})
    second = first["sustained_us"] if "alone" in measured else ready.get("time_us")
    yield measured, [first["time_us"], second][: measured.count("{}")]
    yield bound, [row["gb_per_s"] / 1e3 for row in (first, ready)[: bound.count("{}")]]


TABLES = {
    "products": Table(
        "README.md",
        "| N x K | M | cuBLAS fp16 | W8A8 | CUTLASS W8A8, tuned | humming W4A8 | FastGEMM W4A8 | over fp16 | over W8A8",
        tuple((f"{size} ({layer})", str(tokens)) for size, layer in SHAPES.items() for tokens in GEMM_RECORDS),
        one_product,
    ),
    "products alone": Table(
        "README.md",
        "| N x K | M | cuBLAS fp16 | W8A8 | CUTLASS W8A8, tuned | humming W4A8 | FastGEMM W4A8 | over fp16 | W8A8 over",
        tuple((size, tokens) for size in SHAPES for tokens in ("1024", "4096")),
        one_product_alone,
    ),
    "end to end": Table(
        "README.md",
        "| model | batch | FP16 |",
        tuple((model, str(batch)) for model, batch in END_TO_END_RECORDS),
        readme_end_to_end,
    ),
    "end to end in engine.md": Table(
        "docs/engine.md",
        "| | batch | FP16 |",
        tuple((model, str(batch)) for model, batch in END_TO_END_RECORDS),
        engine_end_to_end,
    ),
    "kinds": Table("docs/fastgemm.md", "| | M = 1, 16, 64 |", tuple((name,) for name in KIND_ROWS), kinds),
    "regimes": Table("docs/fastgemm.md", "| shape, M | weight bytes", tuple((name,) for name in REGIMES), regimes),
    "recipe": Table("README.md", "| recipe | W4A8 |", tuple((name,) for name in RECIPE), recipe),
    "testbed": Table("README.md", "| method | format | bits/weight |", tuple(TESTBED), methods_of_testbed),
    "baselines": Table(
        "docs/baselines.md", "| method | format | perplexity | from FP16 |", tuple(BASELINES), baselines
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_is_the_records(name):
    table = TABLES[name]
    assert table.problems((PROJECT / table.file).read_text()) == []


@pytest.mark.parametrize("name", TABLES)
def test_every_changed_figure_is_found(name):
    """Each number of each row, one after the other, in a copy: its last digit is another."""
    table = TABLES[name]
    text = (PROJECT / table.file).read_text()
    lines, changed = text.splitlines(), 0
    for number in table.lines(text):
        for figure in NUMBER.finditer(lines[number]):
            last = figure.end() - 1
            digit = str((int(lines[number][last]) + 1) % 10)
            copy = lines[number][:last] + digit + lines[number][last + 1 :]
            assert table.problems("\n".join([*lines[:number], copy, *lines[number + 1 :]])), copy
            changed += 1
    assert changed > len(table.keys)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_without_a_record_and_a_missing_row_are_found(name):
    table = TABLES[name]
    text = (PROJECT / table.file).read_text()
    lines, last = text.splitlines(), table.lines(text)[-1]
    assert table.problems("\n".join([*lines[: last + 1], lines[last], *lines[last + 1 :]]))
    assert table.problems("\n".join([*lines[:last], *lines[last + 1 :]]))
