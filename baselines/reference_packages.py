"""The quantizers of other packages as backends of a method (`method.backend`): which there are, and loading them.

auto-gptq and autoawq are unmaintained (their successors are GPTQModel and llm-compressor) and an optional extra:
`make reference-env` builds an environment with versions that were seen to work. They are imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NATIVE = "native"
# Backend -> the package that is imported; the backend's name is that of the distribution.
PACKAGES = {"auto-gptq": "auto_gptq", "autoawq": "awq"}


def check_backend(backend: str, allowed: tuple[str, ...], checkpoint: str | None) -> None:
    """Raise ValueError, in one line, for a backend that is unknown or not installed, or beside a checkpoint."""
    if backend not in allowed:
        raise ValueError(f"backend={backend}: allowed: {', '.join(allowed)}")
    if backend == NATIVE:
        return
    if checkpoint is not None:
        raise ValueError(f"backend={backend}: cannot be combined with method.checkpoint, which quantizes nothing")
    if importlib.util.find_spec(PACKAGES[backend]) is None:
        raise ValueError(
            f"backend={backend}: the package is not in this environment; run `make reference-env` and then "
            ".venv-reference/bin/python run.py in place of python run.py"
        )


def version(backend: str) -> str:
    """The installed version of a backend's distribution."""
    return importlib.metadata.version(backend)


def auto_gptq_module(name: str) -> types.ModuleType:
    """A module of auto_gptq, such as "quantization.gptq", whatever the package's own imports need.

    `auto_gptq/__init__.py` imports names that Transformers 5 does not have; the modules with the quantizer and the
    packed layers do not need them. So the packages above the module are put in place without running their __init__.
    """
    parts = f"auto_gptq.{name}".split(".")
    root = Path(next(iter(importlib.util.find_spec("auto_gptq").submodule_search_locations)))
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations.append(str(root.joinpath(*parts[1:depth])))
            sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(".".join(parts))


@contextmanager
def without_cuda_synchronization() -> Iterator[None]:
    """Where there is no GPU, make torch.cuda.synchronize do nothing: auto-gptq calls it unasked."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = original
