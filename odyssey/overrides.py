"""Checks the command line before any work starts, and says in one line what is wrong with it.

Hydra's own messages spread over several lines, and in a sweep they come when earlier jobs have run for hours; here
every job of the sweep is composed and validated first.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from odyssey.config import RootConfig, typed_config, validate
from odyssey.errors import ConfigError


@dataclass(frozen=True)
class CommandLine:
    """What the arguments ask for: the cells, the settings in which they differ from each other, whether they are a
    sweep, and the composed hydra.launcher of a sweep."""

    cells: list[RootConfig]
    settings: list[str] = field(default_factory=list)
    is_sweep: bool = False
    launcher: dict = field(default_factory=dict)


def check_command_line(arguments: list[str], config_dir: Path) -> CommandLine:
    """Compose and validate every job that the arguments ask for. Raises ConfigError naming the key."""
    parsed = get_args_parser().parse_args(arguments)
    if parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion:
        return CommandLine([])
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        jobs, launcher = _jobs(parsed)
        cells = [_validated(_compose(overrides)) for overrides in jobs]
    common = set(jobs[0]).intersection(*jobs) if len(jobs) > 1 else set(jobs[0])
    settings = [" ".join(override for override in job if override not in common) for job in jobs]
    return CommandLine(cells, settings, launcher is not None, launcher or {})


def check_output_dirs(cells: list[RootConfig]) -> None:
    """Make the directories that cells write to. Raises ConfigError for one that cannot be made or written."""
    for name in dict.fromkeys(cell.output_dir for cell in cells):
        directory = Path(name)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be made ({error.strerror}: {error.filename})"
            raise ConfigError(f"output_dir={name}: {reason}; name another directory") from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(f"output_dir={name}: cannot be written; name another directory")


def _jobs(parsed) -> tuple[list[list[str]], dict | None]:
    """The override list of every job: the sweep's values expanded, one for a single run; and a sweep's launcher."""
    parser = OverridesParser.create()
    try:
        overrides = parser.parse_overrides(parsed.overrides)
    except OverrideParseException as error:
        raise ConfigError(_not_parsed(error.override)) from error
    swept = [override for override in overrides if override.is_sweep_override()]
    for override in swept:
        if isinstance(override.value(), Glob):
            # It would take the schemas behind the options for options.
            raise ConfigError(f"{override.input_line}: glob() is not supported; name the options: a,b")
    plain = [override for override in overrides if not override.is_sweep_override()]
    plain_lines = [override.input_line for override in plain]
    config = _compose(plain_lines, hydra_config=True)
    if not parsed.multirun and config.hydra.mode != RunMode.MULTIRUN:
        if swept:
            raise ConfigError(f"{swept[0].input_line}: several values need a sweep; add -m")
        return [plain_lines], None
    params = dict(config.hydra.sweeper.get("params") or {})
    named = {override.get_key_element() for override in overrides}
    lines = [f"{key}={value}" for key, value in params.items() if key not in named] + parsed.overrides
    expanded = BasicSweeper.split_arguments(parser.parse_overrides(lines), max_batch_size=None)
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    return [list(job) for batch in expanded for job in batch], launcher


def _validated(config: DictConfig) -> RootConfig:
    """As the process of the cell will have it: also keys that were added with + are held against the schema."""
    try:
        root = validate(config)
        typed_config(OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    except ConfigKeyError as error:
        raise ConfigError(f"{error.full_key}: unknown key") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return root


def _not_parsed(line: str) -> str:
    key, equals, value = line.partition("=")
    if not equals or not re.fullmatch(r"[~+]*[\w/@.-]+", key):
        return f"{line}: not of the form key=value"
    quoted = shlex.quote(f'{key}="{value}"')
    return f"{line}: not of the form key=value; a value with characters such as = ( ) ~ needs quotes: {quoted}"


def _compose(overrides: list[str], hydra_config: bool = False) -> DictConfig:
    try:
        return compose("config", overrides=overrides, return_hydra_config=hydra_config)
    except MissingConfigException as error:
        raise ConfigError(_unknown_option(str(error))) from error
    except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    except ValueError as error:
        # Hydra's word for a group that is null.
        nulls = [line for line in overrides if line.endswith("=null") and "." not in line]
        problem = "cannot be null; name one of its options" if nulls else str(error).splitlines()[0]
        raise ConfigError(f"{', '.join(nulls or overrides)}: {problem}") from error
    except AssertionError as error:
        # OmegaConf asserts where an override goes into a group that is null.
        keys = ", ".join(line.partition("=")[0] for line in overrides if "." in line.partition("=")[0])
        raise ConfigError(
            f"{keys}: a group above one of these keys is null; choose the group's option first"
        ) from error


def _unknown_option(message: str) -> str:
    found = re.search(r"Could not find '([^']+)'", message)
    # Below the options Hydra lists its search path in the same form.
    listed = message.partition("Config search path")[0].splitlines()
    options = [line.strip() for line in listed if line.startswith("\t")]
    if not found:
        return message.splitlines()[0]
    group, _, option = found[1].rpartition("/")
    known = ", ".join(name for name in options if not name.endswith("_schema"))
    return f"{group}={option}: unknown; allowed: {known}" if known else f"{found[1]}: unknown config"


def _explain(error: Exception, overrides: list[str]) -> str:
    """One line out of Hydra's and OmegaConf's messages."""
    message = str(error)
    unknown = re.search(r"Could not override '([^']+)'", message)
    if unknown:
        return _unknown_key(unknown[1], overrides)
    wrong_value = re.search(r"Error merging override (\S+)", message)
    cause = str(error.__cause__ or error).strip().splitlines()[0]
    if wrong_value:
        return f"{wrong_value[1]}: {cause}"
    missing_group = re.search(r"(?:Could not override|In '[^']+': Could not find) '?([^'\n]+)'?", message)
    return f"{missing_group[1]}: {cause}" if missing_group else cause


def _unknown_key(key: str, overrides: list[str]) -> str:
    """Name the keys that stand beside the unknown one."""
    key = key.partition("@")[0]
    parent, _, _leaf = key.rpartition(".")
    choices = [line for line in overrides if "." not in line.partition("=")[0] and not line.startswith(key)]
    try:
        config = compose("config", overrides=choices)
        siblings = OmegaConf.select(config, parent) if parent else config
    except (HydraException, OmegaConfBaseException):
        return f"{key}: unknown key"
    if not isinstance(siblings, DictConfig):
        return f"{key}: unknown key ({parent} is not a group of keys here)"
    names = ", ".join(str(name) for name in siblings if name != "name") or "no keys"
    name = siblings.get("name") if parent else None
    where = f"{parent}={name} takes" if name else f"{parent} takes" if parent else "keys"
    return f"{key}: unknown key; {where}: {names}"
