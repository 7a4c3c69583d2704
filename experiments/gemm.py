"""Tables of single matrix products from results of `python -m fastgemm.bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments import paper
from experiments.comparison import NOT_REPORTED, NOT_RUN
from experiments.measured import Measurement, short_commit
from experiments.not_run import NotRun
from experiments.style import kernel_name
from experiments.table import Column, Table

BASELINE = "cublas-fp16"
# Figure 7 compares kinds of W4A8 kernels on one product: those of mma.sync, then those of the device's best kernel.
KINDS = ("unfused", "grouped-sm80", "asymmetric-sm80", "fastgemm-sm80", "grouped", "asymmetric", "fastgemm")
# The paper's phases by the tokens of their products: it decodes one token and reads 1024.
STAGE_TOKENS = dict(zip(paper.STAGES, (1024, 1), strict=True))
# The phase of the paper's figure 7.
SELF_DECODING = paper.STAGES[1]


def gemm_title(document: dict) -> str:
    environment = document["environment"]
    day = str(environment.get("date", ""))[:10]
    return ", ".join(
        str(part)
        for part in (environment.get("gpu"), day, f"commit {short_commit(environment.get('git_commit'))}")
        if part
    )


def gemm_cells(document: dict, scale: float = 1.0) -> Iterator[tuple[dict, Measurement]]:
    """Every timed row with its time (microseconds times `scale`) as a measurement; one with a wrong result has none."""
    environment = document["environment"]
    for row in document["rows"]:
        if "time_us" not in row:
            continue
        yield (
            row,
            Measurement(
                model=row.get("model", ""),
                method=row["kernel"],
                format="",
                recipe=None,
                value=row["time_us"] * scale if row["correct"] else None,
                outcome="ok" if row["correct"] else "wrong result",
                device=environment["gpu"],
                commit=short_commit(environment.get("git_commit")),
                note=row.get("note") or None,
            ),
        )


def speedup_over_fp16(document: dict, row: dict) -> float | None:
    """A row's ratio to cuBLAS fp16; None where that has a wrong result, whose time means nothing."""
    size = [row[key] for key in ("n", "k", "m")]
    bases = [each for each in document["rows"] if each["kernel"] == BASELINE]
    wrong = any(not each.get("correct", True) for each in bases if [each[key] for key in ("n", "k", "m")] == size)
    return None if wrong else row.get("speedup_over_fp16")


def gemm_table(document: dict) -> Table:
    """One row per size, number of tokens and kernel.

    GB/s and TOP/s count each operand once; ratio: time of cuBLAS fp16 on the same size over the kernel's; spread:
    interquartile range over median; error: relative, against float64.
    """
    columns = (
        Column("n_x_k", "N x K"),
        Column("m", "M", "{:d}"),
        Column("kernel", "kernel"),
        Column("time_us", "time µs", "{:.2f}"),
        Column("spread", "spread", "{:.1%}"),
        Column("speedup_over_fp16", "vs fp16", "{:.2f}x"),
        Column("gb_per_s", "GB/s", "{:.0f}"),
        Column("tops", "TOP/s", "{:.1f}"),
        Column("share_of_limit", "of limit", "{:.1%}"),
        Column("relative_error", "error", "{:.1e}"),
        Column("correct", "correct"),
        Column("note", "note"),
    )
    rows = []
    for row in document["rows"]:
        correct = None if "correct" not in row else "yes" if row["correct"] else "WRONG"
        rows.append(
            (
                f"{row['n']} x {row['k']}",
                row["m"],
                kernel_name(row["kernel"]),
                row.get("time_us"),
                row.get("spread"),
                speedup_over_fp16(document, row),
                *(row.get(column.key) for column in columns[6:10]),
                correct,
                row.get("unavailable"),
            )
        )
    environment = document["environment"]
    notes = [
        f"W4A8 and other products Y[M, N] = X[M, K] W[N, K]^T on {gemm_title(document)}; medians of "
        f"{document.get('settings', {}).get('rounds', '?')} interleaved rounds of CUDA graphs, weights not in L2."
    ]
    if environment.get("read_bandwidth_gb_per_s"):
        notes.append(
            f"of limit: the larger of bytes at the measured {environment['read_bandwidth_gb_per_s']:.0f} GB/s and "
            "operations at the stated rate, over the time."
        )
    kernels = {row["kernel"]: row["note"] for row in document["rows"] if row.get("note")}
    notes += [f"{kernel_name(kernel)}: {note}." for kernel, note in kernels.items()]
    return Table("gemm", f"Matrix products, {gemm_title(document)}", columns, tuple(rows), tuple(notes))


