"""A model reads the same blocks from token shards as from the text they were made of."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from documents import texts, write

from gated_attention.shards import find_shards, open_shards
from gated_attention.shards.unfinished import TokenizeConfig
from gated_attention.study.plan import make_plan
from gated_attention.train.text.data import DataConfig, load_data
from gated_attention.train.text.tokenize import tokenize
from gated_attention.train.text.tokenizer import fingerprint, load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, held-out text that shares documents with it, and shards of both."""
    root = tmp_path_factory.mktemp("place")
    text = write(root / "text.jsonl", texts(200))
    held = write(root / "held.jsonl", texts(20, "held") + texts(3))
    for tokenizer in ("bytes", "bpe-280"):
        shards = tokenize(TokenizeConfig((text,), tokenizer, shard_tokens=5_000), root / tokenizer)
        tokenize(TokenizeConfig((held,), str(shards.tokenizer)), root / f"{tokenizer}-held")
    return root


def load(place, source, cache, **settings):
    return load_data(DataConfig(**{"source": str(place / source), "block_size": 32, **settings}), cache)


def same(found, wanted):
    for part in ("train", "validation"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        assert ours.ids.dtype == theirs.ids.dtype
        assert np.array_equal(ours.ids, theirs.ids)
        assert ours.opener == theirs.opener
        assert ours[3].keys() == theirs[3].keys()
    assert found.about == wanted.about
    assert fingerprint(found.tokenizer) == fingerprint(wanted.tokenizer)
    assert found.tokenizer("a") == wanted.tokenizer("a")
    assert len(found.train) > 100
    return True


@pytest.mark.parametrize("held", [None, "held"])
@pytest.mark.parametrize(
    ("tokenizer", "settings"),
    [
        ("bytes", {}),
        ("bytes", {"bos": True, "packing": "documents", "seed": 3}),
        ("bpe-280", {"packing": "documents", "held_out": 0.3}),
        ("bpe-280", {"bos": True, "max_validation_tokens": 200}),
    ],
)
def test_blocks_of_shards_are_those_of_the_text(place, tmp_path, tokenizer, settings, held):
    settings = {**settings, "tokenizer": str(place / tokenizer / "tokenizer")}
    validation = {"text": None, "shards": None}
    if held:
        validation = {"text": str(place / "held.jsonl"), "shards": str(place / f"{tokenizer}-held")}
    wanted = load(place, "text.jsonl", tmp_path, validation=validation["text"], **settings)
    assert same(load(place, tokenizer, tmp_path, validation=validation["shards"], **settings), wanted)
    if held:  # text beside shards, either way
        assert same(load(place, tokenizer, tmp_path, validation=validation["text"], **settings), wanted)
        assert same(load(place, "text.jsonl", tmp_path, validation=validation["shards"], **settings), wanted)
        assert not list(tmp_path.rglob("tokens.json"))


def test_documents_of_a_block_restart_their_positions(place, tmp_path):
    packed = load(place, "bpe-280", tmp_path, tokenizer="bpe-280", packing="documents")
    row = next(packed.train[i] for i in range(99) if (packed.train[i]["input_ids"][1:-1] == packed.train.opener).any())
    opened = row["input_ids"] == packed.train.opener
    assert (row["position_ids"][opened] == 0).all()
    assert (row["position_ids"] == 0).sum() == opened.sum() + (not opened[0])


def test_a_mixture_has_its_shares_of_the_tokens_in_both_parts(place, tmp_path):
    other = write(tmp_path / "other.jsonl", [f"OTHER {i} " + "CAPITALS\n" * (i % 7) for i in range(400)])
    tokenize(TokenizeConfig((other,)), tmp_path / "other")
    ours, theirs = (open_shards(folder).index.tokens for folder in (place / "bytes", tmp_path / "other"))
    for weights, share in (((1, 3), 0.75), ((3, 1), 0.25)):
        source = f"{place}/bytes={weights[0]},{tmp_path}/other={weights[1]}"
        packed = load_data(DataConfig(source=source, block_size=32, held_out=0.3), tmp_path / "cache")
        assert load_data(DataConfig(source=source, block_size=32, held_out=0.3), tmp_path / "b").about == packed.about
        total = min(ours / (1 - share), theirs / share)
        assert packed.about["train_tokens"] + packed.about["validation_tokens"] == pytest.approx(total, rel=0.02)
        for blocks in (packed.train, packed.validation):
            texts_of = packed.tokenizer.decode(np.asarray(blocks.ids).ravel().tolist()).split("<|endoftext|>")
            found = sum(len(text.encode()) + 1 for text in texts_of if text.startswith("OTHER"))
            assert found / blocks.num_tokens == pytest.approx(share, abs=0.06)
    weighed = find_shards(f"{place}/bytes=2,{tmp_path}/other=6")
    assert [share for _, share in weighed] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{0}/bytes=0.7,{0}/bpe-280=0.3", "have different tokenizers; write one again with --tokenizer"),
        ("{0}/bytes=0.7,{0}/bytes-held", "has no weight "),
        ("{0}/bytes=0.7,{0}/bytes-held=x", "has no weight 'x'"),
        ("{0}/bytes=0.7,{0}/bytes-held=0", "it must be above 0"),
        ("{0}/bytes=0.7,{0}/bytes=1", "is named twice"),
        ("{0}/bytes=0.7,{0}/text.jsonl=1", "has no tokens.json"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_a_line(place, tmp_path, source, reason):
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_data(DataConfig(source=source.format(place)), tmp_path)
    assert reason in str(caught.value)


def refusal(place, source, cache, **settings):
    with pytest.raises(ValueError, match=r"\S") as caught:
        load(place, source, cache, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_tokenizer_than_that_of_the_shards_is_refused(place, tmp_path):
    message = refusal(place, "bpe-280", tmp_path)
    assert (
        f"holds tokens of the tokenizer 'bpe-280', not of 'bytes'; choose {place}/bpe-280/tokenizer, or write"
        in message
    )
    assert "not of 'bpe-300'" in refusal(place, "bpe-280", tmp_path, tokenizer="bpe-300")
    both = {"tokenizer": "bpe-280", "validation": str(place / "bytes-held")}
    assert "bytes-held holds tokens" in refusal(place, "bpe-280", tmp_path, **both)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: os.truncate(folder / "part-00000.npy", 1000), "has 1,000 bytes, and tokens.json says"),
        (lambda folder: (folder / "part-00000.npy").unlink(), "is missing, and tokens.json says"),
        (lambda folder: (folder / "part-00000.csv.gz").unlink(), "part-00000.csv.gz is missing"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is missing"),
        (lambda folder: flip(folder / "part-00000.npy"), "part-00000.npy is damaged: its checksum"),
        (lambda folder: flip(folder / "part-00000.csv.gz"), "part-00000.csv.gz"),
        (lambda folder: os.truncate(folder / "part-00000.csv.gz", 60), "part-00000.csv.gz"),
        (lambda folder: shutil.copy(folder / "part-00001.csv.gz", folder / "part-00000.csv.gz"), "is not the table of"),
        (lambda folder: edit(folder / "tokens.json", '"uint16"', '"uint32"'), "dtype is uint32"),
        (lambda folder: edit(folder / "tokens.json", '"tokens": ', '"tokens": 1'), "tokens is"),
        (lambda folder: edit(folder / "tokens.json", '"format": 1', '"format": 2'), "has 'format' wrong"),
        (lambda folder: (folder / "tokens.json").rename(folder / "unfinished.json"), "has no tokens.json"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_line(place, tmp_path, damage, reason):
    folder = Path(shutil.copytree(place / "bytes", tmp_path / "copy"))
    damage(folder)
    assert reason in refusal(tmp_path, "copy", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("train.npy"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_tokens_of_a_single_document_need_other_text_to_be_held_out(place, tmp_path):
    (tmp_path / "one.txt").write_text("one document " * 500)
    tokenize(TokenizeConfig((str(tmp_path / "one.txt"),)), tmp_path / "one")
    assert "the tokens of one document, which are not cut; give --validation" in refusal(tmp_path, "one", tmp_path)
    packed = load(tmp_path, "one", tmp_path, validation=str(place / "held.jsonl"))
    assert len(packed.train) == 6501 // 32


def test_a_plan_takes_the_tokenizer_of_the_shards_unless_it_is_named(place, tmp_path):
    def tokenizer(**data):
        settings = {"size": "tiny", "seeds": 1, "output": tmp_path, "device": torch.device("cpu")}
        return make_plan(**settings, data=data).data.tokenizer

    own = str(open_shards(place / "bpe-280").tokenizer)
    assert tokenizer(source=str(place / "bpe-280")) == own
    assert tokenizer(source="stdlib", validation=str(place / "bpe-280-held")) == str(place / "bpe-280-held/tokenizer")
    assert tokenizer(source=str(place / "bpe-280"), tokenizer="bytes") == "bytes"


@pytest.mark.parametrize("name", ["bytes", "bpe-280"])
def test_a_fingerprint_outlives_saving_and_tells_tokenizers_apart(place, name):
    index = open_shards(place / name).index
    assert fingerprint(load_tokenizer(str(place / f"{name}-held" / "tokenizer"))) == index.tokenizer.sha256
    assert (fingerprint(load_tokenizer("bytes")) == index.tokenizer.sha256) == (name == "bytes")
