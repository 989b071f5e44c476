"""Checkpoints saved on several processes become Hugging Face folders, and none runs code that it carries."""

import os
import pickle

import pytest
import save_worker
import torch
from engine_models import DENSE, MOE, config_of, save
from engine_processes import finish, start
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from transformers import AutoModelForCausalLM

from gated_attention.engine import GuardedCheckpointerConfig, engine_config, export_checkpoint, load_weights
from gated_attention.engine import checkpoints as engine_checkpoints
from gated_attention.models.convert.storage import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process saves


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two models, and their checkpoints saved on four processes."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, size in (("dense", DENSE), ("moe", MOE)):
        save("sdpa-elementwise", size, folder / name)
    finish(start(4, folder / "saving", save_worker.main, folder))
    return folder


@pytest.mark.parametrize(("name", "size"), [("dense", DENSE), ("moe", MOE)])
def test_a_checkpoint_of_four_processes_becomes_a_folder(sharded, tmp_path, monkeypatch, name, size):
    held = []
    read = engine_checkpoints.load_keys

    def watched(place, keys):
        held.append(keys)
        return read(place, keys)

    monkeypatch.setattr(engine_checkpoints, "load_keys", watched)
    config = config_of("sdpa-elementwise", size)
    export_checkpoint(sharded / f"{name}-saved", config, tmp_path / "out", max_shard_bytes=10_000)
    assert len(held) > 10  # a tensor at a time, and once each
    assert all(len(keys) == 1 for keys in held)
    assert len({keys[0] for keys in held}) == len(held)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    expected, found = open_checkpoint(sharded / name), open_checkpoint(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(found[tensor].equals(expected[tensor]) for tensor in expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == ("GatedQwen3MoeForCausalLM" if size is MOE else "GatedQwen3ForCausalLM")


def test_another_configuration_is_refused(sharded, tmp_path):
    with pytest.raises(ValueError, match=r"has nothing for blocks\.0\.attention\.v_g_proj\.weight"):
        export_checkpoint(sharded / "dense-saved", config_of("value-headwise", DENSE), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Payload:
    """What a hostile pickle does: here it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint of one process, as the trainer lays it out."""
    save("baseline", DENSE, tmp_path / "model")
    model = engine_config(config_of("baseline", DENSE)).build()
    load_weights(model, tmp_path / "model")
    folder = tmp_path / "run" / "step5"
    save_model_and_optim_state(folder / "model_and_optim", model)
    (folder / "train").mkdir()
    torch.save({"global_step": 5, "rng": torch.get_rng_state()}, folder / "train" / "rank0.pt")
    (folder / ".metadata.json").write_text("{}")
    return folder


def load(checkpoint, tmp_path):
    class Module:
        def state_dict_to_load(self, metadata, optim=None):
            return {"model": {"lm_head.norm.weight": torch.zeros(DENSE.hidden_size)}}

        def load_state_dict(self, state):
            self.state = state

    module = Module()
    state = GuardedCheckpointerConfig(work_dir=str(tmp_path / "work")).build().load(checkpoint, module)
    return state, module.state["model"]["lm_head.norm.weight"]


def test_its_own_checkpoint_loads(checkpoint, tmp_path):
    state, norm = load(checkpoint, tmp_path)
    assert state["global_step"] == 5
    assert norm.equal(torch.ones(DENSE.hidden_size))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("where", ["trainer", "index", "tensor"])
def test_a_foreign_checkpoint_runs_no_code(checkpoint, tmp_path, where):
    made = tmp_path / "made-by-the-payload"
    if where == "trainer":
        torch.save({"global_step": Payload(made)}, checkpoint / "train" / "rank0.pt")
    elif where == "index":
        (checkpoint / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(Payload(made)))
    else:
        for file in (checkpoint / "model_and_optim").glob("*.distcp"):
            torch.save(Payload(made), file)
            size = file.stat().st_size
        path = checkpoint / "model_and_optim" / ".metadata"
        index = pickle.loads(path.read_bytes())
        for stored in index.storage_data.values():
            stored.offset, stored.length = 0, size
        path.write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"asks for posix.mkdir and is refused"):
        load(checkpoint, tmp_path)
    assert not made.exists()
