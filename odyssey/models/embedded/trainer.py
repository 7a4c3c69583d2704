"""How the embedded model learns: architecture, batches, loss, optimisation (run by `embedded.train`).

The help topics hold about 100 thousand training tokens, so the fight is against overfitting: the standard
library's docstrings as a first, larger text, dropout on the embedding and on every residual branch, weight
decay, an exponential moving average of the weights, and early stopping on the ``validation`` topics.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Hyperparameters:
    """Architecture and optimisation of one training run; lengths in tokens, the defaults made `TINY_PATH`."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    window: int = 512
    batch_size: int = 4
    max_steps: int = 1100
    docstring_share: float = 0.9
    final_docstring_share: float = 0.3
    warmup_steps: int = 50
    learning_rate: float = 3e-3
    final_learning_rate_ratio: float = 0.02
    adam_beta2: float = 0.98
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    dropout: float = 0.1
    average_decay: float = 0.99
    evaluate_every: int = 100
    patience: int = 6
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class TrainingResult:
    """What `train` did: one history entry per measurement, and the step whose weights the model now holds."""

    best_step: int
    best_validation_loss: float
    steps: int
    seconds: float
    history: list[dict[str, float]]


def build_model(hp: Hyperparameters, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A freshly initialised fp32 LLaMA with tied embeddings; initialisation follows torch's global seed."""
    config = LlamaConfig(
        vocab_size=hp.vocab_size,
        hidden_size=hp.hidden_size,
        intermediate_size=hp.intermediate_size,
        num_hidden_layers=hp.num_hidden_layers,
        num_attention_heads=hp.num_attention_heads,
        num_key_value_heads=hp.num_key_value_heads,
        max_position_embeddings=hp.max_position_embeddings,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).float()


def shuffled_windows(documents: Sequence[list[int]], window: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless windows of `window` token ids from `documents`.

    Every epoch joins the documents in a new order, drops a random number (< window) of leading tokens and
    cuts what follows into windows, so window borders fall elsewhere each time.
    """
    total = sum(len(document) for document in documents)
    if total < 2 * window:
        raise ValueError(f"window={window} needs at least {2 * window} training tokens, got {total}")
    while True:
        order = list(documents)
        rng.shuffle(order)
        stream = [token for document in order for token in document]
        start = rng.randrange(window)
        windows = [stream[i : i + window] for i in range(start, len(stream) - window + 1, window)]
        rng.shuffle(windows)
        yield from windows


def training_batches(
    topics: Sequence[list[int]], docstrings: Sequence[list[int]], hp: Hyperparameters
) -> Iterator[torch.Tensor]:
    """`max_steps` batches [batch_size, window] of int64 ids, from tokenized topics and docstrings.

    The probability that a window comes from the docstrings goes linearly from `docstring_share` to
    `final_docstring_share`: the plentiful text comes first, more of the text that is wanted last. Without
    docstrings all windows come from the topics.
    """
    rng = random.Random(hp.seed)
    near = shuffled_windows(topics, hp.window, rng)
    far = shuffled_windows(docstrings, hp.window, rng) if docstrings else near
    for step in range(hp.max_steps):
        share = hp.docstring_share + (hp.final_docstring_share - hp.docstring_share) * step / hp.max_steps
        yield torch.tensor([next(far if rng.random() < share else near) for _ in range(hp.batch_size)])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, token_ids: Sequence[int], window: int) -> float:
    """Mean cross-entropy in nats over floor(T / window) windows of window - 1 targets each, the tail dropped.

    Its exponential is the perplexity of the project's protocol. `token_ids` holds BOS at its start only.
    Raises ValueError when `token_ids` does not fill one window.
    """
    count = len(token_ids) // window
    if count == 0:
        raise ValueError(f"window={window} is longer than the text ({len(token_ids)} tokens)")
    windows = torch.tensor(token_ids[: count * window]).view(count, window)
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in windows.split(8):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (count * (window - 1))


@contextmanager
def residual_dropout(model: LlamaForCausalLM, probability: float) -> Iterator[None]:
    """While active and `model` is training: dropout on the embedding and on each branch's residual update.

    LLaMA has no such dropout of its own, so it hangs on forward hooks and leaves no trace in the checkpoint.
    """

    def drop(module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, probability, training=module.training)

    targets = [model.model.embed_tokens]
    for layer in model.model.layers:
        targets += [layer.self_attn.o_proj, layer.mlp.down_proj]
    handles = [target.register_forward_hook(drop) for target in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def learning_rate(step: int, hp: Hyperparameters) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine down to the final ratio at `max_steps`."""
    if step < hp.warmup_steps:
        return hp.learning_rate * (step + 1) / hp.warmup_steps
    progress = min(1.0, (step - hp.warmup_steps) / max(1, hp.max_steps - hp.warmup_steps))
    floor = hp.final_learning_rate_ratio
    return hp.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizers(model: LlamaForCausalLM, hp: Hyperparameters) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, AdamW for the tied embedding and (without weight decay) the norms.

    Muon's updates are scaled to the root mean square of AdamW's, so that one learning rate and one weight
    decay serve both.
    """
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": hp.weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(inner, hp.learning_rate, hp.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=hp.learning_rate, betas=(0.9, hp.adam_beta2)),
    ]


class WeightAverage:
    """Exponential moving average of a model's parameters (fp32), and what is measured, kept and shipped."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = dict(model.named_parameters())
        self.average = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in; the horizon starts short, to forget the initialisation soon."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, tensor in self.weights.items():
            self.average[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While active the model holds the average; afterwards the weights that it trains on."""
        raw = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        self.load(self.average)
        try:
            yield
        finally:
            self.load(raw)

    @torch.no_grad()
    def load(self, source: dict[str, torch.Tensor]) -> None:
        """Copy `source` (name -> tensor) into the model."""
        for name, tensor in self.weights.items():
            tensor.copy_(source[name])


def train(
    model: LlamaForCausalLM,
    topics: Sequence[list[int]],
    docstrings: Sequence[list[int]],
    validation_ids: Sequence[int],
    hp: Hyperparameters,
    console: Console | None = None,
) -> TrainingResult:
    """Train `model` in place (fp32 weights, bf16 autocast); it ends with the average at the best validation.

    `topics` and `docstrings` are the token ids of the fit topics and of the standard library's docstrings,
    one list per document, `validation_ids` those of the joined validation topics.
    Stops at `max_steps`, or once the validation loss has not fallen for `patience` measurements.
    Raises FloatingPointError when the loss is no longer finite.
    """
    start = time.perf_counter()
    steppers = optimizers(model, hp)
    average = WeightAverage(model, hp.average_decay)
    best: dict[str, torch.Tensor] = {}
    best_loss, best_step, stale = math.inf, 0, 0
    recent: list[float] = []
    history: list[dict[str, float]] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress("training", *columns, console=console, disable=console is None)
    with progress, residual_dropout(model, hp.dropout):
        bar = progress.add_task("training", total=hp.max_steps)
        model.train()
        for step, batch in enumerate(training_batches(topics, docstrings, hp), start=1):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=batch).logits[:, :-1]
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"training loss {loss.item()} at step {step}: lower learning_rate")
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), hp.gradient_clip)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = learning_rate(step - 1, hp)
                stepper.step()
            average.update()
            recent.append(loss.item())
            progress.advance(bar)
            if step % hp.evaluate_every and step < hp.max_steps:
                continue
            with average.applied():
                validation_loss = mean_loss(model, validation_ids, hp.window)
            train_loss = sum(recent) / len(recent)
            recent.clear()
            history.append({"step": step, "train_loss": train_loss, "validation_loss": validation_loss})
            improved = validation_loss < best_loss
            stale = 0 if improved else stale + 1
            if improved:
                best_loss, best_step = validation_loss, step
                best = {name: tensor.clone() for name, tensor in average.average.items()}
            progress.console.print(
                f"step {step:5d}  train loss {train_loss:.4f}  validation loss {validation_loss:.4f} "
                f"(perplexity {math.exp(validation_loss):.3f}){'  best' if improved else ''}"
            )
            if stale >= hp.patience:
                break
    average.load(best)
    model.eval()
    return TrainingResult(best_step, best_loss, step, time.perf_counter() - start, history)
