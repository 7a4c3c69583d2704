"""What is timed: anything that reads a batch of prompts and writes a number of tokens, run after run."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch

from odyssey.engine.engine import Engine
from odyssey.engine.weights import RANDOM
from odyssey.latency.monitor import GpuMonitor


@dataclass(frozen=True)
class Run:
    """One run, in milliseconds. prefill_ms: until the first new token (TTFT). step_ms: each later token, where the
    candidate tells them apart."""

    prefill_ms: float
    total_ms: float
    step_ms: list[float] = field(default_factory=list)

    def decode_ms_per_token(self, output_len: int) -> float | None:
        """Mean over the steps behind the first token (TPOT); None for one token."""
        return (self.total_ms - self.prefill_ms) / (output_len - 1) if output_len > 1 else None


class Candidate(Protocol):
    """name: of the row. facts: of the row that no other place knows (format, dtype, bytes, ...). problem: why the times
    of the runs so far are not to be reported, or None."""

    name: str
    facts: dict
    problem: str | None

    def run(self, prompt: torch.Tensor, output_len: int, monitor: GpuMonitor) -> Run:
        """prompt: int64 [B, length]. Samples the monitor while the GPU works."""

    def close(self) -> None:
        """Give back the memory."""


class EngineCandidate:
    """A method in the project's engine."""

    def __init__(self, name: str, engine: Engine, batch_size: int, input_len: int) -> None:
        """Captures the graphs; the memory that stays reserved for them is in facts["graph_bytes"]."""
        self.name, self._engine, self.problem = name, engine, None
        before = _reserved(engine.device)
        engine.prepare(batch_size, prompt_len=input_len)
        weights = engine.weights
        self.facts = {
            "engine": "odyssey",
            "format": weights.format.name,
            "dtype": str(weights.dtype).removeprefix("torch."),
            "weights": weights.origin,
            "weight_bytes": weights.nbytes,
            "kv_bytes": engine.cache.nbytes,
            "graph_bytes": max(0, _reserved(engine.device) - before),
            "graphs": engine.device.type == "cuda",
        }
        if weights.origin == RANDOM:
            self.facts["random_mean"] = 0.0  # int4 of rows without it had a mean of -0.5
        backend = getattr(getattr(weights.layers[0].qkv, "packed", None), "backend", None)
        if backend is not None:
            self.facts["backend"] = backend

    def run(self, prompt: torch.Tensor, output_len: int, monitor: GpuMonitor) -> Run:
        engine, count = self._engine, prompt.shape[0]
        on_gpu = engine.device.type == "cuda"
        started = _clock(engine.device)
        logits = engine.prefill(prompt)
        prefilled = _clock(engine.device)
        marks = [_mark(on_gpu)]
        for _ in range(output_len - 1):
            engine.step(count)
            marks.append(_mark(on_gpu))
        if output_len > 1:
            # All steps are queued and the GPU is at work on them.
            monitor.sample()
        ended = _clock(engine.device)
        if not torch.isfinite(logits).all():
            self.problem = (
                "the logits are not finite: times of products of NaN, which become zeros, say nothing about a model"
            )
        steps = [_between(first, second) for first, second in itertools.pairwise(marks)]
        return Run(1e3 * (prefilled - started), 1e3 * (ended - started), steps)

    def close(self) -> None:
        self._engine = None


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _mark(on_gpu: bool):
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first, second) -> float:
    """Milliseconds between two marks."""
    return 1e3 * (second - first) if isinstance(first, float) else first.elapsed_time(second)
