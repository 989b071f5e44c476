"""Which files of a folder are read, where they may lie, and what the new folder's files are."""

import json
import os
import shutil

import pytest
import torch
from checkpoints import assert_same_model, read_config, save, sizes, weights
from safetensors.torch import load_file, save_file

from gated_attention.models import GatedQwen3Config
from gated_attention.models.convert import convert
from gated_attention.spec import GateSpec

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path):
    return save(GatedQwen3Config(**sizes(), gates=GateSpec()), tmp_path / "source")


def shard(folder, second):
    """Move the norm at the end into a second file, beside what else that is to hold."""
    state = load_file(folder / "model.safetensors")
    last = {"model.norm.weight": state.pop("model.norm.weight")} | second
    save_file(state, folder / FIRST, metadata={"format": "pt"})
    save_file(last, folder / SECOND, metadata={"format": "pt"})
    weight_map = dict.fromkeys(last, SECOND) | dict.fromkeys(state, FIRST)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_says_whose_tensor_it_is(source, tmp_path):
    shutil.copytree(source, tmp_path / "whole")
    shard(source, {K_PROJ: torch.zeros_like(weights(source)[K_PROJ])})
    (source / "model.safetensors").unlink()
    convert(source, tmp_path / "out")
    assert_same_model(tmp_path / "out", tmp_path / "whole")


def test_a_single_file_goes_before_shards(source, tmp_path):
    shutil.copytree(source, tmp_path / "whole")
    shard(source, {})
    save_file({name: tensor + 1 for name, tensor in load_file(source / FIRST).items()}, source / FIRST)
    convert(source, tmp_path / "out")
    assert_same_model(tmp_path / "out", tmp_path / "whole")


def test_the_file_that_the_configuration_names_goes_before_both(source, tmp_path):
    shutil.copytree(source, tmp_path / "whole")
    state = load_file(source / "model.safetensors")
    save_file(state, source / "other.safetensors", metadata={"format": "pt"})
    save_file({name: tensor + 1 for name, tensor in state.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(read_config(source) | {"transformers_weights": "other.safetensors"}))
    convert(source, tmp_path / "out")
    assert_same_model(tmp_path / "out", tmp_path / "whole")
    (source / "config.json").write_text(json.dumps(read_config(source) | {"transformers_weights": "../o.safetensors"}))
    with pytest.raises(ValueError, match=r"'\.\./o\.safetensors', which is outside its folder"):
        convert(source, tmp_path / "again")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "README.md"])
def test_links_that_leave_the_folder_are_refused(name, source, tmp_path):
    (source / name).touch()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(source / name, tmp_path / "elsewhere" / name)
    (source / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(ValueError, match=rf"source/{name} is a link to .*elsewhere/{name}, outside its folder"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_shards_in_a_folder_below_are_refused(source, tmp_path):
    shard(source, {})
    (source / "model.safetensors").unlink()
    (source / "below").mkdir()
    shutil.move(source / SECOND, tmp_path / SECOND)
    (source / "below" / SECOND).symlink_to(tmp_path / SECOND)
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(SECOND, f"below/{SECOND}"))
    with pytest.raises(ValueError, match=rf"below/{SECOND} is a link"):
        convert(source, tmp_path / "out")


def test_links_within_the_folder_and_in_the_cache_of_the_hub_are_followed(source, tmp_path):
    (source / "model.safetensors").rename(source / "weights")
    (source / "model.safetensors").symlink_to("weights")
    convert(source, tmp_path / "out")
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots" / "rev").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "out").iterdir())):
        shutil.copy(path, cache / "blobs" / str(number))
        (cache / "snapshots" / "rev" / path.name).symlink_to(f"../../blobs/{number}")
    convert(cache / "snapshots" / "rev", tmp_path / "again")
    assert_same_model(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_others_may_read_what_the_umask_lets_them(umask, folder, file, source, tmp_path):
    before = os.umask(umask)
    try:
        convert(source, tmp_path / "out", self_contained=True, max_shard_bytes=20_000)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == dict.fromkeys(
        os.listdir(tmp_path / "out"), file
    )
