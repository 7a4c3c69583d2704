"""Configs of cells on CPU, as a command line would compose them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from odyssey.config import (
    AccuracyConfig,
    CalibrationConfig,
    LatencyConfig,
    ModelConfig,
    RootConfig,
    TrackingConfig,
)
from odyssey.methods import settings_class


def cell_config(root: Path, model: Path | None = None, method: Any = "rtn", **changes) -> RootConfig:
    """A cell of `method` (a name, or its settings) on the checkpoint directory `model` that writes under `root` and
    measures nothing; `changes` are whole groups or single keys in place of these."""
    values = {
        "method": settings_class(method)() if isinstance(method, str) else method,
        "model": ModelConfig(name="local", path=None if model is None else str(model)),
        "calibration": CalibrationConfig(),
        "accuracy": AccuracyConfig(),
        "latency": LatencyConfig(),
        "tracking": TrackingConfig(),
        "output_dir": str(root / "out"),
        "device": "cpu",
    }
    return RootConfig(**(values | changes))
