"""A run's file: read, changed, refused, filled in and written again; needs no OLMo-core."""

import json

import datasets
import numpy as np
import pytest

from gated_attention.engine.run.run_file import RUN_NAME, read_run
from gated_attention.engine.run.token_folders import read_folders
from gated_attention.registry.penalty import AuxiliaryWeights
from gated_attention.shards.unfinished import TokenizeConfig
from gated_attention.spec import GateSpec
from gated_attention.train.text.tokenize import tokenize

PLAIN = 'name = "one"\n[model]\nsize = "tiny"\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def written(tmp_path):
    def write(text=PLAIN):
        path = tmp_path / "one.toml"
        path.write_text(text)
        return path

    return write


def test_what_is_not_said_follows_from_the_size(written):
    run = read_run(written(), on_gpu=False)
    assert (run.variant, run.steps, run.context, run.learning_rate) == ("baseline", 240, 256, 4e-3)
    assert run.file.data.text == "stdlib"
    assert run.file.data.tokenizer == "bytes"
    assert run.size.vocab_size == 257
    assert (run.file.evaluation.every, run.file.evaluation.probe_every) == (48, 48)
    assert read_run(written(), ["evaluation.probe_every=0"]).file.evaluation.probe_every == 0
    assert (run.file.precision.compute, run.file.precision.compile) == ("float32", False)
    assert read_run(written()).file.precision.compute == "bfloat16"


def test_the_resolved_file_is_the_same_run(written, tmp_path):
    changes = ["data.packing=documents", 'model.gates=[{site = "value"}, {granularity = "headwise"}]', "seed=7"]
    run = read_run(written(), changes, on_gpu=False)
    (tmp_path / RUN_NAME).write_text(run.toml())
    again = read_run(tmp_path / RUN_NAME)
    assert again == run
    assert again.block.gates == (GateSpec(granularity="headwise"), GateSpec("value"))
    assert again.folder(tmp_path) == tmp_path / "runs" / "one" / "custom" / "seed7"
    again.require_same(tmp_path / RUN_NAME)


