"""Run one cell, or with -m a sweep.

python run.py method=odyssey model=llama2-7b
python run.py -m experiment=quickstart
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
for source_root in (ROOT, ROOT / "kernels"):
    # Works from a source tree that is not installed, too.
    if str(source_root) not in sys.path:
        sys.path.insert(0, str(source_root))

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from experiments.launchers.settings import LocalSettings, parse_settings  # noqa: E402
from experiments.sweep import run_job, sweep_exit_code  # noqa: E402
from odyssey.config import register_schemas  # noqa: E402
from odyssey.errors import ConfigError  # noqa: E402
from odyssey.outcomes import of_exception  # noqa: E402
from odyssey.overrides import CommandLine, check_command_line, check_output_dirs  # noqa: E402
from odyssey.record import OK  # noqa: E402

CONFIG_DIR = ROOT / "conf"
INVALID_CONFIG, CELL_FAILED, INTERRUPTED = 2, 1, 130


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def run(config: DictConfig) -> None:
    """One cell. The cells of a sweep come here only with Hydra's own launchers."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        run_job(config, Path(hydra_config.sweep.dir), hydra_config.job.num)
        return
    try:
        record = run_job(config).record
    except OSError as error:
        sys.exit(_not_run(error))
    if record is not None and record["outcome"] != OK:
        sys.exit(CELL_FAILED)


def main() -> int:
    register_schemas()
    # A plain kill ends like Ctrl-C: the running cells are stopped, not left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What is raised comes here; Hydra would print a traceback and exit.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        command_line = check_command_line(sys.argv[1:], CONFIG_DIR)
        settings = parse_settings(command_line.launcher)
        only_print = any(cell.preflight for cell in command_line.cells)
        if only_print or command_line.is_sweep:
            can_run = _preflight(command_line, settings)
            if only_print:
                return 0 if can_run else CELL_FAILED
        check_output_dirs(command_line.cells)
        run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return INVALID_CONFIG
    except OSError as error:
        return _not_run(error)
    except KeyboardInterrupt:
        print("stopped: finished records are kept; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    return sweep_exit_code()


def _not_run(error: OSError) -> int:
    """A full disk, a directory that belongs to somebody else, outside a cell, whose own errors are in its record."""
    print(f"error: {of_exception(error)[1]}", file=sys.stderr)
    return CELL_FAILED


def _preflight(command_line: CommandLine, settings: object) -> bool:
    """Print what every cell needs; False when one of them cannot end ok."""
    # Imported here: --help, a config error and a single cell need no prediction, nor Transformers behind it.
    from experiments.preflight_table import print_preflight

    runs_here = settings is None or isinstance(settings, LocalSettings)
    at_once = settings.at_once(len(command_line.cells)) if isinstance(settings, LocalSettings) else 1
    return print_preflight(command_line.cells, runs_here, command_line.settings, at_once)


if __name__ == "__main__":
    sys.exit(main())
