"""The methods by name: where each one's settings and implementation live.

To add a method: write a module with a settings dataclass and a class that implements
`odyssey.quantization.method.Method`, name both here, and add conf/method/<name>.yaml.
"""

from __future__ import annotations

import dataclasses
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


def settings_class(name: str) -> type:
    """The method's settings dataclass with a `name` field in front: the typed schema of the `method` config group."""
    module, settings, _ = METHODS[name]
    base = getattr(importlib.import_module(module), settings)
    return dataclasses.make_dataclass(
        f"{settings}Config", [("name", str, dataclasses.field(default=name))], bases=(base,)
    )


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
