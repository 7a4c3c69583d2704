"""Sweeps of the real command line in tests: started with faults, read back, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).resolve().parent / "faults"
METHODS = ("fp16", "rtn", "smoothquant", "gptq", "awq", "odyssey")


def sweep_environment(faults: str = "", **variables: str) -> dict[str, str]:
    """One thread, so that sums are the same everywhere; no network; the given faults in the cells' processes."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ODYSSEY_TEST_FAULTS": faults,
        "PYTHONPATH": os.pathsep.join([str(FAULTS), str(ROOT), str(ROOT / "kernels")]), **variables,
    }  # fmt: skip


def start(arguments: list[str], faults: str = "", **variables: str) -> subprocess.Popen:
    """Ctrl-C reaches the process, also where the tests run in the background, whose children would ignore it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=sweep_environment(faults, **variables), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(arguments: list[str], faults: str = "", **variables: str) -> subprocess.CompletedProcess:
    process = start(arguments, faults, **variables)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def records(output_dir: Path) -> dict[str, dict]:
    """The records under an output directory by method; each with its file under "path"."""
    found = {}
    for path in output_dir.glob("*/*/record.json"):
        record = json.loads(path.read_text())
        method = record["config"]["method"]["name"]
        assert method not in found, f"two records of {method}"
        found[method] = {**record, "path": path}
    return found


def outcomes(output_dir: Path) -> dict[str, str]:
    return {method: record["outcome"] for method, record in records(output_dir).items()}


def integers(record: dict, output_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the quantized checkpoint of a record; empty for fp16."""
    if "quantization" not in record:
        return {}
    tensors = {}
    for shard in sorted((output_dir / record["quantization"]["checkpoint"]).glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def assert_same_results(first: Path, second: Path, methods) -> None:
    """Same digests, same integers, same scales, same loss of every window: to the bit."""
    ours, theirs = records(first), records(second)
    for method in methods:
        a, b = ours[method], theirs[method]
        assert a["digest"] == b["digest"], method
        assert a.get("quantization", {}).get("job") == b.get("quantization", {}).get("job"), method
        assert a["accuracy"]["perplexity"] == b["accuracy"]["perplexity"], method
        left, right = integers(a, first), integers(b, second)
        assert left.keys() == right.keys()
        assert (method == "fp16") == (not left)
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{method}: {name}"
