"""Train the embedded model: ``python -m odyssey.models.embedded.train --out DIR``.

Writes a Hugging Face checkpoint (fp16) with its tokenizer and ``training_report.json`` to DIR. Every field of
`Hyperparameters` is an option of the command (``--learning-rate 1e-3``); the defaults made the committed checkpoint.

The corpus is about 100 thousand tokens, so the fight is against overfitting: dropout on the embedding and on every
residual branch, strong weight decay, an exponential moving average of the weights, and early stopping on the
``validation`` topics. The ``evaluation`` topics are measured once, on the finished checkpoint.

The seed fixes tokenizer, initialisation, batch order and dropout. Two runs agree bit for bit only with the same
versions, the same number of threads and the same CPU features, because bf16 sums depend on them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from odyssey.models.embedded.text import evaluation_text, python_topics, text_sha256, training_text
from odyssey.models.embedded.tokenizer import train_tokenizer

REPORT_NAME = "training_report.json"


@dataclass(frozen=True)
class Hyperparameters:
    """Architecture, optimisation and measurement of one training run; lengths in tokens."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 2048
    window: int = 512
    batch_size: int = 8
    max_steps: int = 2400
    warmup_steps: int = 100
    learning_rate: float = 2e-3
    final_learning_rate_ratio: float = 0.02
    adam_beta2: float = 0.98
    weight_decay: float = 0.3
    gradient_clip: float = 1.0
    dropout: float = 0.2
    average_decay: float = 0.99
    evaluate_every: int = 50
    patience: int = 8
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True)
class TrainingResult:
    """What `train` did: one history entry per measurement, and the step whose weights the model now holds."""

    best_step: int
    best_validation_loss: float
    steps: int
    seconds: float
    history: list[dict[str, float]]


