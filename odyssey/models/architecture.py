"""The decoder-only architectures that the pipeline knows: the LLaMA family (LLaMA, Mistral, Qwen2).

They share one layout: `model.embed_tokens`, `model.layers.<i>`, `model.norm`, `lm_head`, and in every decoder block the
seven linear layers below. An adapter for another family is another class with these members.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from odyssey.errors import InvalidCheckpointError, UnsupportedError
from odyssey.models.reader import CheckpointReader

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")


def _unusable_config(directory: Path, error: Exception) -> InvalidCheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # A first line that ends in a colon announces the reason.
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return InvalidCheckpointError(f"{directory / 'config.json'}: not usable ({reason})")


class LlamaFamily:
    """A LLaMA-family checkpoint seen block by block.

    linear_groups: linear layers of a block that read the same input, in execution order.
    input_norms:   group index -> the norm in front of it.
    """

    linear_groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    input_norms: dict[int, str] = {0: "input_layernorm", 2: "post_attention_layernorm"}  # noqa: RUF012
    embedding_name = "model.embed_tokens.weight"
    final_names = ("model.norm.weight", "lm_head.weight")

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.num_blocks: int = config.num_hidden_layers
        with init_empty_weights():
            self._skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self._skeleton.eval()

    @classmethod
    def from_directory(cls, directory: Path, *, quantized: bool = False) -> LlamaFamily:
        """Read config.json. Raises UnsupportedError for another architecture, InvalidCheckpointError if damaged.

        quantized: take the architecture of a checkpoint whose config.json has a quantization_config, too.
        """
        try:
            config = AutoConfig.from_pretrained(directory)
        except Exception as error:  # Transformers raises another class for every way in which a file can be wrong
            raise _unusable_config(directory, error) from error
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            raise UnsupportedError(
                f"{directory / 'config.json'}: model_type {config.model_type!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        if getattr(config, "quantization_config", None) is not None:
            if not quantized:
                raise UnsupportedError(
                    f"{directory / 'config.json'}: the checkpoint is already quantized; give the original weights, or "
                    "read a GPTQ or AWQ checkpoint with method=gptq (awq) method.checkpoint=DIR"
                )
            del config.quantization_config
        try:
            return cls(config)
        except Exception as error:  # sizes that no model can have
            raise _unusable_config(directory, error) from error

    @property
    def max_positions(self) -> int:
        """Longest sequence for calibration and evaluation (a sliding window counts as the limit)."""
        limit = self.config.max_position_embeddings
        window = getattr(self.config, "sliding_window", None)
        return min(limit, window) if window and getattr(self.config, "use_sliding_window", True) else limit

    def block_prefix(self, index: int) -> str:
        return f"model.layers.{index}."

    def skeleton_block(self, index: int) -> nn.Module:
        """A decoder block with meta parameters: names and shapes."""
        return self._skeleton.model.layers[index]

    def empty_model(self) -> nn.Module:
        """The whole causal LM with meta parameters and real (rotary) buffers."""
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")
        return model.eval()

    def load_block(self, reader: CheckpointReader, index: int, device: torch.device) -> nn.Module:
        """One decoder block with float32 parameters on `device`."""
        import copy

        block = copy.deepcopy(self._skeleton.model.layers[index])
        prefix = self.block_prefix(index)
        for name, parameter in list(block.named_parameters()):
            tensor = reader.read(prefix + name)
            if tensor.shape != parameter.shape:
                raise InvalidCheckpointError(
                    f"{reader.directory}: tensor {prefix + name} has shape {tuple(tensor.shape)}, "
                    f"config.json asks for {tuple(parameter.shape)}"
                )
            owner_name, _, leaf = name.rpartition(".")
            owner = block.get_submodule(owner_name)
            owner.register_parameter(leaf, nn.Parameter(tensor.to(device, torch.float32), requires_grad=False))
        return block.eval()

    def check_config(self, reader: CheckpointReader) -> None:
        """Before any block is read: raises InvalidCheckpointError when config.json has fewer layers than the checkpoint
        or another vocabulary, or unless the output layer is either there or tied by config.json to embeddings that
        equal what is there of it (Transformers leaves others untied, with a warning)."""
        beyond = self.block_prefix(self.num_blocks)
        if any(name.startswith(beyond) for name in reader.names()):
            raise InvalidCheckpointError(
                f"{reader.directory}: config.json says num_hidden_layers={self.num_blocks}, but there are tensors of "
                f"{beyond[:-1]}"
            )
        expected = self.config.vocab_size, self.config.hidden_size
        if self.embedding_name in reader and reader.shape(self.embedding_name) != expected:
            raise InvalidCheckpointError(
                f"{reader.directory}: tensor {self.embedding_name} has shape {reader.shape(self.embedding_name)}, "
                f"config.json asks for {expected}"
            )
        head, tied = self.final_names[-1], self.config.tie_word_embeddings
        if head not in reader and not tied:
            raise InvalidCheckpointError(
                f"{reader.directory}: tensor {head} is missing and config.json does not tie it"
            )
        if head in reader and tied and not torch.equal(reader.read(head), reader.read(self.embedding_name)):
            raise InvalidCheckpointError(
                f"{reader.directory}: tensor {head} differs from {self.embedding_name}, to which config.json ties it; "
                "set tie_word_embeddings to false there"
            )

    def embedder(self, reader: CheckpointReader, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """embed(tokens): int64 [..., seqlen] -> float32 [..., seqlen, hidden_size]. The table is read once and held."""
        table = reader.read(self.embedding_name)
        return lambda tokens: nn.functional.embedding(tokens.cpu(), table).to(device, torch.float32)

    def block_forward(self, device: torch.device) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """forward(block, hidden [batch, seqlen, hidden]) with causal attention and this model's rotary embedding."""
        rotary = self._skeleton.model.rotary_emb.to(device)
        cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def forward(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            seqlen = hidden.shape[1]
            if seqlen not in cache:
                positions = torch.arange(seqlen, device=device)[None]
                with torch.no_grad():
                    cache[seqlen] = rotary(hidden, positions)
            output = block(hidden, attention_mask=None, position_embeddings=cache[seqlen])
            # Transformers 5 returns the tensor itself, earlier releases a tuple.
            return output[0] if isinstance(output, tuple) else output

        return forward
