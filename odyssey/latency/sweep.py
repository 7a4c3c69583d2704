"""Methods and peers of one model in one process, batch size by batch size.

What fits into memory together takes turns, run by run; what does not fit is reported before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from odyssey.engine import FORMATS, DecoderShapes, DecoderWeights, Engine, LinearFormat, random_weights
from odyssey.engine.cache import KeyValueCache
from odyssey.engine.memory import MemoryNeed, available_bytes, predict, too_large
from odyssey.errors import OdysseyError, UnsupportedError
from odyssey.latency.candidates import Candidate, EngineCandidate
from odyssey.latency.ceilings import Ceilings
from odyssey.latency.end_to_end import failed_row, random_prompt, release, row_of, time_interleaved
from odyssey.latency.floor import floor_of
from odyssey.latency.monitor import GpuMonitor
from odyssey.latency.names import PEERS
from odyssey.latency.peers import COMPILED, TransformersCandidate, random_transformers_model
from odyssey.progress import Progress


@dataclass(frozen=True)
class Case:
    """One batch size and length of prompt and output, in tokens; warmup and repeats are whole runs."""

    batch_size: int
    input_len: int = 1024
    output_len: int = 128
    warmup: int = 1
    repeats: int = 5

    @property
    def max_len(self) -> int:
        return self.input_len + self.output_len


@dataclass(frozen=True)
class Entry:
    """A candidate before it is built. form: its number format. load: makes its weights; None for a peer."""

    name: str
    form: LinearFormat
    load: Callable[[], DecoderWeights] | None = None


class Bench:
    """All candidates of one model on one device.

    entries: in the order in which they take turns. Weights stay in memory from case to case while there is room.
    """

    def __init__(
        self,
        model: str,
        config: PreTrainedConfig,
        entries: Sequence[Entry],
        *,
        device: torch.device,
        dtype: torch.dtype,
        monitor: GpuMonitor,
        ceilings: Ceilings | None,
        seed: int = 0,
    ) -> None:
        self._model, self._config, self._entries = model, config, list(entries)
        self._device, self._dtype, self._monitor, self._ceilings, self._seed = device, dtype, monitor, ceilings, seed
        self._shapes = DecoderShapes.from_config(config)
        self._weights: dict[str, DecoderWeights] = {}

    def run(self, case: Case, progress: Progress | None = None) -> list[dict]:
        """One row for every entry, those that cannot run with outcome and reason, in the order of the entries."""
        rows: dict[str, dict] = {}
        names = {"model": self._model, "batch_size": case.batch_size}
        lengths = {"input_len": case.input_len, "output_len": case.output_len}
        if case.max_len > self._shapes.max_positions:
            reason = f"{case.max_len} tokens: {self._model} takes {self._shapes.max_positions}; lower the lengths"
            return [failed_row(entry.name, "unsupported", reason, **names, **lengths) for entry in self._entries]

        def failed(entry: Entry, outcome: str, reason: str) -> None:
            rows[entry.name] = failed_row(entry.name, outcome, reason, **names, **lengths)

        pending = []
        for entry in self._entries:
            need, available = self._need(entry, case), self._available()
            if need.total > available:
                failed(entry, "unsupported", too_large(need, available))
            else:
                pending.append(entry)
        groups, crowded = self._groups(pending, case), False
        while groups:
            group = groups.pop(0)
            try:
                rows.update(self._run_group(group, case, crowded, failed, progress))
            except torch.OutOfMemoryError as error:
                release()
                if len(group) == 1:
                    failed(group[0], "oom", str(error).strip().splitlines()[0])
                else:
                    # The prediction was too hopeful: from here on one after the other, each with the memory to itself.
                    crowded = True
                    groups = [[entry] for entry in group if entry.name not in rows] + groups
        return [rows[entry.name] for entry in self._entries]

    def close(self) -> None:
        """Give back all weights."""
        self._weights.clear()
        release()

    def _need(self, entry: Entry, case: Case) -> MemoryNeed:
        size = self._dtype.itemsize
        return predict(
            self._shapes, entry.form, batch_size=case.batch_size, max_len=case.max_len, element_size=size,
            **({} if entry.load else {"prefill_tokens": case.batch_size * case.input_len}),
        )  # fmt: skip

    def _available(self) -> int:
        """Bytes that this process can have when it holds no weights."""
        return available_bytes(self._device) + sum(weights.nbytes for weights in self._weights.values())

    def _groups(self, entries: list[Entry], case: Case) -> list[list[Entry]]:
        """Entries that fit into memory together, in order."""
        available, groups = self._available(), []
        for entry in entries:
            if groups and self._together([*groups[-1], entry], case) <= available:
                groups[-1].append(entry)
            else:
                groups.append([entry])
        return groups

    def _together(self, entries: list[Entry], case: Case) -> int:
        """Bytes of entries that take turns: all weights, one cache, the largest activations; a peer has its own cache
        only while it runs."""
        needs = [self._need(entry, case) for entry in entries]
        caches = 1 + any(entry.load is None for entry in entries)
        return (
            sum(need.weights for need in needs)
            + caches * needs[0].kv_cache
            + max(need.activations for need in needs)
            + needs[0].fixed
        )

    def _run_group(
        self, group: list[Entry], case: Case, crowded: bool, failed, progress: Progress | None
    ) -> dict[str, dict]:
        kept = [entry for entry in self._entries if entry.name in self._weights and entry not in group]
        if crowded or self._together([*group, *kept], case) > self._available():
            for entry in kept:
                del self._weights[entry.name]
        release()
        candidates: list[Candidate] = []
        cache = None
        try:
            for entry in group:
                try:
                    if entry.load is not None and cache is None:
                        cache = KeyValueCache(self._shapes, case.batch_size, case.max_len, self._dtype, self._device)
                    candidates.append(self._build(entry, case, cache))
                except OdysseyError as error:
                    failed(entry, error.outcome, str(error))
            if not candidates:
                return {}
            prompt = random_prompt(self._shapes.vocab_size, case.batch_size, case.input_len, self._seed, self._device)
            title = f"latency {self._model} batch {case.batch_size}"
            with (progress or Progress.silent()).task(title, (case.warmup + case.repeats) * len(candidates)) as task:
                timings = time_interleaved(
                    candidates, prompt, output_len=case.output_len, warmup=case.warmup, repeats=case.repeats,
                    monitor=self._monitor, task=task,
                )  # fmt: skip
            forms = {entry.name: entry.form for entry in group}
            together = [candidate.name for candidate in candidates]
            found = {}
            for timing in timings:
                name = timing.candidate.name
                if timing.candidate.problem:
                    failed(next(entry for entry in group if entry.name == name), "failed", timing.candidate.problem)
                    continue
                row = row_of(
                    timing, model=self._model, batch_size=case.batch_size, input_len=case.input_len,
                    output_len=case.output_len, floor=self._floor(forms[name], case),
                )  # fmt: skip
                need = self._need(next(entry for entry in group if entry.name == name), case)
                found[name] = {**row, "predicted_memory_bytes": need.total, "interleaved_with": together}
            return found
        finally:
            for candidate in candidates:
                candidate.close()
            del candidates, cache
            release()

    def _build(self, entry: Entry, case: Case, cache: KeyValueCache | None) -> Candidate:
        if entry.load is None:
            model = random_transformers_model(self._config, self._device, self._dtype)
            return TransformersCandidate(model, entry.name, compiled=entry.name == COMPILED, weights="random")
        if entry.name not in self._weights:
            self._weights[entry.name] = entry.load()
        engine = Engine(self._weights[entry.name], cache=cache)
        return EngineCandidate(entry.name, engine, case.batch_size, case.input_len)

    def _floor(self, form: LinearFormat, case: Case):
        if self._ceilings is None:
            return None
        return floor_of(
            self._shapes, form, self._ceilings, batch_size=case.batch_size, input_len=case.input_len,
            output_len=case.output_len, element_size=self._dtype.itemsize,
        )  # fmt: skip


def random_entries(
    config: PreTrainedConfig, methods: Sequence[str], peers: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[Entry]:
    """Entries with random weights for formats of FORMATS, then peers by their names.

    Raises UnsupportedError, naming the allowed ones, for an unknown method or peer.
    """
    for name, allowed in [*((name, FORMATS) for name in methods), *((name, PEERS) for name in peers)]:
        if name not in allowed:
            raise UnsupportedError(f"{name}: not known; allowed: {', '.join(allowed)}")

    def loader(form: LinearFormat) -> Callable[[], DecoderWeights]:
        return lambda: random_weights(config, form, device, dtype)

    entries = [Entry(name, FORMATS[name], loader(FORMATS[name])) for name in methods]
    return entries + [Entry(name, FORMATS["fp16"]) for name in peers]