def build_model(hp: Hyperparameters, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
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


def training_batches(documents: Sequence[list[int]], hp: Hyperparameters) -> Iterator[torch.Tensor]:
    """Endless batches [batch_size, window] of int64 ids.

    Every epoch joins the documents in a new order, drops a random number (< window) of leading tokens and cuts what
    follows into windows, so window borders fall elsewhere each time.
    """
    total = sum(len(document) for document in documents)
    if total < 2 * hp.window:
        raise ValueError(f"window={hp.window} needs at least {2 * hp.window} training tokens, got {total}")
    rng = random.Random(hp.seed)
    pending: list[list[int]] = []
    while True:
        order = list(documents)
        rng.shuffle(order)
        stream = [token for document in order for token in document]
        start = rng.randrange(hp.window)
        windows = [stream[i : i + hp.window] for i in range(start, len(stream) - hp.window + 1, hp.window)]
        rng.shuffle(windows)
        pending += windows
        while len(pending) >= hp.batch_size:
            yield torch.tensor(pending[: hp.batch_size])
            pending = pending[hp.batch_size :]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, token_ids: Sequence[int], window: int) -> float:
    """Mean cross-entropy in nats over floor(T / window) windows of window - 1 targets each; the tail is dropped.

    Its exponential is the perplexity of the project's protocol. `token_ids` holds BOS at its start only.
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
    """While active and the model is training: dropout on the embedding and on what each branch adds to the residual.

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
    """Linear warm-up over `warmup_steps`, then a cosine from `learning_rate` to its final ratio at `max_steps`."""
    if step < hp.warmup_steps:
        return hp.learning_rate * (step + 1) / hp.warmup_steps
    progress = (step - hp.warmup_steps) / max(1, hp.max_steps - hp.warmup_steps)
    floor = hp.final_learning_rate_ratio
    return hp.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _swap(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, tensor in left.items():
        held = tensor.detach().clone()
        tensor.data.copy_(right[name])
        right[name].copy_(held)


def train(
    model: LlamaForCausalLM,
    documents: Sequence[list[int]],
    validation_ids: Sequence[int],
    hp: Hyperparameters,
    console: Console | None = None,
) -> TrainingResult:
    """Train `model` in place (fp32 weights, bf16 autocast) and leave the averaged weights of the best validation in it.

    `documents` are the token ids of the fit topics, `validation_ids` those of the joined validation topics. Stops at
    `max_steps`, or once the validation loss has not fallen for `patience` measurements.
    Raises FloatingPointError when the loss is no longer finite.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": hp.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=hp.learning_rate, betas=(0.9, hp.adam_beta2))
    weights = dict(model.named_parameters())
    average = {name: tensor.detach().clone() for name, tensor in weights.items()}
    best = {name: tensor.clone() for name, tensor in average.items()}
    best_loss, best_step, stale, seconds_start = math.inf, 0, 0, time.perf_counter()
    history: list[dict[str, float]] = []
    batches = training_batches(documents, hp)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress, residual_dropout(model, hp.dropout):
        bar = progress.add_task("training", total=hp.max_steps)
        model.train()
        recent: list[float] = []
        for step in range(hp.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, hp)
            batch = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=batch).logits[:, :-1]
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"training loss is {loss.item()} at step {step}: lower learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), hp.gradient_clip)
            optimizer.step()
            # The average starts short and lengthens, so that the random initialisation is soon forgotten.
            decay = min(hp.average_decay, (1 + step) / (10 + step))
            for name, tensor in weights.items():
                average[name].lerp_(tensor.detach(), 1 - decay)
            recent.append(loss.item())
            progress.advance(bar)
            if (step + 1) % hp.evaluate_every and step + 1 < hp.max_steps:
                continue
            _swap(weights, average)
            validation_loss = mean_loss(model, validation_ids, hp.window)
            _swap(weights, average)
            train_loss = sum(recent) / len(recent)
            recent = []
            history.append({"step": step + 1, "train_loss": train_loss, "validation_loss": validation_loss})
            improved = validation_loss < best_loss
            stale = 0 if improved else stale + 1
            if improved:
                best_loss, best_step = validation_loss, step + 1
                for name, tensor in average.items():
                    best[name].copy_(tensor)
            progress.console.print(
                f"step {step + 1:5d}  train loss {train_loss:.4f}  validation loss {validation_loss:.4f} "
                f"(perplexity {math.exp(validation_loss):.3f}){'  best' if improved else ''}"
            )
            if stale >= hp.patience:
                break
    for name, tensor in weights.items():
        tensor.data.copy_(best[name])
    model.eval()
    return TrainingResult(best_step, best_loss, step + 1, time.perf_counter() - seconds_start, history)


def write_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write config, generation config, fp16 safetensors and tokenizer to the directory `out`; `model` becomes fp16."""
    model.half()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _commit() -> str | None:
    """Commit of the checkout this file lies in, with "-dirty" where this package differs from it; None outside git."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], check=True, capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        return head + ("-dirty" if git("status", "--porcelain", "--", "*.py").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run(hp: Hyperparameters, out: Path, console: Console) -> dict:
    """Train the tokenizer and the model on this Python's topics, write the checkpoint to `out`, return the report."""
    torch.manual_seed(hp.seed)
    torch.set_num_threads(hp.threads)
    topics = python_topics()
    tokenizer = train_tokenizer(training_text(), hp.vocab_size, hp.max_position_embeddings)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = [[bos, *tokenizer.encode(t, add_special_tokens=False), eos] for t in topics["fit"].values()]
    ids = {part: tokenizer.encode("\n\n".join(topics[part].values())) for part in topics}
    model = build_model(hp, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters; tokens: " + ", ".join(f"{p} {len(i):,}" for p, i in ids.items()))
    result = train(model, documents, ids["validation"], hp, console)
    write_checkpoint(model, tokenizer, out)
    # Measured on the weights as rounded to fp16, in fp32 arithmetic: what the committed file can be checked against.
    model.float()
    losses = {part: mean_loss(model, ids[part], hp.window) for part in topics}
    report = {
        "parameters": parameters,
        "losses_nats_per_token": losses,
        "perplexities": {part: math.exp(loss) for part, loss in losses.items()},
        "tokens": {part: len(i) for part, i in ids.items()},
        "characters": {part: len("\n\n".join(topics[part].values())) for part in topics},
        "protocol": f"windows of {hp.window} tokens, BOS at the start of the text only, tail dropped, fp32 arithmetic",
        "training_text_sha256": text_sha256(training_text()),
        "evaluation_text_sha256": text_sha256(evaluation_text()),
        "hyperparameters": asdict(hp),
        "optimizer": "AdamW, bf16 autocast over fp32 weights",
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "history": result.history,
    }
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Train the embedded model on the interpreter's own help topics.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; it must not hold a checkpoint yet")
    defaults = Hyperparameters()
    for field in fields(Hyperparameters):
        default = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args(arguments))
    out: Path = options.pop("out")
    if (out / "model.safetensors").exists():
        parser.error(f"--out {out} holds a checkpoint already: name another directory or remove it")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    report = run(Hyperparameters(**options), out, console)
    figures = ", ".join(f"{part} {value:.3f}" for part, value in report["perplexities"].items())
    console.print(f"perplexity: {figures}; {report['seconds']:.0f} s; written to {out}")


if __name__ == "__main__":
    main()
