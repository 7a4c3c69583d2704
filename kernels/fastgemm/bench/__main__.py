"""Times matrix products of real layers on this machine's GPU.

    python -m fastgemm.bench --shapes llama2-7b,llama2-70b,4096x4096 --m 1,16,64,256,1024,4096 \\
        --against w8a8,cublas-fp16,int-mm --json result.json --plot result.png

Every kernel's launches are captured in a CUDA graph whose weights rotate past the L2 cache; the kernels take turns,
round by round; a row gives the median, the interquartile spread, the share of the limit (bytes at the measured read
bandwidth, or operations at the stated rate, whichever takes longer) and the error against float64. `--energy-from`
adds a continuous run of about a second, when the GPU has warmed up to its power limit: time, power, energy a launch.
"""

import argparse
import gc
import importlib.util
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..library import FastGemmError
from ..shapes import model_names, parse_shapes
from .competitors import KERNELS, Kernel, UnavailableError, as_output, select
from .device import Monitor, environment
from .plot import draw
from .problem import Activations, Weights, relative_error
from .report import add_speedups, format_row, header, make_row, write_json
from .timing import ORDER_SEED, GraphTimer, read_bandwidth, run_interleaved, weight_copies

# A continuous run for the energy of a launch. NVML's counter advances every 20 to 100 ms, so the run begins and ends at
# such a step, which is looked for every few milliseconds.
ENERGY_STEP_S = 0.3
ENERGY_POLL_S = 0.004
SUSTAINED_WARM_UP_S = 0.3
SUSTAINED_S = 0.6
SUSTAINED_PARTS = 6

EXIT_FAILED = 1
EXIT_NO_GPU = 2
EXIT_WRONG = 3


def _first_line(failure: Exception) -> str:
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]


def _prepare(kernel: Kernel, weights: Weights, l2_bytes: int) -> list[object]:
    copies = weight_copies(weights.n * weights.k * kernel.stored_bits / 8, l2_bytes)
    first = kernel.prepare(weights)
    return [first] + [kernel.prepare(weights) for _ in range(copies - 1)]


def _bench_size(
    weights: Weights,
    m: int,
    prepared: list[tuple[Kernel, list[object]]],
    rounds: int,
    bandwidth: float,
    monitor: Monitor,
    energy_from: float,
) -> list[dict]:
    gpu = torch.cuda.get_device_name()
    n, k = weights.n, weights.k
    x = Activations(m, k)
    rows, timed = [], []
    for kernel, copies in prepared:
        try:
            multiply, found = kernel.tune(copies, x) if kernel.tune else (kernel.multiply, {})
            y = as_output(kernel, multiply(copies[0], x), weights, x)
            error = relative_error(y, weights, kernel.weight_bits, x, kernel.math == "int8")
            del y
            timer = GraphTimer(lambda i, multiply=multiply, copies=copies: multiply(copies[i], x), len(copies))
        except (RuntimeError, ValueError, TypeError, AssertionError) as failure:
            if isinstance(failure, FastGemmError):
                raise
            reason = f"failed: {_first_line(failure)}"
            rows.append({"n": n, "k": k, "m": m, "kernel": kernel.name, "unavailable": reason})
            continue
        timed.append((kernel, timer, error, found))
    monitor.take()
    run_interleaved([timer for _, timer, *_ in timed], rounds, monitor.sample)
    clocks = monitor.take()
    for kernel, timer, error, found in timed:
        row = {**make_row(kernel, n, k, m, timer.timing, error, bandwidth, gpu), **found}
        if m >= energy_from:
            row.update(_sustained(timer, monitor))
        rows.append({**row, "clocks": clocks})
    return rows


def _sustained(timer: GraphTimer, monitor: Monitor) -> dict[str, object]:
    """Time, power, clocks and energy of one launch in a continuous run, when the power limit has set in."""
    timer.sustain(SUSTAINED_WARM_UP_S)
    monitor.take()
    joules, _ = _to_energy_step(timer, monitor)
    begin = time.perf_counter()
    launches = 0
    for _ in range(SUSTAINED_PARTS):
        launches += timer.sustain(SUSTAINED_S / SUSTAINED_PARTS)
        monitor.sample()
    after, more = _to_energy_step(timer, monitor)
    launches += more
    seconds = time.perf_counter() - begin
    found: dict[str, object] = {"sustained_us": seconds / launches * 1e6, "sustained_clocks": monitor.take()}
    if joules is not None and after is not None:
        found["power_w"] = (after - joules) / seconds
        found["energy_mj"] = (after - joules) / launches * 1e3
    return found


