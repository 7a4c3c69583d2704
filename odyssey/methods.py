"""The methods by name: where each one's settings and implementation live.

To add a method: write a module with a settings dataclass and a class that implements
`odyssey.quantization.method.Method`, name both here, and add conf/method/<name>.yaml.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

METHODS: dict[str, tuple[str, str, str]] = {
    "fp16": ("baselines.fp16", "Fp16Settings", "Fp16Method"),
    "rtn": ("baselines.rtn", "RtnSettings", "RtnMethod"),
    "smoothquant": ("baselines.smoothquant", "SmoothQuantSettings", "SmoothQuantMethod"),
    "gptq": ("baselines.gptq", "GptqSettings", "GptqMethod"),
    "awq": ("baselines.awq", "AwqSettings", "AwqMethod"),
    "odyssey": ("odyssey.quantization.recipe", "OdysseySettings", "OdysseyMethod"),
}


@functools.cache
def settings_class(name: str) -> type:
    """The method's settings dataclass with a `name` field in front: the typed schema of the `method` config group."""
    base = _settings_base(name)
    return dataclasses.make_dataclass(
        f"{base.__name__}Config", [("name", str, dataclasses.field(default=name))], bases=(base,)
    )


def is_settings_of(name: str, settings: Any) -> bool:
    """Whether settings are of this method's class."""
    return isinstance(settings, _settings_base(name))


def _settings_base(name: str) -> type:
    module, settings, _ = METHODS[name]
    return getattr(importlib.import_module(module), settings)


def build_method(name: str, settings: Any):
    """The method object for validated settings (an instance of `settings_class(name)`)."""
    module, _, method = METHODS[name]
    return getattr(importlib.import_module(module), method)(settings)


def existing_checkpoint(settings: Any) -> str | None:
    """The directory of an existing checkpoint that is read in place of quantizing, where the settings name one."""
    return getattr(settings, "checkpoint", None)


def settings_dict(settings: Any) -> dict:
    """JSON-ready settings without the name, as they go into records and digests."""
    content = dataclasses.asdict(settings)
    content.pop("name", None)
    return content
