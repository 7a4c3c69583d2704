"""Train the embedded model: ``python -m odyssey.models.embedded.train --out DIR``.

Writes a Hugging Face checkpoint (fp16) with its tokenizer and ``training_report.json`` to DIR. Every field of
`Hyperparameters` is an option of the command (``--learning-rate 1e-3``); the defaults made the committed
checkpoint. The ``evaluation`` topics are measured once, on the finished checkpoint.

The seed fixes initialisation, batch order and dropout. Two runs agree bit for bit only with the same Python
text, versions, number of threads and CPU features, because the order of sums depends on them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from odyssey.models.embedded.docstrings import stdlib_docstrings
from odyssey.models.embedded.text import evaluation_text, python_topics, text_sha256, training_text
from odyssey.models.embedded.tokenizer import train_tokenizer
from odyssey.models.embedded.trainer import Hyperparameters, build_model, mean_loss, train

REPORT_NAME = "training_report.json"


def write_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write config, generation config, fp16 safetensors and tokenizer to the directory `out`.

    `model` itself is left with fp16 weights.
    """
    model.half()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def source_commit() -> str | None:
    """Commit of the checkout this file lies in; "-dirty" is added where this package's code differs from it.

    None outside a checkout.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run(hp: Hyperparameters, out: Path, console: Console) -> dict:
    """Train tokenizer and model on this Python's topics, write both and the report to `out`; returns it."""
    torch.manual_seed(hp.seed)
    torch.set_num_threads(hp.threads)
    commit = source_commit()
    topics = python_topics()
    tokenizer = train_tokenizer(training_text(), hp.vocab_size, hp.max_position_embeddings)
    joined = {part: "\n\n".join(texts.values()) for part, texts in topics.items()}
    # verbose=False: texts longer than the model's context are no mistake here, windows are cut later.
    ids = {part: tokenizer(text, verbose=False).input_ids for part, text in joined.items()}
    docstrings = stdlib_docstrings([joined["evaluation"], joined["validation"]])

    def documents(texts: dict[str, str]) -> list[list[int]]:
        eos = tokenizer.eos_token_id
        return [[*tokenizer(text, verbose=False).input_ids, eos] for text in texts.values()]

    docstring_text = "\n\n".join(docstrings.values())
    fit, extra = documents(topics["fit"]), documents(docstrings)
    model = build_model(hp, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = {part: len(i) for part, i in ids.items()} | {"docstrings": sum(map(len, extra))}
    sizes = ", ".join(f"{part} {count:,}" for part, count in tokens.items())
    console.print(f"{parameters:,} parameters; tokens: {sizes}")
    result = train(model, fit, extra, ids["validation"], hp, console)
    write_checkpoint(model, tokenizer, out)
    # Measured in fp32 arithmetic on the weights as rounded to fp16, so the file can be checked against it.
    model.float()
    losses = {part: mean_loss(model, ids[part], hp.window) for part in topics}
    report = {
        "parameters": parameters,
        "losses_nats_per_token": losses,
        "perplexities": {part: math.exp(loss) for part, loss in losses.items()},
        "protocol": f"windows of {hp.window} tokens, BOS at the start of the text only, tail dropped",
        "tokens": tokens,
        "characters": {part: len(text) for part, text in (joined | {"docstrings": docstring_text}).items()},
        "training_text_sha256": text_sha256(training_text()),
        "evaluation_text_sha256": text_sha256(evaluation_text()),
        "docstrings_sha256": text_sha256(docstring_text),
        "hyperparameters": asdict(hp),
        "optimizer": "Muon (decoder matrices), AdamW (embedding, norms); bf16 autocast, fp32 weights",
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "history": result.history,
    }
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Train the embedded model on this Python's help topics.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    for field in fields(Hyperparameters):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help=f"{field.default}")
    options = vars(parser.parse_args(arguments))
    out: Path = options.pop("out")
    if (out / "model.safetensors").exists():
        parser.error(f"--out {out} holds a checkpoint already: name another directory or remove it")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    report = run(Hyperparameters(**options), out, console)
    figures = ", ".join(f"{part} {value:.3f}" for part, value in report["perplexities"].items())
    console.print(f"perplexity: {figures}; {report['seconds']:.0f} s; written to {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
