"""Figures, each to a PNG and its SVG twin. The same input gives the same file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import paper
from experiments.comparison import NOT_RUN
from experiments.end_to_end import BASELINE as FP16
from experiments.end_to_end import Timed
from experiments.gemm import (
    BASELINE,
    KINDS,
    SELF_DECODING,
    gemm_kinds,
    gemm_title,
    over_fastgemm,
    speedup_over_fp16,
    stage_label,
)
from experiments.measured import Measurement
from experiments.not_run import NotRun, Reason
from experiments.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    PAPER_COLOUR,
    kernel_colour,
    kernel_line,
    kernel_name,
    method_colour,
    method_name,
    model_name,
)

_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    # Text stays text in the SVG: searchable, and readable without the font's outlines.
    "svg.fonttype": "none",
    "svg.hashsalt": "odyssey",
}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=150, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None})
    _pyplot().close(figure)
    return paths


def draw_gemm(document: dict, path: Path) -> list[Path]:
    """Speed-up over cuBLAS fp16 against M, one panel per size. Raises ValueError without a row that has one."""
    plt = _pyplot()
    rows = [row for row in document["rows"] if speedup_over_fp16(document, row) and row["correct"]]
    rows = [row for row in rows if row["kernel"] != BASELINE]
    if not rows:
        raise ValueError(f"{gemm_title(document)}: no correct row beside a row of {BASELINE}; nothing to draw")
    sizes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    across = min(2, len(sizes))
    down = -(-len(sizes) // across)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            down, across, figsize=(PAGE_WIDTH * across / 2, 2.3 * down + 0.4), squeeze=False, sharex=True, sharey=True
        )
        for axis, (n, k) in zip(axes.flat, sizes, strict=False):
            for kernel in kernels:
                found = sorted(
                    (row["m"], row["speedup_over_fp16"])
                    for row in rows
                    if (row["n"], row["k"], row["kernel"]) == (n, k, kernel)
                )
                axis.plot(
                    *zip(*found, strict=True) if found else ((), ()),
                    color=kernel_colour(kernel), linestyle=kernel_line(kernel), marker="o", markersize=3, linewidth=1.3,
                    label=kernel_name(kernel),
                )  # fmt: skip
            axis.axhline(1, color=kernel_colour(BASELINE), linewidth=0.8, label=kernel_name(BASELINE))
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(f"N x K = {n} x {k}")
            axis.grid(alpha=0.3, linewidth=0.5)
        axes[0][0].set_ylim(bottom=0)  # all panels share it, so only when all have been drawn
        for axis in list(axes.flat)[len(sizes) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("tokens M")
        for axis in axes[:, 0]:
            axis.set_ylabel("speed-up over FP16")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)))
        figure.suptitle(gemm_title(document), fontsize=8)
        figure.tight_layout(rect=(0, 0.12 / down, 1, 1))
        return _save(figure, path)


def draw_figure6(path: Path, measured: Sequence[Measurement] = (), not_run: NotRun | None = None) -> list[Path]:
    """Speed-up of W4A8 over FP16 in the same engine, by model; of a model that ran on several GPUs the last one. A
    model without a figure says why."""
    devices = {each.model: each.device for each in measured if each.value is not None}
    failed = {each.model: each.outcome for each in measured if each.value is None}
    measured = {each.model: each.value for each in measured if each.value is not None}
    label = f"measured, {' and '.join(sorted(set(map(_short_device, devices.values()))))}" if devices else "measured"
    plt = _pyplot()
    reported = {model: figure.value for (model,), figure in paper.reported(paper.ENGINE_SPEEDUP).items()}
    models = [*reported, *(model for model in (*measured, *failed) if model not in reported)]
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(COLUMN_WIDTH, 2.4))
        for shift, values, colour, name in (
            (-0.2, measured, method_colour("odyssey"), label),
            (0.2, reported, PAPER_COLOUR, "paper, A100-80G"),
        ):
            shown = [values.get(model, 0) for model in models]
            bars = axis.bar([place + shift for place in range(len(models))], shown, 0.38, color=colour, label=name)
            texts = [f"{values[model]:.3g}x" if model in values else "" for model in models]
            axis.bar_label(bars, texts, fontsize=7)
            if values is measured:
                for place, model in enumerate(models):
                    if model not in measured:
                        text = failed.get(model)
                        if text is None:
                            text = _not_run(not_run.latency("figure6_speedup", model, (FP16,)) if not_run else ())
                        axis.text(place + shift, 0.03, text, rotation=90, ha="center", va="bottom", fontsize=7)
        axis.axhline(1, color=method_colour("fp16"), linewidth=0.8)
        axis.set_xticks(range(len(models)), [model_name(model) for model in models])
        axis.set_ylabel("speed-up over FP16")
        axis.set_ylim(0, 1.4 * max([*reported.values(), *measured.values()]))
        axis.legend(loc="upper left")
        figure.tight_layout()
        return _save(figure, path)


def _not_run(reasons: Sequence[Reason]) -> str:
    short = ", ".join(reason.short for reason in reasons if reason.short)
    return f"{NOT_RUN}: {short}" if short else NOT_RUN


def _short_device(name: str) -> str:
    """The model of a GPU without its maker, as there is room for in a legend; dtypes other than float16 stay."""
    model, *dtypes = name.split(", ")
    return ", ".join([" ".join(model.removeprefix("NVIDIA ").split()[:2]), *dtypes])


def draw_end_to_end(path: Path, rows: Sequence[Timed]) -> list[Path]:
    """Prefill and decoding as stacked bars (the paper's figure 1): one row of panels for each model and GPU, one panel
    for each batch size; methods of this project's engine, those that did not run named."""
    plt = _pyplot()
    shown = [timed for timed in rows if timed.row.get("engine", "odyssey") == "odyssey"]
    lines = list(dict.fromkeys((timed.row["model"], timed.device) for timed in shown))
    batches = {line: sorted({each.row["batch_size"] for each in shown if _line(each) == line}) for line in lines}
    across = max(map(len, batches.values()), default=1)
    with plt.rc_context(_STYLE):
        size = (max(COLUMN_WIDTH, PAGE_WIDTH * across / 4), 2.2 * max(1, len(lines)) + 0.4)
        figure, axes = plt.subplots(max(1, len(lines)), across, figsize=size, squeeze=False)
        for axis in axes.flat:
            axis.set_visible(False)
        for row_of_axes, line in zip(axes, lines, strict=False):
            for axis, batch in zip(row_of_axes, batches[line], strict=False):
                found = [timed for timed in shown if _line(timed) == line and timed.row["batch_size"] == batch]
                _stack(axis, found, f"{model_name(line[0])}, batch {batch}\n{_short_device(line[1])}")
            row_of_axes[0].set_ylabel("ms, 1024 in + 128 out")
        figure.supxlabel("dark: prefill, light: decoding", fontsize=7)
        if not lines:
            axes[0][0].set_visible(True)
            axes[0][0].set_title("measured: not run")
            axes[0][0].set_axis_off()
        figure.tight_layout()
        return _save(figure, path)


def _line(timed: Timed) -> tuple[str, str]:
    return timed.row["model"], timed.device


def _stack(axis, found: list[Timed], title: str) -> None:
    """Prefill below (dark), decoding above (light); the total on top."""
    axis.set_visible(True)
    places = range(len(found))
    totals = [timed.row["total_ms"] or 0 for timed in found]
    prefills = [timed.row["prefill_ms"] or 0 for timed in found]
    colours = [method_colour(timed.row["method"]) for timed in found]
    axis.bar(places, prefills, 0.7, color=colours)
    decodes = [total - prefill for total, prefill in zip(totals, prefills, strict=True)]
    bars = axis.bar(places, decodes, 0.7, bottom=prefills, color=colours, alpha=0.45)
    axis.bar_label(bars, [f"{total:.0f}" if total else "" for total in totals], fontsize=6)
    for place, timed in enumerate(found):
        if not timed.ok:
            axis.text(place, 0, f" {timed.row['outcome']}", rotation=90, ha="center", va="bottom", fontsize=6)
    names = [method_name(timed.row["method"]).removeprefix("OdysseyLLM ").partition(" (")[0] for timed in found]
    axis.set_xticks(places, names, rotation=40, ha="right", fontsize=6)
    axis.set_title(title, fontsize=7)
    # A method alone gets no wider bar than one of three.
    missing = max(0, 3 - len(found))
    axis.set_xlim(-0.5 - missing / 2, len(found) - 0.5 + missing / 2)
    axis.margins(y=0.15)
    if not any(totals):
        axis.set_ylim(0, 1)
        axis.set_yticks([])


def draw_figure7(path: Path, documents: Sequence[dict] = (), not_run: NotRun | None = None) -> list[Path]:
    """Kinds of W4A8 GEMM, time over FastGEMM's: a panel for each GPU and phase with a group of bars for each size, the
    paper's among those of self-decoding, the phase that it shows."""
    plt = _pyplot()
    panels = [
        (f"{stage_label(stage)}, {document['environment']['gpu']}", stage, sizes)
        for document in documents
        for stage, sizes in gemm_kinds(document).items()
        if sizes
    ]
    if not panels:
        why = not_run.product("fastgemm", "figure7_gemm_kinds") if not_run else ()
        panels = [(f"{stage_label(SELF_DECODING)}\nmeasured: {_not_run(why)}", SELF_DECODING, {})]
    reported = {kernel: figure.value for (kernel,), figure in paper.reported(paper.GEMM_KINDS).items()}
    papers = {"paper\nA100-80G": reported}
    groups = [{**(papers if stage == SELF_DECODING else {}), **sizes} for _, stage, sizes in panels]
    widest = max(map(len, groups))
    with plt.rc_context(_STYLE):
        size = (min(PAGE_WIDTH, max(COLUMN_WIDTH, 1.2 * widest)), 1.9 * len(panels) + 0.5)
        figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False)
        for axis, (title, *_), sizes in zip(axes[:, 0], panels, groups, strict=True):
            _grouped_bars(axis, {label: over_fastgemm(kinds) for label, kinds in sizes.items()})
            axis.set_title(title)
            axis.set_ylabel("time over FastGEMM's")
        shown = [kernel for kernel in KINDS if any(kernel in kinds for sizes in groups for kinds in sizes.values())]
        handles = [plt.Rectangle((0, 0), 1, 1, color=kernel_colour(kernel)) for kernel in shown]
        labels = [kernel_name(kernel).replace(" W4A8", "") for kernel in shown]
        figure.legend(handles, labels, loc="lower center", ncols=3 if widest > 1 else 2)
        figure.tight_layout(rect=(0, 0.45 / size[1], 1, 1))
        return _save(figure, path)


def _grouped_bars(axis, groups: dict[str, dict[str, float]]) -> None:
    """A group of bars for each size, one for each kernel that was measured on it, in the kernels' colours."""
    for place, ratios in enumerate(groups.values()):
        width = 0.84 / max(1, len(ratios))
        for number, (kernel, ratio) in enumerate(ratios.items()):
            left = place - 0.42 + (number + 0.5) * width
            bars = axis.bar(left, ratio, 0.92 * width, color=kernel_colour(kernel))
            axis.bar_label(bars, [f"{ratio:.2f}"], fontsize=6, rotation=90 if len(groups) > 4 else 0, padding=1)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=6)
    axis.margins(y=0.25)