def test_a_run_goes_on_in_another_layout_and_not_with_other_settings(written, tmp_path):
    run = read_run(written(), ["checkpoints.every=7"], on_gpu=False)
    (tmp_path / RUN_NAME).write_text(run.toml())
    read_run(written(), ["checkpoints.keep=9"], gpus=4, on_gpu=False).require_same(tmp_path / RUN_NAME)
    for change, message in (
        ("schedule.steps=10", "was run with schedule.steps 240, not 10"),
        ("model.output_clip=10.0", r"was run with model.variant 'baseline', not None|no setting model.output_clip"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run(written(), [change], on_gpu=False).require_same(tmp_path / RUN_NAME)


def test_tokens_steps_and_batches_follow_from_each_other(written):
    run = read_run(written(), ["schedule.tokens=1e6", "batch.sequences=32", "parallel.gpus=4"])
    assert run.tokens_per_step == 32 * 256
    assert run.steps == 123  # 122.07, rounded up
    assert run.micro == 8
    assert read_run(written(), ["batch.sequences=24"], gpus=4).micro == 6
    assert read_run(written(), ["batch.sequences=24", "batch.micro=4"], gpus=4).micro == 3


def test_a_mixture_has_the_weights_of_compare_and_a_dense_model_none(written, tmp_path):
    run = read_run(written(), ["model.size=moe-tiny", "auxiliary.router_z=0.5"])
    assert run.auxiliary == AuxiliaryWeights(load_balance=0.01, router_z=0.5)
    (tmp_path / RUN_NAME).write_text(run.toml())
    assert read_run(tmp_path / RUN_NAME) == run
    assert "load_balance" not in read_run(written()).toml()


def test_a_variants_factor_and_width_are_kept(written):
    run = read_run(written(), ["model.variant=sdpa-elementwise-lr-8"])
    assert run.learning_rate == 8e-3
    assert run.size.intermediate_size == 320
    assert (
        read_run(written(), ["model.variant=sdpa-elementwise", "model.match_parameters=false"]).size.intermediate_size
        == 384
    )


def test_a_model_is_a_size_or_its_fields(written):
    fields = (
        "num_hidden_layers = 2\nhidden_size = 64\nnum_attention_heads = 4\nnum_key_value_heads = 2\nhead_dim = 16\n"
        "intermediate_size = 128\nvocab_size = 500\n"
    )
    run = read_run(written('name = "own"\n[model]\n' + fields + "[data]\ncontext = 64\n"), ["schedule.steps=5"])
    assert (run.size.hidden_size, run.size.vocab_size, run.context) == (64, 500, 64)
    assert read_run(written(), ["model.num_hidden_layers=2"]).size.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimizer.learning-rate=1"], "unknown key 'learning-rate'; the nearest is 'learning_rate'"),
        (["modle.size=tiny"], "unknown key 'modle'; the nearest is 'model'"),
        (["schedule.steps=many"], "'schedule.steps' wrong: input should be a valid integer, not 'many'"),
        (["model.size=huge"], "unknown size 'huge'; choose from tiny, xs"),
        (["model.gates=[{sitee = 'value'}]"], "unknown gate field 'sitee'; choose from site"),
        (["model.variant=baseline", "model.output_clip=3.0"], "model.output_clip are both given"),
        (["model.variant=sdpa-headwise-sparse"], "has a gate penalty, which the engine has not; use `compare`"),
        (["schedule={steps = 3, tokens = 3.0}"], "schedule.steps and schedule.tokens are both given"),
        (["data={text = 'stdlib', paths = ['a']}"], "data.text and data.paths are both given"),
        (["parallel.gpus=6", "parallel.tensor=4"], "6 GPUs do not make 1 replicas of tensor 4 x context 1"),
        (["parallel.gpus=4", "parallel.tensor=4"], "num_attention_heads 6 does not divide by 4"),
        (["parallel.gpus=3", "parallel.tensor=3"], "vocab_size 257 does not divide by parallel.tensor 3; choose"),
        (["parallel.gpus=3"], "batch.sequences 8 does not divide by 3"),
        (["optimizer.learning_rate=-1.0"], "optimizer.learning_rate is -1.0; it must be above 0"),
        (["optimizer.beta2=1.0"], "optimizer.beta2 is 1.0; it must be at least 0 and below 1"),
        (["name=../../x"], "cannot name a folder"),
        (["steps"], "--set 'steps' sets nothing; write --set section.key=value"),
        (["name.x=3"], "name is no section"),
        (["data.bos=true", "data.packing=documents"], "which finds documents by EOS alone"),
        (["auxiliary.router_z=0.1"], "auxiliary.router_z is of routers, which the model has not"),
        (["model.size=moe-tiny", "auxiliary.router_z=-0.1"], "auxiliary.router_z is -0.1; it must be at least 0"),
        (["model.size=moe-tiny", "parallel.tensor=3", "parallel.gpus=3", "model.vocab_size=258"],
            "a mixture of experts is not trained with parallel.tensor above 1"),
        (["model.num_experts=4"], "num_experts_per_tok is 0 of num_experts 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(written, changes, message):
    with pytest.raises(ValueError, match=message):
        read_run(written(), changes)


@pytest.fixture
def shards(tmp_path):
    """Makes a folder of shards of lines `line 0`, `line 1`, ..., 40 characters to a document."""

    def make(name, tokenizer="bytes", shard_tokens=10**9):
        text = "".join(f"line {number}\n" for number in range(200))
        lines = [json.dumps({"text": text[start : start + 40]}) + "\n" for start in range(0, len(text), 40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        source = str(tmp_path / f"{name}.jsonl")
        return str(tokenize(TokenizeConfig((source,), tokenizer, shard_tokens=shard_tokens), tmp_path / name).folder)

    return make


def test_shards_say_their_vocabulary_and_must_be_whole(written, shards, tmp_path):
    folder = shards("tokens", shard_tokens=500)
    run = read_run(written(), [f"data.paths=['{folder}']"])
    assert run.size.vocab_size == 257
    assert run.file.data.tokenizer is None
    found = read_folders([folder])
    assert len(found.train) > 2
    assert found.vocab_size == 257
    with pytest.raises(ValueError, match=r"model.vocab_size is 256; the data's tokenizer has 257 tokens"):
        read_run(written(), ["model.vocab_size=256"]).with_vocabulary(257)
    with pytest.raises(ValueError, match="have different tokenizers"):
        read_folders([folder], shards("others", "bpe-260"))
    with pytest.raises(ValueError, match="is named twice"):
        read_folders([folder, folder])
    found.train[-1].unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_folders([folder])


def test_held_out_sequences_are_whole_and_evenly_spaced(shards):
    found = read_folders([shards("train")], shards("held-out", shard_tokens=500))
    files = [np.fromfile(path, found.dtype) for path in found.validation]
    rows = [row for ids in files for row in ids[: len(ids) // 16 * 16].reshape(-1, 16).tolist()]
    assert found.sequences(found.validation, 16) == len(rows) > 20
    assert found.held_out(16, 10**9).tolist() == rows
    assert found.held_out(16, 65).tolist() == [rows[place * len(rows) // 4] for place in range(4)]
