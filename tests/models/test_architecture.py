import json

import pytest
import torch
from helpers.checkpoints import write_checkpoint
from transformers import AutoModelForCausalLM

from odyssey.errors import InvalidCheckpointError, UnsupportedError
from odyssey.models.architecture import LlamaFamily
from odyssey.models.load import load_model, load_tokenizer
from odyssey.models.reader import CheckpointReader
from odyssey.models.source import checkpoint_fingerprint, resolve_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_block_by_block_equals_transformers_forward(tmp_path, family):
    directory = write_checkpoint(tmp_path / "model", family=family)
    architecture, reader = LlamaFamily.from_directory(directory), CheckpointReader(directory)
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    forward = architecture.block_forward(CPU)
    with torch.no_grad():
        hidden = architecture.embed(reader, tokens, CPU)
        for index in range(architecture.num_blocks):
            hidden = forward(architecture.load_block(reader, index, CPU), hidden)
        ours = model.lm_head(model.model.norm(hidden))
        assert torch.equal(ours, model(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_load_model_equals_from_pretrained(tmp_path, tied):
    directory = write_checkpoint(tmp_path / "model", tied=tied, shard_size="200KB")
    source = resolve_model("local", path=str(directory))
    tokens = torch.arange(30)[None]
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(tokens).logits
    assert torch.equal(load_model(source)(tokens).logits, expected)
    assert load_tokenizer(source)("ab").input_ids == load_tokenizer(source)("ab").input_ids != []


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