def _to_energy_step(timer: GraphTimer, monitor: Monitor) -> tuple[float | None, int]:
    """Go on launching until the energy counter advances; returns its value (None without one) and the launches."""
    first, launches, end = monitor.energy_joules(), 0, time.perf_counter() + ENERGY_STEP_S
    joules = first
    while joules is not None and joules == first and time.perf_counter() < end:
        launches += timer.sustain(ENERGY_POLL_S)
        joules = monitor.energy_joules()
    return joules, launches


def _parse_tokens(text: str) -> list[int]:
    entries = [e.strip() for e in text.split(",") if e.strip()]
    if not entries or not all(e.isdigit() and int(e) > 0 for e in entries):
        raise ValueError(f"--m takes positive numbers of tokens, separated by commas, got {text!r}")
    return list(dict.fromkeys(map(int, entries)))


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse before anything is measured what could not be written after it."""
    for path in filter(None, (options.json, options.plot)):
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"cannot write {path}: its folder is not writable")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    _check_outputs(options)
    shapes = parse_shapes(options.shapes)
    tokens = _parse_tokens(options.m)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    kernels = select(["fastgemm", *filter(None, options.against.split(","))])
    for kernel in kernels:
        if kernel.check is not None:
            kernel.check()
    monitor = Monitor()
    facts = environment(monitor)
    bandwidth = read_bandwidth()
    facts["read_bandwidth_gb_per_s"] = bandwidth / 1e9
    print(f"{facts['gpu']}, read bandwidth {bandwidth / 1e12:.2f} TB/s, commit {facts['git_commit']}")
    print(header())
    settings = {
        "shapes": options.shapes, "m": tokens, "kernels": [k.name for k in kernels], "rounds": options.rounds,
        "order": f"random in each round, seed {ORDER_SEED}",
    }  # fmt: skip

    rows: list[dict] = []
    for shape in shapes:
        weights = Weights(shape.n, shape.k)
        prepared, missing = [], []
        for kernel in kernels:
            try:
                prepared.append((kernel, _prepare(kernel, weights, facts["l2_bytes"])))
            except UnavailableError as reason:
                missing.append((kernel.name, f"not available: {reason}"))
            except FastGemmError:
                raise
            except Exception as failure:  # another library's failure is a row, not the end of the run
                missing.append((kernel.name, f"failed to prepare: {_first_line(failure)}"))
        for m in tokens:
            found = _bench_size(weights, m, prepared, options.rounds, bandwidth, monitor, options.energy_from)
            found += [{"n": shape.n, "k": shape.k, "m": m, "kernel": n, "unavailable": why} for n, why in missing]
            for row in found:
                row.update(model=shape.model, layer=shape.layer)
            add_speedups(found)
            rows += found
            print("\n".join(map(format_row, found)), flush=True)
            if options.json:
                write_json(options.json, facts, settings, rows)
        del weights, prepared
        gc.collect()
        torch.cuda.empty_cache()
    if options.plot:
        draw({"environment": facts, "rows": rows}, options.plot)
    wrong = [r for r in rows if "correct" in r and not r["correct"]]
    if wrong:
        print(f"fastgemm.bench: {len(wrong)} row(s) with a wrong result", file=sys.stderr)
        return EXIT_WRONG
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 failed, 2 no GPU, 3 a kernel's result was wrong)."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgemm.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="llama2-7b", help=f"NxK sizes and models: {', '.join(model_names())}")
    parser.add_argument("--m", default="1,16,64,256,1024,4096", help="numbers of tokens")
    parser.add_argument("--against", default="w8a8,cublas-fp16,int-mm", help=f"out of {', '.join(KERNELS)}")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each kernel")
    parser.add_argument(
        "--energy-from", type=int, default=math.inf, metavar="M", help="measure power and energy from M tokens on"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="draw the result here (.png, .pdf, .svg)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastgemm.bench: needs an NVIDIA GPU, and this machine has none that torch can use", file=sys.stderr)
        return EXIT_NO_GPU
    try:
        return run(options)
    except (ValueError, FastGemmError) as error:
        print(f"fastgemm.bench: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
