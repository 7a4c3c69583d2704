"""A sweep of all methods on testbed-28m in which everything goes wrong at once, and the same sweep on Slurm."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.sweeps import METHODS, assert_same_results, outcomes, records, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]


@contextmanager
def read_only(directory: Path):
    """A directory that nobody can write to, root neither."""
    directory.mkdir()
    if os.geteuid() != 0:
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", directory], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("root cannot mount a read-only directory here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def _damage(model: Path) -> Path:
    """Replace a link to a checkpoint by a copy whose last shard is cut off; returns what was linked to."""
    original = model.resolve()
    model.unlink()
    shutil.copytree(original, model)
    shard = sorted(model.glob("*.safetensors"))[-1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    return original


def _perplexity(record: dict) -> str:
    (result,) = record.get("accuracy", {}).get("perplexity", {"": {}}).values()
    return f"{result['value']:.6f}" if result else ""


def test_one_sweep_with_every_fault_and_the_same_on_slurm(slurm, testbed, tmp_path, report):
    models = tmp_path / "models"

    def sweep(output: str, *more: str, faults: str = ""):
        return run([*testbed, f"output_dir={tmp_path / output}", *more], faults=faults)

    two = "hydra.launcher.jobs=2"
    clean = sweep("clean", two)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert outcomes(tmp_path / "clean") == dict.fromkeys(METHODS, "ok")

    original = _damage(models / "smoothquant")
    with read_only(tmp_path / "read-only") as directory:
        tracked = ["tracking=wandb", f"tracking.dir={directory}"]
        faulty = sweep("faulty", two, *tracked, faults="gptq=oom,awq=kill")
    assert faulty.returncode == 1, faulty.stdout + faulty.stderr
    ended = outcomes(tmp_path / "faulty")
    assert ended == {
        "fp16": "ok", "rtn": "ok", "odyssey": "ok", "smoothquant": "invalid-checkpoint", "gptq": "oom", "awq": "crash",
    }  # fmt: skip
    found = records(tmp_path / "faulty")
    assert "SIGKILL" in found["awq"]["reason"]
    assert "host memory exhausted" in found["gptq"]["reason"]
    assert "truncated or damaged" in found["smoothquant"]["reason"]
    assert all(found[method]["log_tail"] for method in ("gptq", "smoothquant"))
    assert "3 of 6 cells did not end ok" in faulty.stdout
    assert "model: " in faulty.stdout.partition("running, log")[0], "the preflight did not see the damaged shard"
    # One line for every cell and one for the sweep's tables, and no cell failed for it.
    refused = [line for line in faulty.stderr.splitlines() if "not logged" in line]
    assert len(refused) == 6 + 1
    assert all("cannot be written" in line and "records are unharmed" in line for line in refused)
    survivors = ("fp16", "rtn", "odyssey")
    assert_same_results(tmp_path / "clean", tmp_path / "faulty", survivors)
    finished = {method: found[method]["path"].stat().st_mtime_ns for method in survivors}

    shutil.rmtree(models / "smoothquant")
    (models / "smoothquant").symlink_to(original)
    retried = sweep("faulty", two, "retry=failed")
    assert retried.returncode == 0, retried.stdout + retried.stderr
    after = records(tmp_path / "faulty")
    assert {method: record["outcome"] for method, record in after.items()} == dict.fromkeys(METHODS, "ok")
    assert {method: after[method]["path"].stat().st_mtime_ns for method in survivors} == finished
    # The digest of the damaged checkpoint is gone with it.
    assert_same_results(tmp_path / "clean", tmp_path / "faulty", METHODS)
    assert after["awq"]["quantization"]["resumed_blocks"] >= 1

    on_slurm = sweep("slurm", "hydra/launcher=slurm", "hydra.launcher.cpus=1", "hydra.launcher.poll_s=1")
    assert on_slurm.returncode == 0, on_slurm.stdout + on_slurm.stderr
    assert_same_results(tmp_path / "clean", tmp_path / "slurm", METHODS)

    cluster, undisturbed = records(tmp_path / "slurm"), records(tmp_path / "clean")
    rows = [
        f"| {method} | {undisturbed[method]['digest']} | {ended[method]} | {after[method]['outcome']} | "
        f"{_perplexity(undisturbed[method])} | {_perplexity(found[method])} | {_perplexity(after[method])} | "
        f"{_perplexity(cluster[method])} |"
        for method in METHODS
    ]
    report(
        "All methods on testbed-28m, with faults and without",
        "4 x 128 calibration tokens, 2 windows of 2048 tokens, one thread. The faults: gptq has no more memory after "
        "its first block, awq is killed (SIGKILL) after its first block, smoothquant's checkpoint has a shard that is "
        "cut off, and the directory of W&B is read-only. Integers and scales of all runs are equal to the bit.\n\n"
        "| method | digest | with faults | after retry=failed | perplexity without faults | with faults | "
        "after retry=failed | on Slurm |\n|---|---|---|---|---:|---:|---:|---:|\n" + "\n".join(rows),
    )
