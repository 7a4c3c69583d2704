"""Sizes of a decoder of the LLaMA family (LLaMA 1 to 3, Mistral, Qwen2), read from its Transformers configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from odyssey.errors import UnsupportedError
from odyssey.models.architecture import SUPPORTED_MODEL_TYPES

# RoPE variants whose angles do not depend on the length of the sequence, so that one table holds them.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class DecoderShapes:
    """What the engine must know of a decoder.

    windows: per layer the number of positions that a token attends to, itself included; None for all.
    num_heads, num_kv_heads and intermediate_size are what one device computes: tensor parallelism divides them and adds
    an all-reduce behind `o` and `down`; nothing else in the engine would change.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> DecoderShapes:
        """Raises UnsupportedError for another architecture, activation function or RoPE variant."""
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            supported = ", ".join(SUPPORTED_MODEL_TYPES)
            raise UnsupportedError(f"model_type {config.model_type!r} is not supported; supported: {supported}")
        if config.hidden_act != "silu":
            raise UnsupportedError(f"hidden_act {config.hidden_act!r} is not supported by the engine; supported: silu")
        rope = config.rope_parameters["rope_type"]
        if rope not in _STATIC_ROPE:
            raise UnsupportedError(
                f"rope_type {rope!r} is not supported by the engine; supported: {', '.join(_STATIC_ROPE)}"
            )
        is_qwen = config.model_type == "qwen2"
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            rms_eps=config.rms_norm_eps,
            tied_head=bool(config.tie_word_embeddings),
            qkv_bias=is_qwen or attention_bias,
            o_bias=attention_bias and not is_qwen,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            windows=_windows(config),
        )

    @property
    def qkv_size(self) -> int:
        """Output features of the merged query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Input features of the output projection."""
        return self.num_heads * self.head_dim

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the four linear layers of a decoder layer, as the engine runs them."""
        return {
            "qkv": (self.qkv_size, self.hidden_size),
            "o": (self.hidden_size, self.attention_size),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return (None,) * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope_table(config: PreTrainedConfig, positions: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of Transformers' own rotary module, any scaling included.

    Returns float32 [positions, head_dim]: the cosines of the head_dim / 2 angles, then their sines.
    """
    # Imported here: the sizes alone need none of Transformers' modelling code, which takes seconds to load.
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # The families share this module; of the configuration it reads rope_parameters, the positions and the head size.
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1).contiguous().to(device)


# (hidden, intermediate, layers, heads, key/value heads, vocabulary, positions, RMSNorm epsilon, RoPE base)
_KNOWN = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, 2048, 1e-6, 1e4),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000, 2048, 1e-6, 1e4),
    "llama-30b": (6656, 17920, 60, 52, 52, 32000, 2048, 1e-6, 1e4),
    "llama-65b": (8192, 22016, 80, 64, 64, 32000, 2048, 1e-5, 1e4),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 1e-5, 1e4),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000, 4096, 1e-5, 1e4),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000, 4096, 1e-5, 1e4),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 1e-5, 5e5),
    "llama3-70b": (8192, 28672, 80, 64, 8, 128256, 8192, 1e-5, 5e5),
    "llama3.1-8b": (4096, 14336, 32, 32, 8, 128256, 131072, 1e-5, 5e5),
    "llama3.1-70b": (8192, 28672, 80, 64, 8, 128256, 131072, 1e-5, 5e5),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32000, 32768, 1e-5, 1e4),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, 1e6),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, 131072, 1e-5, 1e6),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, 131072, 1e-5, 1e6),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064, 131072, 1e-5, 1e6),
}
_LLAMA31_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def known_config(name: str) -> PreTrainedConfig:
    """The configuration of a published model by its name in conf/model, for timing its shapes without its files.

    Raises UnsupportedError, naming those that are known.
    """
    if name not in _KNOWN:
        raise UnsupportedError(
            f"model={name}: its sizes are not built in; give model.path=DIR with its config.json, "
            f"or one of {', '.join(_KNOWN)}"
        )
    hidden, intermediate, layers, heads, kv_heads, vocabulary, positions, eps, base = _KNOWN[name]
    rope = _LLAMA31_ROPE if name.startswith("llama3.1") else {"rope_type": "default"}
    sizes = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": positions, "rms_norm_eps": eps, "tie_word_embeddings": False, "dtype": "float16",
        "rope_parameters": {**rope, "rope_theta": base},
    }  # fmt: skip
    if name.startswith("mistral"):
        return MistralConfig(**sizes, sliding_window=4096)
    return Qwen2Config(**sizes) if name.startswith("qwen") else LlamaConfig(**sizes)
