"""The paper's latency tables: end to end (4) and one GEMM against QUIK (5)."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import paper
from experiments.comparison import comparison_table
from experiments.differences import with_differences
from experiments.end_to_end import BASELINE, METHOD, SAME_FORMAT
from experiments.gemm import STAGE_TOKENS, gemm_cells
from experiments.measured import Measurement
from experiments.not_run import NotRun, Reason
from experiments.style import engine_rank, kernel_name, method_name, model_name, model_rank
from experiments.table import Column, Table


def table4_latency(measurements: Sequence[Measurement] = (), not_run: NotRun | None = None) -> Table:
    """Milliseconds for 1024 tokens in and 128 out, and their ratios; measurements are of end_to_end.latencies."""
    cells = {cell: figure for cell, figure in paper.reported(paper.LATENCY).items()}
    order = [*paper.ENGINES, *(f"odyssey over {engine}" for engine in paper.ENGINES)]
    units = {cell[1]: figure.unit for cell, figure in cells.items()}
    return comparison_table(
        "table4_latency",
        "End-to-end latency, 1024 tokens in, 128 out (the paper's table 4, A100-80G)",
        (Column("model", "model"), Column("engine", "engine"), Column("unit", "unit")),
        {cell: figure.value for cell, figure in cells.items()},
        with_differences(list(measurements), lambda each: (each.model, each.method)),
        labels=lambda cell: (model_name(cell[0]), engine_name(cell[1]), units.get(cell[1], "ms")),
        rank=lambda cell: (
            *model_rank(cell[0]),
            order.index(cell[1]) if cell[1] in order else len(order),
            engine_rank(cell[1]),
        ),
        number="{:.4g}",
        signed="{:+.2f}",
        # Milliseconds of different GPUs are different quantities.
        differs=lambda cell: units.get(cell[1]) == "x",
        notes=(
            "Batch 1. The paper: A100-80G, TensorRT-LLM beside its own engine, trained weights. Measured: the row's "
            "GPU, all formats in this project's engine, random weights of the same shapes; the ratios are W4A8 over "
            "FP16 and over W8A8 of the same run. Milliseconds of different GPUs are different quantities; compare the "
            "ratios.",
        ),
        why=not_run and (lambda cell: _why_no_latency(not_run, *cell)),
    )


def _why_no_latency(not_run: NotRun, model: str, engine: str) -> tuple[Reason, ...]:
    ours, _, other = engine.partition(" over ")
    if ours != METHOD:
        return not_run.engine()
    return not_run.latency("table4_latency", model, (SAME_FORMAT[other],) if other else ())


def engine_name(engine: str) -> str:
    ours, _, other = engine.partition(" over ")
    return f"{method_name(ours)} over {method_name(other)}" if other else method_name(engine)


def figure6_table(measurements: Sequence[Measurement] = (), not_run: NotRun | None = None) -> Table:
    """Speed-up of W4A8 over FP16 in the same engine, by model."""
    limit = paper.HUGGING_FACE_SPEEDUP
    return comparison_table(
        "figure6_speedup",
        "Speed-up of W4A8 over FP16 in the same engine (the paper's figure 6, A100-80G)",
        (Column("model", "model"),),
        {cell: figure.value for cell, figure in paper.reported(paper.ENGINE_SPEEDUP).items()},
        with_differences(list(measurements), lambda each: (each.model,)),
        labels=lambda cell: (model_name(cell[0]),),
        rank=lambda cell: model_rank(cell[0]),
        notes=(f"Over Hugging Face FP16 the paper reports up to {limit.value:g}x.",),
        why=not_run and (lambda cell: not_run.latency("figure6_speedup", cell[0], (BASELINE,))),
    )


def table5_gemm(documents: Sequence[dict] = (), not_run: NotRun | None = None) -> Table:
    """One GEMM in milliseconds: the paper's figures, whose size is not known, and what was measured, by size."""
    reported = {
        (stage, kernel, "", figure.unit): figure.value
        for (stage, kernel), figure in paper.reported(paper.QUIK_GEMM).items()
    }
    tokens = {m: stage for stage, m in STAGE_TOKENS.items()}
    measured: dict[tuple, list[Measurement]] = {}
    for document in documents:
        for row, measurement in gemm_cells(document, scale=1e-3):
            if row["m"] in tokens and row["kernel"] in ("fastgemm", "quik-w4a4"):
                cell = (tokens[row["m"]], row["kernel"], f"{row['n']} x {row['k']}, M = {row['m']}", "ms")
                measured.setdefault(cell, []).append(measurement)
    stages, kernels = list(paper.STAGES), ["quik-w4a4", "fastgemm", "fastgemm over quik-w4a4"]
    return comparison_table(
        "table5_gemm",
        "One GEMM against QUIK W4A4 (the paper's table 5, A100-80G)",
        (Column("stage", "stage"), Column("kernel", "kernel"), Column("size", "size"), Column("unit", "unit")),
        reported,
        measured,
        labels=lambda cell: (cell[0], _kernel(cell[1]), cell[2] or "not reported", cell[3]),
        rank=lambda cell: (stages.index(cell[0]), cell[2] != "", cell[2], kernels.index(cell[1])),
        number="{:.4g}",
        signed="{:+.4g}",
        notes=("The size of the paper's GEMM is not among its available figures, so no difference can be given.",),
        why=not_run and (lambda cell: _why_no_product(not_run, cell[1])),
    )


def _why_no_product(not_run: NotRun, kernel: str) -> tuple[Reason, ...]:
    """A ratio has the reasons of its denominator, which is not ours."""
    return not_run.product(kernel.rpartition(" over ")[2], "table5_gemm", has_size=False)


def _kernel(kernel: str) -> str:
    ours, _, other = kernel.partition(" over ")
    return f"{kernel_name(ours)} over {kernel_name(other)}" if other else kernel_name(kernel)