def gemm_kinds(document: dict) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds by phase, size and kind: first self-decoding (one token), then context decoding (1024). Correct
    results only, and sizes with a kind to compare FastGEMM with."""
    stages = {tokens: stage for stage, tokens in STAGE_TOKENS.items()}
    found: dict[str, dict[str, dict[str, float]]] = {stages[tokens]: {} for tokens in sorted(stages)}
    for row, measurement in gemm_cells(document):
        if row["m"] in stages and row["kernel"] in KINDS and measurement.value is not None:
            size = found[stages[row["m"]]].setdefault(f"{row['n']} x {row['k']}", {})
            size[row["kernel"]] = measurement.value
    return {
        stage: {size: kinds for size, kinds in sizes.items() if set(kinds) - {"fastgemm", "fastgemm-sm80"}}
        for stage, sizes in found.items()
    }


def over_fastgemm(kinds: dict[str, float]) -> dict[str, float]:
    """Times over FastGEMM's on the same kernel, mma.sync's or the device's best, or over the other where that was not
    measured; in the order of KINDS, nothing without FastGEMM."""
    best, mma_sync = kinds.get("fastgemm"), kinds.get("fastgemm-sm80")
    if not (best or mma_sync):
        return {}
    bases = {kernel: mma_sync or best if kernel.endswith("-sm80") else best or mma_sync for kernel in KINDS}
    return {kernel: kinds[kernel] / bases[kernel] for kernel in KINDS if kernel in kinds}


def _in_paper(kernel: str) -> str:
    """The paper's kind: it has one FastGEMM and one of each kernel that is compared with it."""
    return kernel if kernel.startswith("fastgemm") else kernel.removesuffix("-sm80")


def stage_label(stage: str) -> str:
    return f"{stage} (M = {STAGE_TOKENS[stage]})"


def figure7_table(documents: Sequence[dict], not_run: NotRun | None = None) -> Table:
    """The paper's figure 7 as a table: microseconds, and the ratio to the per-channel symmetric kernel.

    Measured ratios are to FastGEMM on the same kernel, mma.sync's or the device's best: the kinds share its main loop.
    """
    columns = (
        Column("stage", "phase"),
        Column("size", "size"),
        Column("kernel", "kernel"),
        Column("measured_us", "measured µs", "{:.2f}", absent=NOT_RUN, explained=True),
        Column("measured_ratio", "ratio", "{:.2f}"),
        Column("paper_us", "paper µs", "{:.0f}", absent=NOT_REPORTED),
        Column("paper_ratio", "paper ratio", "{:.2f}"),
        Column("difference", "difference of ratios", "{:+.2f}"),
        Column("device", "device"),
        Column("commit", "commit"),
    )
    reported = {kernel: figure.value / 1e3 for (kernel,), figure in paper.reported(paper.GEMM_KINDS).items()}
    ratios = over_fastgemm(reported)
    rows = []
    for document in documents:
        device, commit = document["environment"]["gpu"], short_commit(document["environment"].get("git_commit"))
        for stage, sizes in gemm_kinds(document).items():
            for size, kinds in sizes.items():
                measured = over_fastgemm(kinds)
                for kernel in (kernel for kernel in KINDS if kernel in kinds):
                    ratio = measured.get(kernel)
                    ours = (stage_label(stage), size, kernel_name(kernel), kinds[kernel], ratio)
                    kind = _in_paper(kernel) if stage == SELF_DECODING else None
                    papers = (reported.get(kind), ratios.get(kind))
                    difference = None if None in (ratio, papers[1]) else ratio - papers[1]
                    rows.append((*ours, *papers, difference, device, commit))
    reasons = [()] * len(rows)
    measured = {
        _in_paper(kernel)
        for document in documents
        for kinds in gemm_kinds(document)[SELF_DECODING].values()
        for kernel in kinds
    }
    for kernel, value in reported.items():
        if kernel in measured:
            continue
        cell = (stage_label(SELF_DECODING), None, kernel_name(kernel))
        rows.append((*cell, None, None, value, ratios[kernel], None, None, None))
        found = not_run.product(kernel, "figure7_gemm_kinds") if not_run else ()
        reasons.append(tuple(reason.text for reason in found))
    notes = (
        "The paper shows self-decoding; its size is not known and its GPU is an A100: compare the ratios.",
        f"Source of the paper's asymmetric kernel: {paper.reported(paper.GEMM_KINDS)['asymmetric',].source}.",
    )
    title = "Kinds of W4A8 GEMM (the paper's figure 7)"
    return Table("figure7_gemm_kinds", title, columns, tuple(rows), notes, tuple(reasons) if any(reasons) else ())
