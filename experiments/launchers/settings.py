"""What hydra.launcher.* may say, checked before any work starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field, fields

from odyssey.errors import ConfigError

AUTO = "auto"
LOCAL, SLURM = "LocalLauncher", "SlurmLauncher"


@dataclass
class LocalSettings:
    """jobs: cells at a time, or auto for one on each GPU (one where there is none). gpus: indices or UUIDs as in
    CUDA_VISIBLE_DEVICES; null for all that are visible. Each running cell has one of them for itself; cells with
    device=cpu have none."""

    jobs: int | str = 1
    gpus: list | None = None

    def __post_init__(self) -> None:
        if self.jobs != AUTO and (not isinstance(self.jobs, int) or isinstance(self.jobs, bool) or self.jobs < 1):
            raise ConfigError(f"hydra.launcher.jobs={self.jobs}: allowed: auto, or a number of at least 1")
        if self.gpus is not None and not isinstance(self.gpus, list):
            raise ConfigError(f"hydra.launcher.gpus={self.gpus}: must be a list such as [0,1], or null")

    def usable_gpus(self) -> list[str]:
        return visible_gpus() if self.gpus is None else [str(gpu) for gpu in self.gpus]

    def at_once(self, cells: int) -> int:
        """How many of so many cells run together."""
        return min(cells, max(1, len(self.usable_gpus())) if self.jobs == AUTO else self.jobs)


@dataclass
class SlurmSettings:
    """partition, gpu_partition, account, qos, constraint: as sbatch takes them. cpus, gpus, memory_gb, time_min: of one
    cell. sbatch: further options by name. The comments in conf/hydra/launcher/slurm.yaml say the rest."""

    partition: str | None = None
    gpu_partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus: int = 4
    gpus: int | str = AUTO
    memory_gb: float | None = None
    memory_factor: float = 1.5
    time_min: int | None = None
    time_factor: float = 3.0
    max_requeues: int = 3
    signal_delay_s: int = 120
    at_once: int | None = None
    setup: list = field(default_factory=list)
    sbatch: dict = field(default_factory=dict)
    poll_s: float = 5.0

    def __post_init__(self) -> None:
        for name, minimum in (("cpus", 1), ("time_min", 1), ("at_once", 1), ("max_requeues", 0), ("signal_delay_s", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < minimum):
                raise ConfigError(f"hydra.launcher.{name}={value}: must be a whole number of at least {minimum}")
        for name in ("memory_gb", "memory_factor", "time_factor", "poll_s"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not value > 0):
                raise ConfigError(f"hydra.launcher.{name}={value}: must be more than 0")
        if self.gpus != AUTO and (not isinstance(self.gpus, int) or isinstance(self.gpus, bool) or self.gpus < 0):
            raise ConfigError(f"hydra.launcher.gpus={self.gpus}: allowed: auto, or a number of at least 0")
        if not isinstance(self.setup, list) or not isinstance(self.sbatch, dict):
            raise ConfigError("hydra.launcher: setup must be a list of shell lines, sbatch a mapping of options")


def parse_settings(launcher: dict) -> LocalSettings | SlurmSettings | None:
    """The settings of a composed hydra.launcher; None for a launcher that is not ours. Raises ConfigError."""
    name = str(launcher.get("_target_", "")).rpartition(".")[2]
    kind = {LOCAL: LocalSettings, SLURM: SlurmSettings}.get(name)
    if kind is None:
        return None
    settings = {key: value for key, value in launcher.items() if key != "_target_"}
    known = {each.name for each in fields(kind)}
    for key in settings:
        if key not in known:
            raise ConfigError(f"hydra.launcher.{key}: unknown key; it takes: {', '.join(sorted(known))}")
    parsed = kind(**settings)
    if kind is SlurmSettings:
        _check_slurm()
    return parsed


def _check_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise ConfigError("hydra/launcher=slurm: there is no sbatch on this machine; run it on a cluster's login node")
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ConfigError("hydra/launcher=slurm: submitit is not installed; pip install 'submitit>=1.5'") from error


def visible_gpus() -> list[str]:
    """GPUs of this machine that a process of ours may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], check=True, capture_output=True, text=True,
            timeout=30,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.split()
