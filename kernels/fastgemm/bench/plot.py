"""Draws a result of the benchmark: `python -m fastgemm.bench.plot RESULT.json FIGURE.png`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def draw(document: dict, path: Path) -> None:
    """Time and speed-up over fp16 against M, one column per weight size, with each kernel's limit dashed.

    Args:
        document: a result as the benchmark writes it.
        path: the figure; its suffix chooses the format.

    Raises:
        ValueError: the document holds no timed rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in document["rows"] if "time_us" in r]
    if not rows:
        raise ValueError("there are no timed rows to draw")
    sizes = list(dict.fromkeys((r["n"], r["k"]) for r in rows))
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    colours = {kernel: f"C{i % 10}" for i, kernel in enumerate(kernels)}
    figure, axes = plt.subplots(2, len(sizes), figsize=(4.2 * len(sizes), 7), squeeze=False, sharex=True)
    for column, (n, k) in enumerate(sizes):
        time_axis, speedup_axis = axes[0][column], axes[1][column]
        for kernel in kernels:
            found = [r for r in rows if (r["n"], r["k"], r["kernel"]) == (n, k, kernel)]
            found.sort(key=lambda r: r["m"])
            m = [r["m"] for r in found]
            style = {"color": colours[kernel], "marker": "o", "markersize": 3, "linewidth": 1.3}
            time_axis.plot(m, [r["time_us"] for r in found], label=kernel, **style)
            time_axis.plot(m, [r["limit_us"] for r in found], color=colours[kernel], linestyle="--", linewidth=0.7)
            with_base = [r for r in found if r.get("speedup_over_fp16") is not None]
            speedup_axis.plot(
                [r["m"] for r in with_base], [r["speedup_over_fp16"] for r in with_base], label=kernel, **style
            )
        time_axis.set_xscale("log", base=2)
        time_axis.set_yscale("log")
        time_axis.set_title(f"{n} x {k}")
        speedup_axis.axhline(1, color="black", linewidth=0.7)
        speedup_axis.set_xlabel("tokens (M)")
        speedup_axis.set_ylim(bottom=0)
        for axis in (time_axis, speedup_axis):
            axis.grid(True, which="major", linewidth=0.3)
    axes[0][0].set_ylabel("time in microseconds (dashed: limit)")
    axes[1][0].set_ylabel("speed-up over cuBLAS fp16")
    axes[0][0].legend(fontsize=7)
    environment = document["environment"]
    figure.suptitle(f"{environment['gpu']}, commit {str(environment['git_commit'])[:12]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastgemm.bench.plot", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args(arguments)
    try:
        draw(json.loads(options.result.read_text()), options.figure)
    except (OSError, ValueError) as error:
        print(f"fastgemm.bench.plot: cannot draw {options.result}: {error}", file=sys.stderr)
        return 1
    except (KeyError, TypeError) as error:
        print(f"fastgemm.bench.plot: {options.result} is no result of the benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
