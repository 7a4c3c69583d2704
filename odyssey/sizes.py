"""The sizes that predictions start from: of a model, of the texts that a cell reads, of its calibration."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from odyssey.config import RootConfig

# A text that is tokenized in one piece, per byte (measured: 150 to 165), and one that is kept, joined and hashed.
_TOKENIZING, _JOINING = 160, 3


@dataclass(frozen=True)
class ModelSizes:
    """A decoder of the LLaMA family in numbers. element_size: bytes of a stored weight."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    positions: int
    element_size: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelSizes:
        dtype = str(getattr(config, "dtype", None) or "float16").removeprefix("torch.")
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            positions=config.max_position_embeddings,
            element_size=4 if dtype == "float32" else 2,
        )

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of a block's seven linear layers."""
        attention, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (attention, self.hidden), (key_value, self.hidden), (key_value, self.hidden), (self.hidden, attention),
            (self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate),
        )  # fmt: skip

    @property
    def block_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.linear_shapes)

    @property
    def linear_weights(self) -> int:
        return self.layers * self.block_weights

    @property
    def largest_layer(self) -> int:
        return max(rows * columns for rows, columns in self.linear_shapes)

    @property
    def other_weights(self) -> int:
        """Embedding, head and norms."""
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return tables + (2 * self.layers + 1) * self.hidden

    @property
    def checkpoint_bytes(self) -> int:
        return self.element_size * (self.linear_weights + self.other_weights)


@dataclass(frozen=True)
class Texts:
    """Bytes of the texts that a cell reads; in_one_piece: tokenized as a whole, not document by document."""

    calibration: int = 0
    evaluation: int = 0
    calibration_in_one_piece: bool = True
    evaluation_in_one_piece: bool = True

    def calibration_memory(self) -> int:
        return self.calibration * (_TOKENIZING if self.calibration_in_one_piece else _JOINING)

    def evaluation_memory(self) -> int:
        return self.evaluation * (_TOKENIZING if self.evaluation_in_one_piece else _JOINING)


@dataclass(frozen=True)
class Calibration:
    """samples of seqlen tokens each."""

    samples: int
    seqlen: int

    @classmethod
    def of(cls, root: RootConfig, sizes: ModelSizes) -> Calibration:
        """Nothing for methods that are known to use none."""
        method = root.method
        unused = method.name in ("fp16", "rtn") or (
            method.name == "odyssey" and method.clipping == "none" and method.compensation == "none"
        )
        group = root.calibration
        return cls(0 if unused else group.num_samples, min(group.seqlen, sizes.positions))

    @property
    def tokens(self) -> int:
        return self.samples * self.seqlen
