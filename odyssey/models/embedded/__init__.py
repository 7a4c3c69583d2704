"""The embedded model, ``model=tiny``: a small trained LLaMA checkpoint, so that a first run needs no network.

`TINY_PATH` is a Hugging Face directory (fp16 safetensors, own byte-level BPE tokenizer) for
``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``. It was trained by
`odyssey.models.embedded.train` on `training_text`; ``training_report.json`` beside the weights tells how.
Importing this package needs the standard library only.
"""

from pathlib import Path

from odyssey.models.embedded.text import evaluation_text, text_sha256, training_text

TINY_PATH = Path(__file__).resolve().parent / "tiny"
"""Directory of the committed checkpoint."""

__all__ = ["TINY_PATH", "evaluation_text", "text_sha256", "training_text"]
