"""Figures, each to a PNG and its SVG twin. The same input gives the same file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import paper
from experiments.accuracy_tables import model_name
from experiments.end_to_end import Timed
from experiments.gemm import BASELINE, KINDS, gemm_kinds, gemm_title
from experiments.measured import Measurement
from experiments.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    PAPER_COLOUR,
    kernel_colour,
    kernel_name,
    method_colour,
    method_name,
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
    rows = [row for row in document["rows"] if row.get("speedup_over_fp16") and row["correct"]]
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
                    color=kernel_colour(kernel), marker="o", markersize=3, linewidth=1.3, label=kernel_name(kernel),
                )  # fmt: skip
            axis.axhline(1, color=kernel_colour(BASELINE), linewidth=0.8, label=kernel_name(BASELINE))
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_ylim(bottom=0)
            axis.set_title(f"N x K = {n} x {k}")
            axis.grid(alpha=0.3, linewidth=0.5)
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


def draw_figure6(path: Path, measured: Sequence[Measurement] = ()) -> list[Path]:
    """Speed-up of W4A8 over FP16 in the same engine, by model; of a model that ran on several GPUs the last one."""
    devices = {each.model: each.device for each in measured}
    measured = {each.model: each.value for each in measured}
    label = f"measured, {' and '.join(sorted(set(map(_short_device, devices.values()))))}" if devices else "measured"
    plt = _pyplot()
    reported = {model: figure.value for (model,), figure in paper.reported(paper.ENGINE_SPEEDUP).items()}
    models = [*reported, *(model for model in measured if model not in reported)]
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
                        axis.text(place + shift, 0.03, "not run", rotation=90, ha="center", va="bottom", fontsize=7)
        axis.axhline(1, color=method_colour("fp16"), linewidth=0.8)
        axis.set_xticks(range(len(models)), [model_name(model) for model in models])
        axis.set_ylabel("speed-up over FP16")
        axis.set_ylim(0, 1.4 * max([*reported.values(), *measured.values()]))
        axis.legend(loc="upper left")
        figure.tight_layout()
        return _save(figure, path)


def _short_device(name: str) -> str:
    """The model of a GPU without its maker, memory and dtype, as there is room for in a legend."""
    return " ".join(name.partition(",")[0].removeprefix("NVIDIA ").split()[:2])


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
    axis.margins(y=0.15)


def draw_figure7(path: Path, documents: Sequence[dict] = ()) -> list[Path]:
    """Kinds of W4A8 GEMM in self-decoding: time over FastGEMM's, the paper's panel and one for each measured size."""
    plt = _pyplot()
    reported = {kernel: figure.value for (kernel,), figure in paper.reported(paper.GEMM_KINDS).items()}
    panels = [("paper, A100-80G", reported)]
    for document in documents:
        gpu = document["environment"]["gpu"]
        panels += [(f"{gpu}\n{size}", kinds) for size, kinds in gemm_kinds(document).items()]
    if len(panels) == 1:
        panels.append(("measured: not run", {}))
    width = max(COLUMN_WIDTH, 1.7 * len(panels))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(width, 2.6), squeeze=False, sharey=True)
        for axis, (title, kinds) in zip(axes[0], panels, strict=True):
            base = kinds.get("fastgemm-sm80", kinds.get("fastgemm"))
            shown = [kernel for kernel in KINDS if kernel in kinds] if base else []
            ratios = [kinds[kernel] / base for kernel in shown]
            bars = axis.bar(range(len(shown)), ratios, 0.6, color=[kernel_colour(kernel) for kernel in shown])
            axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], fontsize=7)
            names = [kernel_name(kernel).replace(" W4A8", "") for kernel in shown]
            axis.set_xticks(range(len(shown)), names, rotation=30, ha="right")
            axis.set_title(title)
            axis.margins(y=0.15)
            if not shown:
                axis.set_axis_off()
        axes[0][0].set_ylabel("time over FastGEMM's")
        figure.tight_layout()
        return _save(figure, path)
