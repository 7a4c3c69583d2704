"""`method=awq method.backend=autoawq`: the quantizer of the package autoawq inside the block-by-block pipeline.

The package searches scales and clips and packs the block, on the full-precision chain's activations as it does by
itself; its packed layers (GEMM layout, float16 scales) are then read like those of an existing checkpoint. What differs
from the native backend by the package's own arithmetic: norm weights are divided in float32 and rounded when they are
stored, weights are rounded to float16 before they are quantized.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from baselines.checkpoint_formats import QuantizedLayout, unpack_awq
from baselines.reference_packages import version
from odyssey.errors import UnsupportedError
from odyssey.quantization.grid import check_finite
from odyssey.quantization.method import BlockCalibration, BlockResult
from odyssey.quantization.observation import record_calls

# Tokens that the package passes through a module at a time, and bytes of its buffers.
PARALLEL_TOKENS, CHUNK_BYTES = 16384, 1 << 30


class BlockQuantizer:
    """autoawq's AwqQuantizer for one block, without the model around it.

    scales: by producer, the searched scale of every input feature of its consumers; limits: by layer, the largest
    magnitude that clipping keeps of every group [out_features, num_groups]. Both are there after `quantize`.
    """

    def __init__(self, block: nn.Module, calibration: BlockCalibration, settings) -> None:
        """settings: an `AwqSettings`. Raises UnsupportedError for layers that the package cannot take."""
        from awq.models.llama import LlamaAWQForCausalLM
        from awq.quantize.quantizer import AwqQuantizer

        self.block, self.calibration, self.settings = block, calibration, settings
        self.layers = {name: block.get_submodule(name) for name in calibration.linear_names()}
        for name, layer in self.layers.items():
            if layer.in_features % settings.group_size:
                raise UnsupportedError(
                    f"method.backend=autoawq: {name} has {layer.in_features} input features, no multiple of "
                    f"method.group_size={settings.group_size}; use backend=native"
                )
        self._model = LlamaAWQForCausalLM
        self.quantizer = AwqQuantizer.__new__(AwqQuantizer)
        for key, value in {
            "awq_model": SimpleNamespace(model_type="llama"), "w_bit": settings.bits,
            "group_size": settings.group_size, "zero_point": not settings.symmetric, "version": "gemm",
            "duo_scaling": settings.duo_scaling, "max_chunk_memory": CHUNK_BYTES,
            "n_parallel_calib_samples": max(1, PARALLEL_TOKENS // calibration.reference_inputs[0].shape[1]),
        }.items():  # fmt: skip
            setattr(self.quantizer, key, value)
        self.scales: dict[str, torch.Tensor] = {}
        self.limits: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def quantize(self) -> BlockResult:
        """Scale, clip and pack the block in place, as AwqQuantizer.quantize does."""
        from awq.quantize.scale import apply_clip, apply_scale

        inputs, attention_arguments = self._observe()
        pairs = self._model.get_layers_for_scaling(self.block, inputs, attention_arguments)
        found = [self._search_scale(pair) for pair in pairs]
        self.scales = {producer: scales for producer, _, scales in found}
        apply_scale(self.block, found, input_feat_dict=inputs)
        clips = self.quantizer._search_best_clip(self.block, self.layers, inputs)
        self.limits = {name: limit.squeeze(-1) for name, limit in clips}
        apply_clip(self.block, clips)
        norms = {f"{name}.weight": self.block.get_submodule(name).weight.clone() for name in self._norms()}
        biases = {f"{name}.bias": layer.bias.clone() for name, layer in self.layers.items() if layer.bias is not None}
        self.quantizer._apply_quant(self.block, self.layers)
        layout = QuantizedLayout("awq", self.settings.bits, self.settings.group_size)
        packed = {name: self.block.get_submodule(name) for name in self.layers}
        weights = {
            name: unpack_awq({leaf: getattr(module, leaf) for leaf in layout.tensor_names()}, layout, symmetric=False)
            for name, module in packed.items()
        }
        metrics = {"backend": f"autoawq {version('autoawq')}", "scaled": sorted(self.scales)}
        return BlockResult(weights, {**norms, **biases}, metrics)

    def _search_scale(self, pair: dict) -> tuple:
        """The package's scale search for one pair: (producer, consumers, scales).

        It keeps the weights that it restores after every candidate as `state_dict()` moved to the CPU. On a CPU that
        copies nothing, and the first candidate, which is not 1 with duo_scaling, would stay in the weights.
        """
        module = pair.get("module2inspect") or pair["layers"][0]
        original = module.state_dict
        module.state_dict = lambda: {name: tensor.clone() for name, tensor in original().items()}
        try:
            return self.quantizer._search_best_scale(self.block, **pair)
        finally:
            del module.state_dict

    def _norms(self) -> list[str]:
        return [name for name in self.scales if name not in self.layers]

    def _observe(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Inputs of every layer on all samples [samples, seqlen, in_features], and the attention's other arguments."""
        samples, seen = self.calibration.reference_inputs, {name: [] for name in self.layers}
        handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].cpu()))
            for name, layer in self.layers.items()
        ]
        try:
            for index in range(len(samples)):
                self.calibration.forward(self.block, samples[index].float())
        finally:
            for handle in handles:
                handle.remove()
        inputs = {name: torch.cat(parts) for name, parts in seen.items()}
        for name, value in inputs.items():
            check_finite(value, f"the activations of {name}")
        _, arguments = record_calls(self.block, "self_attn", self.calibration.forward, [samples[0]])[0]
        return inputs, {key: value for key, value in arguments.items() if key != "hidden_states"}
