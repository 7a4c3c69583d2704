"""The overview of a set of cells: one row per cell with outcome, perplexity, size and speed; and a plot of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.recipes import FULL_RECIPE, recipe_of
from experiments.style import method_colour, method_name, method_rank

COLUMNS = (
    "model", "method", "format", "outcome", "perplexity", "dataset", "size_mb", "bits_per_weight", "tokens_per_s",
    "reference_tokens_per_s", "speedup", "quantize_s", "seconds", "note",
)  # fmt: skip


def overview(records: list[dict]) -> pd.DataFrame:
    """One row per record and perplexity data set, in the paper's order of methods; missing figures are None.

    size_mb: all weights on disk, 10^6 bytes; bits_per_weight: of the quantized layers, scales included; tokens_per_s:
    generated tokens over the whole run; reference_tokens_per_s: of the unquantized model, in turns with the method in
    the same process (the machine may have been busier in one cell than in another); speedup: over it.
    """
    rows = [row for record in records for row in _rows(record)]
    rows.sort(key=lambda row: (row["model"], str(row["dataset"]), method_rank(row["_method"])))
    return pd.DataFrame(rows, columns=["_method", *COLUMNS]).astype(object).where(lambda frame: frame.notna(), None)


def _rows(record: dict) -> list[dict]:
    config, method = record["config"], record.get("method", {})
    latency = record.get("latency", {})
    size = record.get("size", {})
    base = {
        "_method": config["method"]["name"],
        "model": record.get("model", {}).get("name", config["model"]["name"]),
        "method": describe_cell(record),
        "format": method.get("label"),
        "outcome": record["outcome"],
        "size_mb": size["disk_bytes"] / 1e6 if size else None,
        "bits_per_weight": size.get("bits_per_weight"),
        "tokens_per_s": latency.get("total_tokens_per_s"),
        "reference_tokens_per_s": latency.get("reference", {}).get("total_tokens_per_s"),
        "speedup": latency.get("speedup_over_reference"),
        "quantize_s": record.get("quantization", {}).get("seconds"),
        "seconds": record.get("timings", {}).get("total_s"),
        "note": "simulated" if method.get("arithmetic") == "simulated" else record.get("reason"),
    }
    results = record.get("accuracy", {}).get("perplexity", {}) or {None: {}}
    return [{**base, "dataset": dataset, "perplexity": result.get("value")} for dataset, result in results.items()]


def describe_cell(record: dict) -> str:
    """What the cell measured: its method, or single matrix products."""
    config = record["config"]
    if config.get("gemm", {}).get("bench", "none") != "none":
        return f"GEMM ({config['gemm']['bench']})"
    return describe_method(config["method"])


def describe_method(method: dict) -> str:
    """The method's name, with what makes an ablation of it."""
    name = method_name(method["name"])
    recipe = recipe_of({"method": method}) if method["name"] == "odyssey" else FULL_RECIPE
    return name if recipe == FULL_RECIPE else f"{name} ({recipe})"


_FORMATS = {
    "perplexity": "{:.3f}", "size_mb": "{:.2f}", "bits_per_weight": "{:.2f}", "tokens_per_s": "{:.0f}",
    "reference_tokens_per_s": "{:.0f}", "speedup": "{:.2f}x", "quantize_s": "{:.1f}", "seconds": "{:.1f}",
}  # fmt: skip
_HEADINGS = {
    "perplexity": "ppl", "size_mb": "MB", "bits_per_weight": "bits/w", "tokens_per_s": "tokens/s",
    "reference_tokens_per_s": "fp's", "quantize_s": "quant. s",
    "speedup": "vs fp", "seconds": "total s",
}  # fmt: skip


def format_cell(column: str, value) -> str:
    if value is None:
        return ""
    return _FORMATS[column].format(value) if column in _FORMATS else str(value)


def shown_columns(frame: pd.DataFrame) -> list[str]:
    """Columns that say something: any figures, and the outcome where a cell did not end ok."""
    columns = [column for column in COLUMNS if frame[column].notna().any()]
    return columns if (frame["outcome"] != "ok").any() else [column for column in columns if column != "outcome"]


_CAPTION = "fp's: tokens/s of the unquantized model, in turns with the method; vs fp: over it"


def print_overview(frame: pd.DataFrame, console: Console | None = None) -> None:
    """The overview in the terminal, a table for each model and data set; fits 80 columns when all cells ended ok."""
    # A pipe or a log has no width of its own.
    console = console or (Console() if sys.stdout.isatty() else Console(width=100))
    for (model, dataset), rows in frame.groupby(["model", "dataset"], dropna=False, sort=False):
        title = f"{model}, perplexity on {dataset}" if pd.notna(dataset) else str(model)
        columns = [column for column in shown_columns(rows) if column not in ("model", "dataset", "seconds")]
        table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE, collapse_padding=True)
        if "reference_tokens_per_s" in columns:
            table.caption, table.caption_justify = _CAPTION, "left"
        for column in columns:
            table.add_column(_HEADINGS.get(column, column), justify="right" if column in _FORMATS else "left")
        for _, row in rows.iterrows():
            style = None if row["outcome"] == "ok" else "red"
            table.add_row(*(format_cell(column, row[column]) for column in columns), style=style)
        console.print(table)


def overview_markdown(frame: pd.DataFrame) -> str:
    columns = shown_columns(frame)
    lines = ["| " + " | ".join(_HEADINGS.get(column, column) for column in columns) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join(format_cell(column, row[column]) for column in columns) + " |" for _, row in frame.iterrows()
    ]
    return "\n".join(lines) + "\n"


def plot_overview(frame: pd.DataFrame, path: Path) -> bool:
    """Perplexity against size on disk, one panel per model and data set, to `path` (PNG) and its SVG twin.

    Returns False, without a file, when no row has both figures.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text stays text in the SVG: searchable, and readable without the font's outlines.
    plt.rcParams["svg.fonttype"] = "none"
    usable = frame[frame["perplexity"].notna() & frame["size_mb"].notna()]
    if usable.empty:
        return False
    panels = list(usable.groupby(["model", "dataset"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, ((model, dataset), rows) in zip(axes[0], panels, strict=True):
        for _, row in rows.iterrows():
            axis.scatter(row["size_mb"], row["perplexity"], color=method_colour(row["_method"]), s=55, zorder=3)
            axis.annotate(
                f"{row['method']} {row['format']}", (row["size_mb"], row["perplexity"]), fontsize=8,
                textcoords="offset points", xytext=(6, 5),
            )  # fmt: skip
        axis.set(xlabel="size on disk (MB)", ylabel=f"perplexity ({dataset}), lower is better", title=str(model))
        axis.margins(x=0.4, y=0.2)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)
    return True
