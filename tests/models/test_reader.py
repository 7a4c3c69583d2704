import json

import pytest
import torch
from helpers.checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from odyssey.errors import InvalidCheckpointError
from odyssey.models.reader import INDEX_NAME, CheckpointReader


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "model", shard_size="200KB")


def test_reads_the_same_tensors_from_shards_and_from_one_file(tmp_path, sharded):
    single = write_checkpoint(tmp_path / "single")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = load_file(next(iter(single.glob("*.safetensors"))))
    reader = CheckpointReader(sharded)
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape)


def test_a_missing_shard_is_named(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InvalidCheckpointError, match=f"{victim.name}: missing shard"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_shard_is_named(sharded, keep):
    victim = sorted(sharded.glob("*.safetensors"))[0]
    data = victim.read_bytes()
    victim.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidCheckpointError, match=f"{victim.name}: truncated or damaged"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("content", [b"[1]", b'{"weight_map": 5}', b'{"weight_map": {"a": 5}}', b"\xff", b"{}"])
def test_an_index_that_is_none(sharded, content):
    (sharded / INDEX_NAME).write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match=f"{INDEX_NAME}: not a valid index"):
        CheckpointReader(sharded)


def test_an_index_that_names_an_absent_tensor(sharded):
    index_path = sharded / INDEX_NAME
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    index_path.write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpointError, match="model.ghost.weight is in the index but not in this shard"):
        CheckpointReader(sharded)


def test_nan_weights_are_refused_by_name(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    file = next(iter(directory.glob("*.safetensors")))
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InvalidCheckpointError, match=f"{name} has NaN or Inf"):
        CheckpointReader(directory).read(name)


def test_pickled_weights_get_a_hint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidCheckpointError, match="save_pretrained"):
        CheckpointReader(tmp_path)
