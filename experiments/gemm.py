"""Tables of single matrix products from results of `python -m fastgemm.bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments import paper
from experiments.comparison import NOT_REPORTED, NOT_RUN
from experiments.measured import Measurement, short_commit
from experiments.style import kernel_name
from experiments.table import Column, Table

BASELINE = "cublas-fp16"
# Figure 7 compares kinds of W4A8 kernels on one product; all four share the mma.sync kernel.
KINDS = ("unfused", "grouped", "asymmetric", "fastgemm-sm80", "fastgemm")
# Tokens of a product in each of the paper's phases: self-decoding, context decoding.
DECODE_TOKENS, PREFILL_TOKENS = 1, 1024


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
                *(row.get(column.key) for column in columns[3:10]),
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


def gemm_kinds(document: dict) -> dict[str, dict[str, float]]:
    """Microseconds by size and kind, sizes with at least two kinds, correct results only: first self-decoding (one
    token), then context decoding, whose sizes end in ", M = 1024"."""
    phases: dict[int, dict[str, dict[str, float]]] = {DECODE_TOKENS: {}, PREFILL_TOKENS: {}}
    for row, measurement in gemm_cells(document):
        if row["m"] in phases and row["kernel"] in KINDS and measurement.value is not None:
            size = f"{row['n']} x {row['k']}" + ("" if row["m"] == DECODE_TOKENS else f", M = {row['m']}")
            phases[row["m"]].setdefault(size, {})[row["kernel"]] = measurement.value
    sizes = {size: kinds for phase in phases.values() for size, kinds in phase.items()}
    return {size: kinds for size, kinds in sizes.items() if set(kinds) - {"fastgemm", "fastgemm-sm80"}}


def figure7_table(documents: Sequence[dict]) -> Table:
    """The paper's figure 7 as a table: microseconds, and the ratio to the per-channel symmetric kernel.

    Measured ratios are to FastGEMM on mma.sync where that was measured: the kinds share its main loop.
    """
    columns = (
        Column("size", "size"),
        Column("kernel", "kernel"),
        Column("measured_us", "measured µs", "{:.2f}", absent=NOT_RUN),
        Column("measured_ratio", "ratio", "{:.2f}"),
        Column("paper_us", "paper µs", "{:.0f}", absent=NOT_REPORTED),
        Column("paper_ratio", "paper ratio", "{:.2f}"),
        Column("difference", "difference of ratios", "{:+.2f}"),
        Column("device", "device"),
        Column("commit", "commit"),
    )
    reported = {kernel: figure.value / 1e3 for (kernel,), figure in paper.reported(paper.GEMM_KINDS).items()}
    ratios = {kernel: value / reported["fastgemm"] for kernel, value in reported.items()}
    rows = []
    for document in documents:
        environment = document["environment"]
        for size, kinds in gemm_kinds(document).items():
            base = "fastgemm-sm80" if "fastgemm-sm80" in kinds else "fastgemm"
            for kernel in (kernel for kernel in KINDS if kernel in kinds):
                ratio = kinds[kernel] / kinds[base] if base in kinds else None
                # The paper's figure is of self-decoding.
                paper_us, paper_ratio = (None, None) if ", M" in size else (reported.get(kernel), ratios.get(kernel))
                difference = None if ratio is None or paper_ratio is None else ratio - paper_ratio
                commit = short_commit(environment.get("git_commit"))
                rows.append(
                    (size, kernel_name(kernel), kinds[kernel], ratio, paper_us, paper_ratio, difference,
                     environment["gpu"], commit)
                )  # fmt: skip
    if not rows:
        for kernel, value in reported.items():
            rows.append((None, kernel_name(kernel), None, None, value, ratios[kernel], None, None, None))
    notes = (
        "Self-decoding, M = 1, unless the size says otherwise (context decoding). The paper shows self-decoding; its "
        "size is not known and its GPU is an A100: compare the ratios.",
        f"Source of the paper's asymmetric kernel: {paper.reported(paper.GEMM_KINDS)['asymmetric',].source}.",
    )
    return Table("figure7_gemm_kinds", "Kinds of W4A8 GEMM (the paper's figure 7)", columns, tuple(rows), notes)
