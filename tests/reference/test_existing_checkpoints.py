"""`method.checkpoint`: checkpoints of auto-gptq's packed layers and of autoawq, against the weights they stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

import odyssey
from baselines.checkpoint_import import checkpoint_source, import_checkpoint
from baselines.reference_packages import auto_gptq_module, without_cuda_synchronization
from odyssey.models.architecture import LlamaFamily

pytestmark = [pytest.mark.reference, pytest.mark.timeout(1200)]
NAMES = [name for group in LlamaFamily.linear_groups for name in group]


def gptq_checkpoint(directory, bits: int, group_size: int, symmetric: bool, act_order: bool) -> dict[str, torch.Tensor]:
    """Quantize and pack a random checkpoint with auto-gptq; returns what its packed layers multiply by, float16."""
    write_checkpoint(directory, layers=2, hidden=128, intermediate=192, kv_heads=2)
    quantizer = auto_gptq_module("quantization.gptq")
    packed_layer = auto_gptq_module("nn_modules.qlinear.qlinear_cuda").QuantLinear
    state, weights = load_file(directory / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(1)
    for key in [key for key in state if key.removesuffix(".weight").endswith(tuple(NAMES))]:
        weight = state.pop(key)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.float()
        gptq = quantizer.GPTQ(layer)
        x = torch.randn(512, weight.shape[1], generator=generator)
        gptq.add_batch(x * torch.linspace(0.1, 3, weight.shape[1])[torch.randperm(weight.shape[1])], None)
        gptq.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=False)
        with without_cuda_synchronization():
            scales, zeros, g_idx = gptq.fasterquant(group_size=group_size, actorder=act_order)
        layer.half()
        packed = packed_layer(bits, group_size, weight.shape[1], weight.shape[0], bias=False)
        packed.pack(layer, scales, zeros, g_idx)
        name = key.removesuffix(".weight")
        state.update({f"{name}.{leaf}": getattr(packed, leaf) for leaf in ("qweight", "qzeros", "scales", "g_idx")})
        weights[name] = packed(torch.eye(weight.shape[1], dtype=torch.float16)).t()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, directory / "model.safetensors")
    description = {"bits": bits, "group_size": group_size, "desc_act": act_order, "sym": symmetric}
    (directory / "quantize_config.json").write_text(json.dumps(description))
    return weights


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, True), (4, -1, True), (3, 64, True), (8, 32, True), (4, 64, False)]
)
def test_checkpoints_packed_by_auto_gptq(bits, group_size, symmetric, act_order, tmp_path, report):
    expected = gptq_checkpoint(tmp_path / "existing", bits, group_size, symmetric, act_order)
    source = checkpoint_source("random", str(tmp_path / "existing"))
    manifest = import_checkpoint(source, "gptq", {}, tmp_path / "ours").manifest
    assert manifest["scheme"]["symmetric"] == symmetric
    model = odyssey.load_quantized(tmp_path / "ours")
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).dequantized().half(), weight)
    ordered = [name for name in expected if model.get_submodule(name).order is not None]
    assert bool(ordered) == (act_order and group_size != -1)
    case = f"{bits} bits, group {group_size}, {'sym' if symmetric else 'asym'}, act-order {act_order}"
    report.add("Existing checkpoints: auto-gptq's packed layers", case, layers=len(expected), equal=len(expected))


def test_a_checkpoint_saved_by_autoawq(testbed, tmp_path, report):
    """Its whole path: load, quantize, save; the saved integers against its own unpacking."""
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    original = tmp_path / "original"
    shutil.copytree(testbed.source.path, original)
    model = AutoAWQForCausalLM.from_pretrained(str(original), device_map=None, safetensors=True)
    texts = [testbed.tokenizer.decode(row[:400]) for row in testbed.tokens.tokens[:8]]
    model.quantize(
        testbed.tokenizer,
        quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        calib_data=texts, max_calib_samples=8, max_calib_seq_len=512,
    )  # fmt: skip
    model.save_quantized(str(tmp_path / "awq"))
    testbed.tokenizer.save_pretrained(tmp_path / "awq")
    source = checkpoint_source("testbed-28m", str(tmp_path / "awq"))
    manifest = import_checkpoint(source, "awq", {}, tmp_path / "ours").manifest
    assert manifest["label"] == "W4A16-g128"
    stored = {}
    for shard in (tmp_path / "awq").glob("*.safetensors"):
        stored.update(load_file(shard))
    loaded, layers = odyssey.load_quantized(tmp_path / "ours"), 0
    for key in [key for key in stored if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        tensors = [stored[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")]
        theirs = dequantize_gemm(*tensors, 4, 128).t()
        assert torch.equal(loaded.get_submodule(name).dequantized().to(theirs.dtype), theirs)
        layers += 1
    assert layers == 7 * testbed.architecture.num_blocks
    report.add("Existing checkpoints: saved by autoawq", "testbed-28m", layers=layers, equal=layers)
