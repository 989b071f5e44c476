"""The command, the folder it writes, and gates for models without one."""

import pytest
import torch
from checkpoints import EXPERTS, assert_same_model, logits, random_model, save, sizes, weights, write_release
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from gated_attention.cli import main
from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.models.convert import convert
from gated_attention.spec import GateSpec


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, arguments)])
    return stop.value.code


@pytest.mark.parametrize("add_gate", [GateSpec(granularity="headwise"), GateSpec(), (GateSpec(), GateSpec("value"))])
@pytest.mark.parametrize("moe", [False, True])
def test_a_gate_is_added_and_changes_nothing_at_first(moe, add_gate, tmp_path):
    config = Qwen3MoeConfig(**sizes(), **EXPERTS) if moe else Qwen3Config(**sizes())
    source = save(config, tmp_path / "source")
    done = convert(source, tmp_path / "gated", add_gate=add_gate)
    assert torch.equal(logits(tmp_path / "gated"), logits(source))
    assert {gate.scale for gate in done.gates} == {2.0}
    assert "neither removes" in done.warnings[0]
    convert(source, tmp_path / "normal", add_gate=add_gate, init="normal")
    assert not torch.equal(logits(tmp_path / "normal"), logits(source))


def test_an_added_bias_is_the_constant_of_its_gate(tmp_path):
    source = save(Qwen3Config(**sizes()), tmp_path / "source")
    convert(source, tmp_path / "biased", add_gate=GateSpec(granularity="headwise", bias=1.5), init="normal")
    biases = [x for name, x in weights(tmp_path / "biased").items() if name.endswith("g_proj.bias")]
    assert biases
    assert all((x == 1.5).all() for x in biases)


def test_the_command_adds_a_gate_and_says_what_to_expect(tmp_path, capsys):
    source = save(Qwen3Config(**sizes()), tmp_path / "source")
    assert command(source, tmp_path / "gated", "--add-gate", "sdpa-headwise") == 0
    output = capsys.readouterr().out
    assert "Qwen3 -> gated_qwen3: G1 sdpa headwise 2*sigmoid zero init" in output
    assert "barely moves" in output
    assert "gated-attention adapt" in output
    assert torch.equal(logits(tmp_path / "gated"), logits(source))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "llama"], "'llama' is not one of 'gated', 'qwen3_next', 'qwen3_5'"),
        (["--to", "qwen3_next"], "no gate"),
        (["--to", "qwen3_next", "--add-gate", "sdpa-headwise"], "scale=2.0"),
        (["--to", "qwen3_next", "--self-contained"], "transformers itself"),
        (["--add-gate", "baseline"], "'baseline' is no gate"),
        (["--add-gate", "sandwich-norm-lr-8"], "choose one that is gates and nothing else"),
        (["--add-gate", "learned-sink"], "changes the model"),
        (["--init", "normal"], "add_gate"),
        (["--add-gate", "sdpa-headwise", "--init", "ones"], "'ones' is not one of 'normal', 'zeros'"),
        (["--max-shard-size", "many"], "write e.g. 500MB or 2GB"),
    ],
)
def test_requests_that_make_no_sense(arguments, message, tmp_path, capfd):
    source = save(Qwen3Config(**sizes()), tmp_path / "source")
    capfd.readouterr()
    assert command(source, tmp_path / "out", *arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_gate_gets_no_second(tmp_path):
    write_release(tmp_path / "source", "headwise")
    with pytest.raises(ValueError, match="has a gate already"):
        convert(tmp_path / "source", tmp_path / "out", add_gate=GateSpec())


def test_weights_are_split_and_small_files_come_along(tmp_path):
    write_release(tmp_path / "source", "headwise")
    for name in ("model.gguf", "optimizer.pt", "chat_template.jinja"):
        (tmp_path / "source" / name).write_text("")
    done = convert(str(tmp_path / "source"), str(tmp_path / "gated"), max_shard_bytes=10_000)
    assert {"tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"} < set(done.files)
    assert not {"modeling_qwen3.py", "model.gguf", "optimizer.pt", "pytorch_model.bin"} & set(done.files)
    convert(tmp_path / "gated", tmp_path / "whole")
    assert_same_model(tmp_path / "gated", tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert done.num_parameters == sum(tensor.numel() for tensor in weights(tmp_path / "whole").values())


@torch.no_grad()
def test_every_way_to_load_a_converted_folder(tmp_path):
    model = write_release(tmp_path / "source", "elementwise")
    convert(tmp_path / "source", tmp_path / "gated")
    for kind in (GatedQwen3ForCausalLM, AutoModelForCausalLM):
        loaded, report = kind.from_pretrained(tmp_path / "gated", output_loading_info=True)
        assert type(loaded) is GatedQwen3ForCausalLM
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())


def test_pickles_of_old_pytorch_are_read(tmp_path):
    write_release(tmp_path / "source", "headwise")
    convert(tmp_path / "source", tmp_path / "new")
    path = tmp_path / "source" / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    convert(tmp_path / "source", tmp_path / "old")
    assert_same_model(tmp_path / "new", tmp_path / "old")


def test_pickles_in_several_files_are_read(tmp_path):
    import json

    write_release(tmp_path / "source", "headwise")
    convert(tmp_path / "source", tmp_path / "one")
    path = tmp_path / "source" / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    path.unlink()
    files = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, path.with_name(file))
    path.with_name("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    convert(tmp_path / "source", tmp_path / "several")
    assert_same_model(tmp_path / "one", tmp_path / "several")


def test_an_empty_folder_here_is_filled(tmp_path, monkeypatch):
    write_release(tmp_path / "source", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command("../source", ".") == 0
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert "# here" in (tmp_path / "here" / "README.md").read_text()


def test_folders_inside_hub_repositories(tmp_path, monkeypatch, capsys):
    write_release(tmp_path / "1B_gate_headwise", "headwise")
    asked = []

    def download(name, **patterns):
        asked.append((name, patterns["allow_patterns"][0]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert command("owner/repository/1B_gate_headwise", tmp_path / "out") == 0
    assert asked == [("owner/repository", "1B_gate_headwise/*.json")]
    assert "the paper's release, headwise -> gated_qwen3: G1 sdpa headwise" in capsys.readouterr().out
    assert "base_model: owner/repository" in (tmp_path / "out" / "README.md").read_text()


def test_the_home_folder_is_found_where_no_shell_writes_it_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_release(tmp_path / "source", "headwise")
    convert("~/source", "~/target")
    assert (tmp_path / "target" / "config.json").is_file()


def test_an_empty_source_is_not_the_current_folder(tmp_path):
    with pytest.raises(ValueError, match="the source is empty; give a folder, or a hub name"):
        convert("", tmp_path / "target")


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "owner/repository"])
def test_sources_that_are_not_there(source, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert command(source, "out") == 2
    error = capfd.readouterr().err
    assert f"{source} is not a folder" in error
    assert error.count("\n") == 1


def test_the_folder_carries_a_card_and_its_code(tmp_path):
    write_release(tmp_path / "source", "headwise")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# theirs\n\n## Theirs\n")
    done = convert(tmp_path / "source", tmp_path / "gated", self_contained=True)
    card = (tmp_path / "gated" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "trust_remote_code=True" in card
    assert "# gated" in card
    assert "Theirs" not in card
    assert "modeling_gated_qwen3.py" in done.files


def test_float64_of_a_source_stays(tmp_path):
    random_model(GatedQwen3Config(**sizes(), gates=GateSpec())).double().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "again")
    assert_same_model(tmp_path / "source", tmp_path / "again")
