import json
import shutil

import pytest
import torch
from helpers.checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from baselines.rtn import RtnMethod, RtnSettings
from odyssey.errors import InvalidCheckpointError, UnsupportedError
from odyssey.methods import settings_dict
from odyssey.models.architecture import LlamaFamily
from odyssey.models.load import load_model, load_tokenizer
from odyssey.models.reader import CheckpointReader
from odyssey.models.source import checkpoint_fingerprint, resolve_model
from odyssey.quantization.checkpoint import REST_NAME, load_quantized
from odyssey.quantization.pipeline import quantize_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_block_by_block_equals_transformers_forward(tmp_path, family):
    directory = write_checkpoint(tmp_path / "model", family=family)
    architecture, reader = LlamaFamily.from_directory(directory), CheckpointReader(directory)
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    forward = architecture.block_forward(CPU)
    with torch.no_grad():
        hidden = architecture.embedder(reader, CPU)(tokens)
        for index in range(architecture.num_blocks):
            hidden = forward(architecture.load_block(reader, index, CPU), hidden)
        ours = model.lm_head(model.model.norm(hidden))
        assert torch.equal(ours, model(tokens).logits)


_SHAPE = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_SLIDING = {"sliding_window": 40, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("config", "dtype", "positions"),
    [
        (LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE), torch.bfloat16, 64),
        (LlamaConfig(**_SHAPE, head_dim=32, attention_bias=True, mlp_bias=True), torch.float32, 64),
        (MistralConfig(**_SHAPE, sliding_window=40), torch.bfloat16, 40),
        (MistralConfig(**_SHAPE, sliding_window=None), torch.float16, 64),
        (Qwen2Config(**_SHAPE, tie_word_embeddings=True, use_sliding_window=False, **_SLIDING), torch.bfloat16, 64),
        (Qwen2Config(**_SHAPE, use_sliding_window=True, **_SLIDING), torch.float16, 40),
    ],
    ids=["llama-3.1", "llama with biases", "mistral", "mistral without window", "qwen2", "qwen2 with window"],
)
def test_every_kind_of_model_as_far_as_its_window(tmp_path, config, dtype, positions):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data.normal_(name.endswith("norm.weight"), 0.3)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    architecture, reader = LlamaFamily.from_directory(tmp_path), CheckpointReader(tmp_path)
    assert architecture.max_positions == positions
    tokens = torch.randint(256, (2, positions), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    forward = architecture.block_forward(CPU)
    with torch.no_grad():
        expected = reference(tokens).logits
        assert torch.equal(load_model(resolve_model("local", path=str(tmp_path)))(tokens).logits, expected)
        hidden = architecture.embedder(reader, CPU)(tokens)
        for index in range(architecture.num_blocks):
            hidden = forward(architecture.load_block(reader, index, CPU), hidden)
        assert torch.equal(reference.lm_head(reference.model.norm(hidden)), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_load_model_equals_from_pretrained(tmp_path, tied):
    directory = write_checkpoint(tmp_path / "model", tied=tied, shard_size="200KB")
    source = resolve_model("local", path=str(directory))
    tokens = torch.arange(30)[None]
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(tokens).logits
    assert torch.equal(load_model(source)(tokens).logits, expected)
    assert load_tokenizer(source)("ab").input_ids == load_tokenizer(source)("ab").input_ids != []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 1, r"num_hidden_layers=1, but there are tensors of model\.layers\.1"),
        ("vocab_size", 100, r"model\.embed_tokens\.weight has shape \(\d+, 128\), config.json asks for \(100, 128\)"),
    ],
)
def test_a_config_of_a_smaller_model_is_refused_before_any_work(tmp_path, key, value, message):
    directory = write_checkpoint(tmp_path / "model", layers=2)
    settings = settings_dict(RtnSettings())
    quantize_checkpoint(
        resolve_model("local", path=str(directory)), RtnMethod(), settings, None, tmp_path / "whole", device=CPU
    )
    for written in (directory, tmp_path / "whole"):
        _edit_config(written, **{key: value})
    source = resolve_model("local", path=str(directory))
    with pytest.raises(InvalidCheckpointError, match=message):
        load_model(source)
    with pytest.raises(InvalidCheckpointError, match=message):
        quantize_checkpoint(source, RtnMethod(), settings, None, tmp_path / "out", device=CPU)
    with pytest.raises(InvalidCheckpointError, match=message):
        load_quantized(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_that_contradicts_the_config_is_refused_before_any_work(tmp_path, tied):
    directory = write_checkpoint(tmp_path / "model", tied=tied, layers=1)
    source, settings = resolve_model("local", path=str(directory)), RtnSettings()
    tensors = load_file(directory / "model.safetensors")

    def results():
        yield lambda: load_model(source)
        yield lambda: quantize_checkpoint(
            source, RtnMethod(), settings_dict(settings), None, tmp_path / "out", device=CPU
        )

    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        for result in results():
            result()
        tensors["lm_head.weight"][3, 5] += 1
        message = r"lm_head\.weight differs from model\.embed_tokens\.weight, to which config\.json ties it"
        # A checkpoint quantized before this was refused says so when it is loaded.
        rest = load_file(tmp_path / "out" / REST_NAME)
        save_file({**rest, "lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "out" / REST_NAME)
        with pytest.raises(InvalidCheckpointError, match=message):
            load_quantized(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    else:
        del tensors["lm_head.weight"]
        message = r"lm_head\.weight is missing and config\.json does not tie it"
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for result in results():
        with pytest.raises(InvalidCheckpointError, match=message):
            result()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def _edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_architecture_is_refused(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedError, match="model_type 'gpt2' is not supported; supported: llama, mistral, qwen2"):
        LlamaFamily.from_directory(directory)


def test_an_already_quantized_checkpoint_is_refused(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    _edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match="already quantized"):
        LlamaFamily.from_directory(directory)


def test_shapes_that_contradict_the_config_are_refused(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    _edit_config(directory, intermediate_size=512)
    architecture, reader = LlamaFamily.from_directory(directory), CheckpointReader(directory)
    with pytest.raises(InvalidCheckpointError, match=r"mlp.gate_proj.weight has shape \(256, 128\)"):
        architecture.load_block(reader, 0, CPU)


def test_fingerprint_follows_content_not_place(tmp_path):
    first = write_checkpoint(tmp_path / "a", seed=0)
    same = write_checkpoint(tmp_path / "b", seed=0)
    other = write_checkpoint(tmp_path / "c", seed=1)
    assert checkpoint_fingerprint(first) == checkpoint_fingerprint(same) != checkpoint_fingerprint(other)


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InvalidCheckpointError, match="no usable tokenizer"):
        load_tokenizer(resolve_model("local", path=str(directory)))
