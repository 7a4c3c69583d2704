"""A real Slurm for the tests of this folder, and the report of their last run (CLUSTER_REPORT=FILE)."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

START = Path(__file__).resolve().parent / "start_slurm.sh"
SEARCH_PATH = os.environ["PATH"] + ":/usr/sbin"
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
_outcomes: list[tuple[str, str, float]] = []
_sections: dict[str, str] = {}


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A cluster of one node with two pretended GPUs; this process speaks to it until it is stopped."""
    missing = [program for program in _PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root only")
    directory = tmp_path_factory.mktemp("slurm")
    subprocess.run([START, directory, "2"], check=True)
    saved = dict(os.environ)
    os.environ.update(PATH=SEARCH_PATH, SLURM_CONF=str(directory / "slurm.conf"))
    yield directory
    _cancel_all()
    os.environ.clear()
    os.environ.update(saved)
    subprocess.run([START, "--stop", directory], check=True)


def _cancel_all() -> None:
    """What a failed test has left: its processes end with their jobs, before the daemons do."""
    subprocess.run(["scancel", "--user=root"], check=False)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=False).stdout.strip():
            return
        time.sleep(1)


@pytest.fixture
def testbed(evaluation_data, tmp_path) -> list[str]:
    """Arguments of a sweep of all methods on testbed-28m, with little work; a directory of its own for each method's
    model, all the same checkpoint: <tmp>/models/<method>."""
    models, texts = tmp_path / "models", evaluation_data / "data" / "wikitext2"
    models.mkdir()
    for method in ("fp16", "rtn", "smoothquant", "gptq", "awq", "odyssey"):
        (models / method).symlink_to((evaluation_data / "models" / "testbed-28m").resolve())
    return [
        "-m", "experiment=testbed", f"model.path={models}/${{method.name}}", "model.name=testbed-28m",
        f"calibration.path={(texts / 'wiki.valid.tokens').resolve()}",
        f"accuracy.perplexity.path={(texts / 'wiki.test.tokens').resolve()}",
        "calibration.num_samples=4", "calibration.seqlen=128", "accuracy.perplexity.max_windows=2",
    ]  # fmt: skip


@pytest.fixture
def report():
    """report(title, text): a section of the report."""

    def add(title: str, text: str) -> None:
        _sections[title] = text

    return add


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes.append((report.nodeid.rpartition("::")[2], report.outcome, report.duration))


def pytest_sessionfinish() -> None:
    path = os.environ.get("CLUSTER_REPORT")
    if path and _outcomes:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(_report())


def _report() -> str:
    from odyssey.environment import git_commit

    packages = ("torch", "transformers", "hydra-core", "submitit", "wandb")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    controller = shutil.which("slurmctld", path=SEARCH_PATH)
    shown = subprocess.run([controller, "-V"], capture_output=True, text=True, check=False).stdout if controller else ""
    counts = Counter(outcome for _, outcome, _ in _outcomes)
    lines = [
        "# Sweeps on a real Slurm",
        "",
        "Written by `make test-cluster`: do not edit.",
        "",
        f"* date: {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}",
        f"* commit: {git_commit()}",
        f"* {shown.strip() or 'no Slurm'}, Python {platform.python_version()}, {versions}",
        f"* {len(_outcomes)} tests: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}",
        "",
        "| test | outcome | seconds |",
        "|---|---|---:|",
        *(f"| {name} | {outcome} | {seconds:.0f} |" for name, outcome, seconds in _outcomes),
    ]
    for title, text in _sections.items():
        lines += ["", f"## {title}", "", text.rstrip()]
    return "\n".join(lines) + "\n"
