"""Blocks hold every document once, whole and in one stream; held-out text stays out; the cache tells the truth."""

import io
import json
import os
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from gated_attention.jobs.text import cut_passages, tokenise
from gated_attention.train.text import data, pieces
from gated_attention.train.text.data import Blocks, DataConfig, collate, load_data
from gated_attention.train.text.tokenizer import END_OF_TEXT, load_tokenizer, vocabulary_size


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def texts(count, prefix="doc"):
    """Different texts of different lengths."""
    words = ["gates", "open", "where", "sinks", "close", "and", "every", "value", "passes", "through"]
    return [f"{prefix} {i}: " + " ".join(words[: i % 10]) for i in range(count)]


def write(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "a.jsonl", texts(300))


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("work") / "cache"


def config(source, **changes):
    return DataConfig(**{"source": source, "block_size": 16, **changes})


def stream(blocks, bos=False):
    """The ids of all blocks in one row, without BOS."""
    return np.asarray(blocks.ids)[:, int(bos) :].ravel().tolist()


def documents_in(blocks, tokenizer, bos=False):
    """The texts between the ends of documents; the last one may be cut."""
    ids = stream(blocks, bos)
    ends = [-1, *(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)]
    whole = [tokenizer.decode(ids[start + 1 : stop]) for start, stop in pairwise(ends)]
    return whole, tokenizer.decode(ids[ends[-1] + 1 :])


