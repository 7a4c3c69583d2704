"""Loading an unquantized checkpoint and its tokenizer for measurements."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from odyssey.errors import InvalidCheckpointError
from odyssey.models.architecture import LlamaFamily
from odyssey.models.reader import CheckpointReader
from odyssey.models.source import ModelSource


def load_model(source: ModelSource, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The checkpoint as a Transformers causal LM in evaluation mode.

    dtype: default float32 on CPU (half precision is slow there), the checkpoint's own on CUDA.
    Raises InvalidCheckpointError (missing or NaN tensors) and UnsupportedError (architecture).
    """
    device = torch.device(device)
    architecture = LlamaFamily.from_directory(source.path)
    reader = CheckpointReader(source.path)
    architecture.check_config(reader)
    model = architecture.empty_model()
    for name, parameter in list(model.named_parameters()):
        if name == "lm_head.weight" and name not in reader:
            continue
        tensor = reader.read(name)
        if tensor.shape != parameter.shape:
            raise InvalidCheckpointError(
                f"{source.path}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"config.json asks for {tuple(parameter.shape)}"
            )
        target = dtype or (torch.float32 if device.type == "cpu" else tensor.dtype)
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        owner.register_parameter(leaf, nn.Parameter(tensor.to(device, target), requires_grad=False))
    model.tie_weights()
    return model.to(device)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises InvalidCheckpointError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(source.path)
    except Exception as error:  # the readers of tokenizer files raise classes of their own, and plain Exception
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidCheckpointError(
            f"{source.path}: no usable tokenizer ({first_line}); add tokenizer.json"
        ) from error
