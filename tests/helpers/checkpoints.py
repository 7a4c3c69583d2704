"""Small random LLaMA-family checkpoints in Hugging Face layout, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 256


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte; enough to run the whole path on any text. bos: with token 0 in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{alphabet[0]} $A", special_tokens=[(alphabet[0], 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_checkpoint(
    directory: Path,
    *,
    layers: int = 3,
    hidden: int = 128,
    intermediate: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    shard_size: str = "5GB",
    dtype: torch.dtype = torch.float16,
    family: str = "llama",
    seed: int = 0,
    weight_std: float = 0.08,
) -> Path:
    """Write a random checkpoint; a small `shard_size` ("100KB") makes several shards with an index."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256,
        tie_word_embeddings=tied, initializer_range=weight_std,
    )  # fmt: skip
    model = model_class(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(directory, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(directory)
    return directory