def refusal(*args, **kwargs):
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_data(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-270"])
def test_every_document_is_there_once_and_in_one_part(source, cache, tokenizer, bos):
    packed = load_data(config(source, tokenizer=tokenizer, bos=bos, held_out=0.2), cache)
    found = []
    for blocks in (packed.train, packed.validation):
        whole, rest = documents_in(blocks, packed.tokenizer, bos)
        found.append(whole)
        missing = [text for text in texts(300) if text.startswith(rest)] if rest else [""]
        assert missing, "the partial last document is the beginning of one"
    train, held_out = map(set, found)
    assert len(found[0]) + len(found[1]) >= 300 - 4  # the last document or two of a part may fall in the dropped block
    assert len(train) == len(found[0])
    assert not train & held_out
    assert train | held_out <= set(texts(300))


def test_documents_are_shuffled(source, cache):
    whole, _ = documents_in(load_data(config(source), cache).train, load_tokenizer("bytes"))
    numbers = [int(text.split()[1].rstrip(":")) for text in whole]
    assert np.corrcoef(numbers, np.arange(len(numbers)))[0, 1] < 0.3


def test_the_stream_is_cut_without_loss_and_only_the_end_is_dropped(tmp_path, cache):
    source = write(tmp_path / "t.jsonl", texts(50))
    packed = load_data(config(source, validation=write(tmp_path / "v.jsonl", texts(9, "other"))), cache)
    total = sum(len(text.encode()) + 1 for text in texts(50))
    assert packed.train.num_tokens == total // 16 * 16
    assert packed.train.ids.shape == (total // 16, 16)


def test_every_block_begins_with_bos_and_the_stream_goes_on_behind_it(source, cache):
    plain = load_data(config(source, block_size=15), cache)
    packed = load_data(config(source, block_size=16, bos=True), cache)
    assert (packed.train.ids[:, 0] == packed.tokenizer.bos_token_id).all()
    assert stream(packed.train, bos=True) == stream(plain.train)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_with_bos_the_saved_tokenizer_puts_it_before_a_text_once(source, cache, tmp_path, tokenizer):
    # Whoever reads a model trained with BOS by its tokenizer then gives it the BOS that it has always seen.
    plain = load_data(config(source, tokenizer=tokenizer), cache).tokenizer
    load_data(config(source, tokenizer=tokenizer, bos=True), cache).tokenizer.save_pretrained(tmp_path / "first")
    again = load_data(config(source, tokenizer=str(tmp_path / "first"), bos=True), cache).tokenizer
    assert again.encode("gates open") == [again.bos_token_id, *plain.encode("gates open")]
    assert tokenise(again, "gates open").ids[0] == again.bos_token_id
    assert again.encode("gates open", add_special_tokens=False) == plain.encode("gates open")


def test_with_bos_what_a_tokenizer_adds_behind_a_text_stays(source, cache, tmp_path):
    core = load_tokenizer("bytes").backend_tokenizer
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "t")
    tokenizer = load_data(config(source, tokenizer=str(tmp_path / "t"), bos=True), cache).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a")) == ["<s>", "a", "</s>"]


def test_passages_hold_one_bos_before_each_document(source, cache):
    tokenizer = load_data(config(source, bos=True), cache).tokenizer
    documents = datasets.Dataset.from_list([{"text": letter * 10} for letter in "abcd"])
    (batch,) = cut_passages(documents, tokenizer, length=24, num_tokens=24, batch_size=1)
    tokens = tokenizer.convert_ids_to_tokens(batch.ids[0].tolist())
    assert [i for i, token in enumerate(tokens) if token == END_OF_TEXT] == [0, 11, 22]


def test_the_held_out_share_is_of_bytes_and_by_whole_documents(tmp_path, cache):
    long, short = ["x" * 990 + f"{i:03d}" for i in range(10)], [f"{i:03d}" for i in range(1000)]
    source = write(tmp_path / "a.jsonl", long + short)
    packed = load_data(config(source, held_out=0.3), cache)
    share = packed.validation.num_tokens / (packed.train.num_tokens + packed.validation.num_tokens)
    assert 0.25 < share < 0.45


def test_a_seed_repeats_and_another_one_differs(source, tmp_path):
    first = load_data(config(source, seed=1), tmp_path / "1")
    again = load_data(config(source, seed=1), tmp_path / "2")
    other = load_data(config(source, seed=2), tmp_path / "3")
    for part in ("train", "validation"):
        assert stream(getattr(first, part)) == stream(getattr(again, part))
        assert stream(getattr(first, part)) != stream(getattr(other, part))


def test_a_held_out_text_is_not_trained_on_under_another_row(tmp_path, cache):
    source = write(tmp_path / "a.jsonl", texts(60) * 3)
    said = []
    packed = load_data(config(source, held_out=0.1), cache, said.append)
    train, _ = documents_in(packed.train, packed.tokenizer)
    held_out, _ = documents_in(packed.validation, packed.tokenizer)
    assert held_out
    assert not set(train) & set(held_out)
    assert any("training documents that are held out as well" in message for message in said)


def test_held_out_text_of_its_own_is_kept_apart_too(tmp_path, cache):
    other = texts(20, "other")
    source = write(tmp_path / "t.jsonl", texts(60) + other[:5])
    packed = load_data(config(source, validation=write(tmp_path / "v.jsonl", other), block_size=8), cache)
    train, _ = documents_in(packed.train, packed.tokenizer)
    held_out, _ = documents_in(packed.validation, packed.tokenizer)
    assert set(train) <= set(texts(60))
    assert set(held_out) <= set(other)


def test_held_out_text_equal_to_the_training_text_is_refused(source, cache):
    assert "held out as well; give other text" in refusal(config(source, validation=source), cache)


def test_a_special_token_inside_a_document_is_only_text(tmp_path, cache):
    documents = [f"{i} before{END_OF_TEXT}after" for i in range(40)]
    packed = load_data(config(write(tmp_path / "a.jsonl", documents)), cache)
    whole, _ = documents_in(packed.train, packed.tokenizer)
    assert set() < set(whole) <= set(documents)


def test_long_documents_are_read_in_pieces_with_no_token_lost(tmp_path, monkeypatch):
    documents = ["line\n" * 60 + str(i) for i in range(9)] + ["x" * 500, "short", "é" * 300]
    settings = config(write(tmp_path / "a.jsonl", documents), block_size=4)
    whole = load_data(settings, tmp_path / "whole")
    monkeypatch.setattr(pieces, "_PIECE_CHARACTERS", 64)
    monkeypatch.setattr(pieces, "_BATCH_CHARACTERS", 100)
    cut = load_data(settings, tmp_path / "pieces")
    assert stream(cut.train) == stream(whole.train)
    assert stream(cut.validation) == stream(whole.validation)


def test_a_piece_ends_where_a_line_does():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_PIECE_CHARACTERS", 9)
        assert list(pieces.pieces(io.StringIO("one\ntwo\nthree"))) == [("one\ntwo\n", False), ("three", True)]
        assert list(pieces.pieces(io.StringIO("x" * 18))) == [("x" * 9, False), ("x" * 9, True)]
        assert list(pieces.pieces(io.StringIO(""))) == []


def test_a_tokenizer_that_cuts_and_pads_does_neither_here(tmp_path, cache):
    tokenizer = load_tokenizer("bytes")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write(tmp_path / "a.jsonl", texts(80))
    cut = load_data(config(source, tokenizer=str(tmp_path / "tokenizer")), cache)
    assert stream(cut.train) == stream(load_data(config(source), cache).train)


def test_ids_take_two_bytes_while_they_fit_and_four_beyond(tmp_path, source, cache):
    assert load_data(config(source), cache).train.ids.dtype == np.uint16
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"[E]": 70_000, "[U]": 70_001}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]").save_pretrained(tmp_path / "big")
    large = write(tmp_path / "w.jsonl", [f"w{69_000 + i} w1" for i in range(300)])
    packed = load_data(config(large, tokenizer=str(tmp_path / "big")), cache)
    assert packed.train.ids.dtype == np.int32
    assert packed.train.ids.max() == 70_000
    assert "has no BOS token" in refusal(config(large, tokenizer=str(tmp_path / "big"), bos=True), cache)


