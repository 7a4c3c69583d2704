"""Peers that are timed beside the engine: Transformers' own modules, eager, and compiled with a static cache."""

from __future__ import annotations

import itertools
import time

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from odyssey.latency.candidates import Run
from odyssey.latency.monitor import GpuMonitor
from odyssey.latency.names import PEERS

EAGER, COMPILED = PEERS


def random_transformers_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of the given configuration with random weights, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class TransformersCandidate:
    """`model.generate`, greedy. compiled: with its static cache, whose decoding step Transformers compiles
    (torch.compile, CUDA graphs on a GPU); the first run does that."""

    problem = None

    def __init__(self, model: nn.Module, name: str, *, compiled: bool, weights: str) -> None:
        self.name, self._model = name, model
        # With an end token `generate` runs until output_len only by forbidding it, which costs launches in every step.
        model.generation_config.eos_token_id = None
        self._options = {"cache_implementation": "static"} if compiled else {}
        parameters = list(model.parameters())
        self.facts = {
            "engine": "transformers",
            "format": "fp16",
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "weights": weights,
            "weight_bytes": sum(parameter.nbytes for parameter in parameters),
            "compiled": compiled,
        }

    @torch.inference_mode()
    def run(self, prompt: torch.Tensor, output_len: int, monitor: GpuMonitor) -> Run:
        clock = _TokenClock(monitor, output_len // 2)
        options = GenerationConfig(
            max_new_tokens=output_len, do_sample=False, eos_token_id=None, pad_token_id=0, **self._options
        )  # fmt: skip
        if prompt.is_cuda:
            torch.cuda.synchronize(prompt.device)
        clock.start()
        self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=options,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return clock.result()

    def close(self) -> None:
        self._model = None
        torch.compiler.reset()


class _TokenClock(StoppingCriteria):
    """Notes when each token is there, as a stopping criterion that never stops."""

    def __init__(self, monitor: GpuMonitor, sample_at: int) -> None:
        self._monitor, self._sample_at = monitor, sample_at
        self._times: list[float] = []
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, tokens: torch.Tensor, _scores, **_) -> torch.Tensor:
        # `generate` waits for every token, too: it asks on the host whether all sequences have ended.
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        now = time.perf_counter()
        self._times.append(1e3 * (now - self._started))
        if len(self._times) == self._sample_at:
            self._monitor.sample()
            # The next step waits for it, and it is no part of that.
            self._started += time.perf_counter() - now
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

    def result(self) -> Run:
        steps = [second - first for first, second in itertools.pairwise(self._times)]
        return Run(self._times[0], self._times[-1], steps)
