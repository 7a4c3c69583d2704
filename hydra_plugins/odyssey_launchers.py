"""Hydra's side of hydra/launcher=local and slurm: it expands the sweep, experiments.launchers runs the cells.

Hydra takes launchers from this namespace only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class _CellLauncher(Launcher):
    def __init__(self, **settings) -> None:
        self.settings = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in settings.items()
        }
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """The task function is not used: a cell's config says all that is to be done."""
        self.hydra_context, self.config = hydra_context, config

    def _runner(self) -> Callable:
        """launch(jobs, sweep_dir, settings) of experiments.launchers, imported when it is needed."""
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from experiments.sweep import SweepJob

        jobs = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                del config["hydra"]
            jobs.append(SweepJob(number, config))
        sweep_dir = Path(self.config.hydra.sweep.dir)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        self._runner()(jobs, sweep_dir, self.settings)
        # What a cell ended with is in its record; to Hydra every one of them is done.
        return [
            JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=None)
            for overrides in job_overrides
        ]


class LocalLauncher(_CellLauncher):
    """Several cells at a time on this machine, one GPU each."""

    def _runner(self) -> Callable:
        from experiments.launchers.local import launch

        return launch


class SlurmLauncher(_CellLauncher):
    """Cells as Slurm array jobs."""

    def _runner(self) -> Callable:
        from experiments.launchers.slurm import launch

        return launch
