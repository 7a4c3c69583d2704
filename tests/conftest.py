"""Shared fixtures. Tests marked gpu, slow, reference or cluster run only when asked for with -m."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch loads OpenMP, whose idle threads would otherwise spin against the processes that the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Test processes that run beside each other, and what they start, have their share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

OPT_IN = ("gpu", "slow", "reference", "cluster")
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m")
    skipped = [mark for mark in OPT_IN if mark not in asked]
    kept, left_out = [], []
    for item in items:
        (left_out if any(item.get_closest_marker(mark) for mark in skipped) else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="session")
def project_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def evaluation_data() -> Path:
    """Directory with external models and evaluation data (ODYSSEY_TEST_DATA); skips where it is absent."""
    path = Path(os.environ.get("ODYSSEY_TEST_DATA", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no evaluation data at {path} (set ODYSSEY_TEST_DATA)")
    return path