def test_a_tokenizer_without_a_rust_core_is_asked_for_the_same():
    class Slow:
        def encode(self, text, *, add_special_tokens, split_special_tokens, verbose):
            assert (add_special_tokens, split_special_tokens, verbose) == (False, True, False)
            return list(text.encode())

    assert pieces.encoder(Slow())(["ab", ""]) == [[97, 98], []]


@pytest.mark.parametrize(("limit", "blocks"), [(1, 1), (16, 1), (47, 2), (48, 3), (10**9, None)])
def test_limited_held_out_text_is_spread_over_all_of_it(source, cache, limit, blocks):
    everything = load_data(config(source, held_out=0.3), cache).validation
    limited = load_data(config(source, held_out=0.3, max_validation_tokens=limit), cache).validation
    count = blocks or len(everything)
    rows = [i * len(everything) // count for i in range(count)]
    assert limited.ids.tolist() == everything.ids[rows].tolist()


def untouched(monkeypatch):
    monkeypatch.setattr(data, "_pack", lambda *args: pytest.fail("packed again"))


def test_the_second_call_reads_the_cache_in_no_time(source, cache, monkeypatch):
    first = load_data(config(source), cache)
    untouched(monkeypatch)
    start = time.monotonic()
    second = load_data(config(source), cache)
    assert time.monotonic() - start < 1
    assert stream(second.train) == stream(first.train)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert isinstance(second.train.ids, np.memmap)


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 8},
        {"seed": 1},
        {"bos": True},
        {"packing": "documents", "block_size": 8},
        {"tokenizer": "bpe-260"},
        {"held_out": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_is_packed_anew(source, cache, change):
    first = load_data(config(source), cache)
    second = load_data(config(source, **change), cache)
    assert first.train.ids.shape != second.train.ids.shape or stream(first.train) != stream(second.train)


def test_a_changed_file_is_packed_anew(source, cache, tmp_path):
    first = load_data(config(source), cache)
    state = os.stat(source)
    write(tmp_path / "a.jsonl", texts(300, "new"))
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert stream(load_data(config(source), cache).train) != stream(first.train)


def test_a_new_file_in_a_folder_is_packed_anew(source, tmp_path, cache):
    first = load_data(config(str(tmp_path)), cache)
    write(tmp_path / "b.jsonl", texts(100, "more"))
    assert load_data(config(str(tmp_path)), cache).train.num_tokens > first.train.num_tokens


def test_a_changed_tokenizer_folder_is_packed_anew(source, cache, tmp_path):
    settings = config(source, tokenizer=str(tmp_path / "tokenizer"))
    load_tokenizer("bytes").save_pretrained(tmp_path / "tokenizer")
    first = load_data(settings, cache)
    documents = datasets.Dataset.from_dict({"text": texts(300)})
    load_tokenizer("bpe-280", documents).save_pretrained(tmp_path / "tokenizer")
    assert load_data(settings, cache).train.num_tokens < first.train.num_tokens


def test_an_interrupted_build_leaves_nothing(source, cache, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "_write_blocks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_data(config(source), cache)
    assert list((cache / "packed").iterdir()) == []
    load_data(config(source), cache)


def test_what_a_kill_leaves_is_never_taken_for_whole_and_removed_by_the_next_run(source, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_data(config(source), cache)  # everything written, and stopped before the rename
    [left] = (cache / "packed").iterdir()
    assert left.name.startswith(".part-")
    load_data(config(source, block_size=8), cache)
    assert [path.name[0] != "." for path in (cache / "packed").iterdir()] == [True]
    assert len(load_data(config(source), cache).train)


def interrupted(*_):
    raise KeyboardInterrupt


def test_of_two_who_want_the_same_data_one_packs_and_the_other_waits(source, cache, monkeypatch):
    packing, waiting, pack, packs = threading.Event(), threading.Event(), data._pack, []

    def slowly(*arguments):
        packs.append(arguments)
        packing.set()
        assert waiting.wait(10)
        pack(*arguments)

    def say(message):
        if message.startswith("waiting for process"):
            waiting.set()

    monkeypatch.setattr(data, "_pack", slowly)
    first = threading.Thread(target=load_data, args=(config(source), cache))
    first.start()
    assert packing.wait(10)
    assert len(load_data(config(source), cache, say).train)
    first.join()
    assert len(packs) == 1
    assert len(list((cache / "packed").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_refused(source, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file, not a folder")
    assert f"cannot write to the cache {taken}" in refusal(config(source), taken)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"held_out": 0.0}, "held_out is 0.0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"held_out": float("nan")}, "held_out is nan"),
        ({"max_validation_tokens": 0}, "max_validation_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"tokenizer": "bpe-100"}, "at least bpe-258"),
        ({"packing": "dense"}, "unknown packing 'dense'; choose from stream, documents"),
    ],
)
def test_settings_out_of_range_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        DataConfig(**changes)


def test_a_small_corpus_is_refused_with_its_numbers(tmp_path, cache):
    source = write(tmp_path / "a.jsonl", ["abc", "de"])
    assert "validation has" in refusal(config(source), cache)
    assert refusal(config(write(tmp_path / "t.jsonl", texts(20)), validation=source), cache).startswith(
        f"{source} is too small: validation has 7 tokens"
    )
    message = refusal(config(source, validation=write(tmp_path / "v.jsonl", texts(20, "other"))), cache)
    assert message.startswith(f"{source} is too small: train has 7 tokens and a block takes 16")
    assert "--context" in message
    assert list((cache / "packed").iterdir()) == []


def test_no_document_or_one_of_a_character_is_refused(tmp_path, cache):
    one = write(tmp_path / "a.jsonl", ["x"])
    assert "is one character; give more text" in refusal(config(one), cache)
    assert "no file or folder '/no/such'" in refusal(config("/no/such"), cache)


@pytest.mark.parametrize("held_out", [0.05, 0.3])
def test_one_document_is_cut_where_a_line_begins(tmp_path, cache, held_out):
    text = "".join(f"line {i} of the only file\n" for i in range(200))
    (tmp_path / "input.txt").write_text(text)
    said = []
    packed = load_data(config(str(tmp_path / "input.txt"), held_out=held_out, block_size=2), cache, said.append)
    train, rest = packed.about["train_tokens"] - 1, packed.about["validation_tokens"] - 1  # EOS ends both
    assert train + rest == len(text)
    assert 0 <= rest - held_out * len(text) < 30
    assert text[train - 1] == "\n"
    for blocks, part in ((packed.train, text[:train]), (packed.validation, text[train:])):
        assert packed.tokenizer.decode(stream(blocks)).replace(END_OF_TEXT, "") == part[: len(stream(blocks))]
    assert any(message.startswith("one document: holding out its last") for message in said)


def test_one_document_without_lines_is_cut_at_its_share(tmp_path, cache):
    (tmp_path / "input.txt").write_text("title\n" + "é" * 994)
    packed = load_data(config(str(tmp_path / "input.txt"), held_out=0.1, block_size=2), cache)
    assert packed.about["train_tokens"] == 6 + 2 * 894 + 1
    assert packed.about["validation_tokens"] == 200 + 1


def test_it_is_counted_how_much_of_the_held_out_text_is_kept(source, cache):
    packed = load_data(config(source, held_out=0.3, max_validation_tokens=64), cache)
    tokenizer = packed.tokenizer
    everything = load_data(config(source, held_out=0.3), cache)
    ids = stream(everything.validation)
    number = np.cumsum(np.array(ids) == tokenizer.eos_token_id) - (np.array(ids) == tokenizer.eos_token_id)
    rows = number.reshape(-1, 16)[[i * len(everything.validation) // 4 for i in range(4)]]
    about = packed.about
    assert about["validation_kept_documents"] == len(np.unique(rows)) < about["validation_documents"]
    assert about["validation_kept_tokens"] == 64
    assert about["validation_documents"] + about["train_documents"] == 300
    assert about["validation_tokens"] + about["train_tokens"] == sum(len(text.encode()) + 1 for text in texts(300))
    assert everything.about["validation_kept_documents"] == everything.about["validation_documents"]


def with_gap(tmp_path, top):
    vocabulary = {**{letter: i for i, letter in enumerate("abcdefgh ")}, "[E]": top}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]").save_pretrained(tmp_path / f"gap-{top}")
    return str(tmp_path / f"gap-{top}")


@pytest.mark.parametrize(("top", "dtype"), [(300, np.uint16), (70_000, np.int32)])
def test_a_vocabulary_reaches_its_largest_id(tmp_path, cache, top, dtype):
    source = write(tmp_path / "a.jsonl", ["abc defgh " * (i + 1) for i in range(30)])
    packed = load_data(config(source, tokenizer=with_gap(tmp_path, top)), cache)
    assert len(packed.tokenizer) < top
    assert vocabulary_size(packed.tokenizer) == top + 1
    assert packed.train.ids.dtype == dtype
    assert packed.train.ids.max() == top


@pytest.mark.parametrize("bos", [False, True])
def test_documents_kept_apart_begin_with_a_token_of_their_own(source, cache, bos):
    packed = load_data(config(source, packing="documents", bos=bos), cache)
    plain = load_data(config(source, bos=bos), cache)
    assert packed.train.ids.tolist() == plain.train.ids.tolist()  # EOS is BOS here
    for row in packed.train:
        expected, position = [], -1
        for token in row["input_ids"].tolist():
            position = 0 if token == packed.tokenizer.eos_token_id else position + 1
            expected.append(position)
        assert row["position_ids"].tolist() == expected
    assert collate([packed.train[0], packed.train[1]])["position_ids"].shape == (2, 16)
    assert "position_ids" not in plain.train[0]


def test_where_bos_is_another_token_it_opens_every_document(tmp_path, cache):
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write(tmp_path / "a.jsonl", texts(80))
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "packing": "documents", "bos": True, "block_size": 32}
    packed = load_data(config(source, **settings), cache)
    bos, eos = packed.tokenizer.bos_token_id, packed.tokenizer.eos_token_id
    assert packed.train.opener == bos != eos
    ids = packed.train.ids
    assert (ids[:, 0] == bos).all()
    after = ids[:, 1:][ids[:, :-1] == eos]
    assert set(after.tolist()) == {bos}


def test_blocks_of_one_document_are_read_as_one_sequence():
    ids = np.array([[1, 2, 3], [1, 9, 3], [9, 2, 3]], np.uint16)
    assert Blocks(ids, opener=9).undivided().ids.tolist() == [[1, 2, 3], [9, 2, 3]]
    assert Blocks(ids[1:2], opener=9).undivided().ids.tolist() == [[1, 9, 3]]  # none is whole
    assert Blocks(ids).undivided().ids.tolist() == ids.tolist()


def test_blocks_are_a_map_of_int64_rows(source, cache):
    packed = load_data(config(source), cache)
    row = packed.train[3]
    assert list(row) == ["input_ids"]
    assert row["input_ids"].dtype == torch.int64
    assert row["input_ids"].tolist() == packed.train.ids[3].tolist()
    row["input_ids"].zero_()  # a copy: the file is mapped read-only
    assert packed.train[3]["input_ids"].any()
    with pytest.raises(IndexError):
        packed.train[len(packed.train)]


def test_batches_are_all_blocks_in_order():
    blocks = Blocks(np.arange(14, dtype=np.uint16).reshape(7, 2))
    batches = blocks.batches(3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == blocks.ids.tolist()
    assert torch.cat(blocks.id_batches(3)).tolist() == blocks.ids.tolist()
    assert blocks.num_tokens == 14


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 1), (3, 1), (4, 2), (99, 7)])
def test_a_sample_has_at_least_one_block(num_tokens, blocks):
    assert len(Blocks(np.zeros((7, 2), np.uint16)).sample(num_tokens)) == blocks


def test_a_curve_is_scored_on_blocks_from_all_over_the_held_out_text(source, cache, monkeypatch):
    monkeypatch.setattr(data, "_CURVE_TOKENS", 40)
    packed = load_data(config(source, held_out=0.3), cache)
    middle = len(packed.validation) // 2
    assert packed.validation_sample.ids.tolist() == packed.validation.ids[[0, middle]].tolist()


def test_a_loader_yields_what_a_causal_model_takes(source, cache):
    packed = load_data(config(source), cache)
    batch = next(iter(DataLoader(packed.train, batch_size=5, collate_fn=collate)))
    assert sorted(batch) == ["input_ids", "labels"]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].tolist() == packed.train.ids[:5].tolist()


def test_it_says_what_takes_time_and_libraries_say_nothing(source, cache, capfd):
    said = []
    load_data(config(source, tokenizer="bpe-270"), cache, said.append)
    assert [message.split()[0] for message in said] == ["reading", "training", "tokenising", "tokenising"]
    assert capfd.readouterr() == ("", "")


def test_the_default_is_the_standard_library_of_this_python(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    for i, text in enumerate(texts(60)):
        (tmp_path / "lib" / f"{i}.py").write_text(text)
    packed = load_data(DataConfig(block_size=16), cache)
    whole, _ = documents_in(packed.train, packed.tokenizer)
    assert set() < set(whole) <= set(texts(60))
    monkeypatch.setattr("sys.version", "another")
    load_data(DataConfig(block_size=16), cache)
    assert len(list((cache / "packed").iterdir())) == 2
