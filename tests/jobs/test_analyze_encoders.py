"""`analyze` on models that look ahead: BERT on text, a vision transformer on a folder of images."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from gated_attention.analysis import TextBatch, inspect_model
from gated_attention.cli import main
from gated_attention.jobs.analyze import AnalysisPlan, analyze
from gated_attention.jobs.images import image_batches, load_images
from gated_attention.models.families.add_gates import add_gates
from gated_attention.spec import GateSpec

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def encoded(seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for index in range(3):
        (folder / f"{index}.png").write_bytes(encoded(index))
    table = pa.table({"image": [encoded(3), encoded(4, "JPEG")], "label": [0, 1]})
    pq.write_table(table, folder / "more" / "a.parquet")
    return str(folder)


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    model = add_gates(ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=2)), GateSpec())
    model.save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.fixture
def bert(tmp_path):
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    BertForMaskedLM(BertConfig(**SMALL, vocab_size=12, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_vision_transformer_reads_images_and_the_page_says_patch(vit, images, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyze", vit, "--data", images, "--device", "cpu", "--output", str(tmp_path / "out")])
    assert stop.value.code == 0
    page = (tmp_path / "out" / "analysis.md").read_text()
    assert "85 patches in sequences of 17" in page
    assert "every patch sees all others" in page
    assert "of its attention to the class token" in page
    assert "Half of the passages" not in page
    [model] = json.loads((tmp_path / "out" / "analysis.json").read_text())["models"]
    assert model["family"] == "gated_vit"
    assert model["num_sequences"] == 5
    assert model["summary"]["attention_cls"] == pytest.approx(1 / 17, rel=0.1)
    assert model["excerpt"] == []
    assert 0.3 < np.mean(model["gates"]["sdpa"]["measures"]["gate_mean"]) < 0.7


def test_bert_reads_passages_between_its_own_special_tokens(bert, tmp_path):
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 200)
    (tmp_path / "more").mkdir()
    for index in range(4):
        (tmp_path / "more" / f"{index}.txt").write_text("a b c d e f g h " * 50)
    plan = AnalysisPlan((bert,), str(tmp_path / "more"), num_tokens=64, context=16)
    [found] = analyze(plan, CPU)
    assert found.excerpt[0] == "[CLS]"
    assert found.excerpt[-1] == "[SEP]"
    assert found.inspection.positions == ("cls", *["content"] * 14, "sep")
    assert found.inspection.looks_ahead
    assert found.inspection.overall("attention_sep") == pytest.approx(1 / 16, rel=0.1)


def test_images_are_resized_and_normalised_as_the_folder_says(vit, images, tmp_path):
    stored = load_images(images)
    assert len(stored) == 5
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    vision = ViTForImageClassification(ViTConfig(**SMALL, image_size=10, patch_size=2))
    [batch] = image_batches(stored[:1], vision, vit, num_images=1, batch_size=4)
    exact = np.array(Image.open(stored[0])).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(batch.inputs["pixel_values"][0], exact, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [({"do_normalize": False, "image_mean": [9.0] * 3}, 0, 1), ({"image_std": [0.25] * 3}, 0.5, 0.25), ({}, 0.5, 0.5)],
)
def test_a_model_of_the_hub_is_normalised_as_its_files_say(vit, images, tmp_path, monkeypatch, settings, mean, std):
    (tmp_path / "kept.json").write_text(json.dumps(settings))
    monkeypatch.setattr(
        "gated_attention.jobs.images.cached_file",
        lambda source, name, **_: {"owner/vit": tmp_path / "kept.json"}[source],
    )
    vision = ViTForImageClassification(ViTConfig(**SMALL, image_size=10, patch_size=2))
    stored = load_images(images)[:1]
    [batch] = image_batches(stored, vision, "owner/vit", num_images=1, batch_size=1)
    exact = (np.array(Image.open(stored[0])).transpose(2, 0, 1) / 255 - mean) / std
    np.testing.assert_allclose(batch.inputs["pixel_values"][0], exact, atol=1e-5)


def test_deep_and_turned_images_keep_their_light_and_their_top(vit, tmp_path):
    grey = np.arange(100, dtype=np.uint16).reshape(10, 10) * 600
    Image.fromarray(grey).save(tmp_path / "a.png")
    turned = Image.fromarray((grey // 257).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.rotate(180).save(tmp_path / "b.png", exif=exif)
    vision = ViTForImageClassification(ViTConfig(**SMALL, image_size=10, patch_size=2))
    [batch] = image_batches([tmp_path / "a.png", tmp_path / "b.png"], vision, vit, num_images=2, batch_size=2)
    for found in batch.inputs["pixel_values"]:
        np.testing.assert_allclose(found[0] * 0.5 + 0.5, grey / 65535, atol=1 / 255)


def test_settings_of_text_and_of_other_models_are_refused_for_images(vit, images, tmp_path):
    for options in ({"context": 9}, {"tokenizer": "bytes"}):
        with pytest.raises(ValueError, match="reads images; leave out --context and --tokenizer"):
            list(analyze(AnalysisPlan((vit,), images, **options), CPU))
    with pytest.raises(ValueError, match="no next-token loss"):
        list(analyze(AnalysisPlan((vit,), str(tmp_path / "none"), ablate=2), CPU))  # before anything is read
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    with pytest.raises(ValueError, match="do not fit 3 channels"):
        list(analyze(AnalysisPlan((vit,), images), CPU))
    ViTMAEModel(ViTMAEConfig(**SMALL, image_size=8, patch_size=2)).save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="a random part of the patches; set mask_ratio to 0"):
        list(analyze(AnalysisPlan((str(tmp_path / "mae"),), images), CPU))
    parts = {"text_config": SMALL, "vision_config": {**SMALL, "image_size": 8, "patch_size": 2}}
    CLIPModel(CLIPConfig(**parts)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="has several encoders"):
        list(analyze(AnalysisPlan((str(tmp_path / "clip"),), images), CPU))


def test_roberta_has_fewer_positions_than_its_table_has_rows(bert, tmp_path):
    config = RobertaConfig(**SMALL, vocab_size=16, max_position_embeddings=20, pad_token_id=0)
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    for path in (tmp_path / "bert").glob("tokenizer*"):
        (tmp_path / "roberta" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("a b c d e f g h " * 50)
    plan = AnalysisPlan((str(tmp_path / "roberta"),), str(tmp_path / "more"), num_tokens=64)
    [found] = analyze(plan, CPU)
    assert found.inspection.length == 19
    with pytest.raises(ValueError, match="context 20 exceeds the 19 positions"):
        list(analyze(replace(plan, context=20), CPU))
    with pytest.raises(ValueError, match="no room between special tokens"):
        list(analyze(replace(plan, context=2), CPU))


def test_clip_reads_text_from_left_to_right():
    config = CLIPTextConfig(**SMALL, vocab_size=20, max_position_embeddings=16, eos_token_id=19)
    ids = torch.randint(0, 19, (3, 12))
    found = inspect_model(CLIPTextModel(config), [TextBatch(ids, None, ("cls", *["content"] * 10, "sep"))])
    assert not found.looks_ahead
    np.testing.assert_allclose(found.measures["f_attn_uniform"], np.mean([1 / n for n in range(2, 13)]), rtol=1e-6)


def test_what_is_no_image_is_refused(vit, bert, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no")
    for source, message in ((tmp_path / "bad", "x.png is no image"), (tmp_path / "none", "no images at")):
        with pytest.raises(ValueError, match=message):
            list(analyze(AnalysisPlan((vit,), str(source)), CPU))
    with pytest.raises(ValueError, match="give --data a folder of images"):
        list(analyze(AnalysisPlan((vit,)), CPU))
    speech = WhisperForConditionalGeneration(
        WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, vocab_size=8,
                      decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=10,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    )  # fmt: skip
    speech.save_pretrained(tmp_path / "speech")
    with pytest.raises(ValueError, match="reads input_features; analyze reads text and images"):
        list(analyze(AnalysisPlan((str(tmp_path / "speech"),), str(tmp_path)), CPU))
