"""Statistics of the inputs of a block's linear layers, gathered sample by sample; no activation is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn


class Observer(Protocol):
    def add(self, x: torch.Tensor) -> None:
        """Take in activations [..., in_features]."""
        ...


class AbsMaximum:
    """Largest absolute value of every input feature: `value` float32 [in_features]; NaN and Inf show in it."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        largest = x.detach().float().abs().flatten(0, -2).amax(dim=0)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)


class AbsMean:
    """Mean absolute value of every input feature: `value` float32 [in_features]; NaN and Inf show in it."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        rows = x.detach().float().abs().flatten(0, -2)
        total = rows.sum(dim=0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._tokens += len(rows)

    @property
    def value(self) -> torch.Tensor:
        return (self._sum / self._tokens).float()


class TokenSample:
    """At most `limit` of `total` tokens, evenly spaced: `value` float32 [tokens, in_features]."""

    def __init__(self, total: int, limit: int) -> None:
        self._stride = max(1, -(-total // limit))
        self._seen = 0
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        rows = x.detach().float().flatten(0, -2)
        self._rows.append(rows[-self._seen % self._stride :: self._stride].clone())
        self._seen += len(rows)

    @property
    def value(self) -> torch.Tensor:
        return torch.cat(self._rows)


class _StopForward(Exception):
    """Ends a block's forward pass once all that was asked for has been seen."""


@torch.no_grad()
def observe_inputs(
    block: nn.Module,
    observers: Mapping[str, Sequence[Observer]],
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    inputs: Iterable[torch.Tensor],
) -> None:
    """Show the inputs of the named layers to their observers, in one pass of `inputs` through `block`.

    Every pass ends at the last of the layers in the order of execution.
    """
    seen: set[str] = set()

    def hook(name: str):
        def show(module, args):
            for observer in observers[name]:
                observer.add(args[0])
            seen.add(name)
            if len(seen) == len(observers):
                raise _StopForward

        return show

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in observers]
    try:
        for hidden in inputs:
            seen.clear()
            try:
                forward(block, hidden.float())
            except _StopForward:
                continue
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record_calls(
    block: nn.Module,
    name: str,
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    inputs: Iterable[torch.Tensor],
) -> list[tuple[tuple, dict]]:
    """Positional and keyword arguments of every call of the submodule `name` while `inputs` pass through `block`."""
    calls: list[tuple[tuple, dict]] = []

    def hook(module, args, kwargs):
        calls.append((args, kwargs))
        raise _StopForward

    handle = block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for hidden in inputs:
            try:
                forward(block, hidden.float())
            except _StopForward:
                continue
    finally:
        handle.remove()
    return calls
