"""Run one cell, or with -m a sweep.

    python run.py method=odyssey model=llama2-7b
    python run.py -m experiment=quickstart
"""

from __future__ import annotations

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

from experiments.sweep import note_cell, sweep_exit_code  # noqa: E402
from odyssey.config import register_schemas  # noqa: E402
from odyssey.errors import ConfigError  # noqa: E402
from odyssey.overrides import check_command_line  # noqa: E402
from odyssey.record import OK  # noqa: E402
from odyssey.runner import run_cell  # noqa: E402

CONFIG_DIR = ROOT / "conf"
INVALID_CONFIG, CELL_FAILED = 2, 1


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def run(config: DictConfig) -> None:
    result = run_cell(config)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        note_cell(Path(hydra_config.sweep.dir), hydra_config.job.num, result.path, result.reused)
    elif result.record is not None and result.record["outcome"] != OK:
        sys.exit(CELL_FAILED)


def main() -> int:
    register_schemas()
    try:
        check_command_line(sys.argv[1:], CONFIG_DIR)
        run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return INVALID_CONFIG
    except KeyboardInterrupt:
        print("stopped: finished records are kept; run the same command again to go on", file=sys.stderr)
        return 130
    return sweep_exit_code()


if __name__ == "__main__":
    sys.exit(main())
