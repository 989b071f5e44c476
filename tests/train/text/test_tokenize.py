"""Token shards hold every document whole and in order; kills and the number of processes leave the same bytes."""

import gzip
import json
import multiprocessing
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import texts, write

from gated_attention.cli import main
from gated_attention.shards import open_shards
from gated_attention.shards.unfinished import TokenizeConfig
from gated_attention.shards.write import ShardWriter
from gated_attention.train.text import corpus, pieces, stream, tokenize
from gated_attention.train.text.corpus import load_documents
from gated_attention.train.text.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def sources(tmp_path):
    """A folder of every format, and a second source."""
    folder = tmp_path / "text"
    folder.mkdir()
    write(folder / "a.jsonl", [*texts(60), "", *texts(3, "later")])
    (folder / "b.txt").write_text("one file, one document\r\nof two lines", encoding="utf-8")
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in texts(5, "array")]), encoding="utf-8")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "packed"}).encode()))
    (folder / "empty.txt").write_text("", encoding="utf-8")
    pq.write_table(pa.table({"text": texts(30, "row"), "other": range(30)}), folder / "e.parquet", row_group_size=7)
    return str(folder), write(tmp_path / "second.jsonl", texts(20, "second"))


def run(sources, folder, processes=1, **settings):
    return tokenize.tokenize(TokenizeConfig(sources, **settings), folder, processes)


def refusal(sources, folder, **settings):
    with pytest.raises(ValueError, match=r"\S") as caught:
        run(sources, folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder):
    """Every file of a folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(shards, tokenizer):
    """The texts, cut at EOS; each shard begins and ends with a document."""
    found = []
    for ids in shards.ids:
        ends = [-1, *np.flatnonzero(ids == tokenizer.eos_token_id)]
        assert ends[-1] == len(ids) - 1
        found += [tokenizer.decode(ids[start + 1 : end].tolist()) for start, end in pairwise(ends)]
    return found


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_documents_are_those_that_compare_reads_in_the_same_order(sources, tmp_path, tokenizer):
    shards = run(sources, tmp_path / "out", tokenizer=tokenizer, shard_tokens=1000)
    wanted = [text for source in sources for text in load_documents(source)["text"]]
    assert documents_of(shards, load_tokenizer(str(shards.tokenizer))) == wanted
    assert len(shards.paths) > 2
    assert shards.index.documents == len(wanted)
    assert shards.index.bytes == sum(len(text.encode()) for text in wanted)
    sizes = np.concatenate([shards.table(number)[:, 2] for number in range(len(shards.paths))])
    assert sizes.tolist() == [len(text.encode()) for text in wanted]
    for ids, table, shard in zip(shards.ids, map(shards.table, range(9)), shards.index.shards, strict=False):
        assert table[:, 1].tolist() == (np.flatnonzero(ids == shards.index.tokenizer.eos_token_id) + 1).tolist()
        assert shard.tokens - (table[-1, 1] - table[-1, 0]) < 1000 <= shard.tokens or shard is shards.index.shards[-1]
    shards.verify()


def test_ids_are_little_endian_and_four_bytes_where_two_do_not_suffice(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(70_000)} | {"[E]": 70_000, "[U]": 70_001}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]").save_pretrained(tmp_path / "big")
    source = write(tmp_path / "a.jsonl", ["w69999 w1", "w2 [E]"])
    shards = run((source,), tmp_path / "out", tokenizer=str(tmp_path / "big"))
    assert shards.index.dtype == "uint32"
    assert (shards.index.tokenizer.bos_token_id, shards.index.tokenizer.pad_token_id) == (None, None)
    raw = shards.paths[0].read_bytes()
    assert raw[:12] == b"".join(number.to_bytes(4, "little") for number in (69_999, 1, 70_000))


def test_three_processes_write_the_bytes_of_one(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_BATCH_CHARACTERS", 500)
    run(sources, tmp_path / "one", tokenizer="bpe-300", shard_tokens=1000)
    run(sources, tmp_path / "three", 3, tokenizer="bpe-300", shard_tokens=1000)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert multiprocessing.active_children() == []


def test_long_documents_are_read_in_pieces_with_no_token_lost(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("line\n" * 60 + "é" * 300, encoding="utf-8")
    source = write(tmp_path / "b.jsonl", ["x" * 500, "short"])
    whole = run((str(tmp_path / "a.txt"), source), tmp_path / "whole")
    monkeypatch.setattr(pieces, "_PIECE_CHARACTERS", 64)
    monkeypatch.setattr(pieces, "_BATCH_CHARACTERS", 100)
    cut = run((str(tmp_path / "a.txt"), source), tmp_path / "cut", shard_tokens=1)
    assert np.concatenate(cut.ids).tolist() == np.concatenate(whole.ids).tolist()
    assert [shard.documents for shard in cut.index.shards] == [1, 1, 1]


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.trust)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, stride):
    source = write(tmp_path / "a.jsonl", texts(30))
    script = Path(__file__).with_name("killed_tokenizer.py")
    done = subprocess.run(
        [sys.executable, script, source, tmp_path, str(stride)], check=True, capture_output=True, text=True
    )
    deaths, rounds = map(int, done.stdout.split())
    assert deaths > 60 / stride
    assert rounds > 1


def test_finished_shards_are_kept_and_files_that_changed_read_again(sources, tmp_path, monkeypatch):
    folder, second = sources
    wrong = Path(write(tmp_path / "wrong.jsonl", texts(40, "wrong")))
    monkeypatch.setattr(pieces, "_BATCH_CHARACTERS", 100)
    wrong.write_text(wrong.read_text() + "no JSON")
    said, settings = [], TokenizeConfig((second, folder, str(wrong)), shard_tokens=700)
    assert "wrong.jsonl line 41 is not JSON" in refusal(settings.sources, tmp_path / "out", shard_tokens=700)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*.npy")}
    assert len(before) > 4
    write(wrong, texts(40, "wrong"))
    shards = tokenize.tokenize(settings, tmp_path / "out", say=said.append)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*.npy")}
    kept = [path for path in before if before[path] == after[path]]
    assert f"keeping {len(kept)} finished shards" in said
    assert 2 < len(kept) < len(before)
    run(settings.sources, tmp_path / "whole", shard_tokens=700)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert tokenize.tokenize(settings, tmp_path / "out", say=said.append) == shards
    assert said[-1].endswith("is finished already")


def test_a_tokenizer_of_text_that_changed_is_trained_again(tmp_path):
    source = write(tmp_path / "a.jsonl", texts(30))
    bad = tmp_path / "b.jsonl"
    bad.write_text("x", encoding="utf-8")
    settings = {"tokenizer": "bpe-270", "shard_tokens": 300}
    refusal((source, str(bad)), tmp_path / "out", **settings)
    run((source,), tmp_path / "one", **settings)
    write(bad, [f"other words {i} entirely" for i in range(90)])
    both = run((source, str(bad)), tmp_path / "out", **settings)
    assert both.index.tokenizer.sha256 != open_shards(tmp_path / "one").index.tokenizer.sha256
    run((source, str(bad)), tmp_path / "whole", **settings)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_cannot_be_done_is_refused_in_a_line_and_leaves_nothing(sources, tmp_path):
    source, out = sources[1], tmp_path / "out"
    (tmp_path / "nothing.txt").write_text("", encoding="utf-8")
    for given, settings, reason in (
        (("missing.txt",), {}, "no file or folder 'missing.txt'"),
        ((source,), {"text_field": "content"}, "has no field 'content'"),
        ((source, str(tmp_path / "nothing.txt")), {}, "holds no text"),
        ((source,), {"tokenizer": "bpe-3"}, "too small"),
        ((source,), {"tokenizer": str(tmp_path)}, "holds no tokenizer"),
        ((source,), {"tokenizer": "bpe-9999"}, "yields only"),
    ):
        assert reason in refusal(given, out, **settings)
        assert not out.exists(), reason
    with pytest.raises(ValueError, match="shard_tokens is 0"):
        TokenizeConfig((source,), shard_tokens=0)
    assert "processes is 0" in refusal((source,), out, processes=0)
    assert "lies within the source" in refusal((str(tmp_path),), out)
    run((source,), out)
    assert "holds token shards" in refusal((str(out),), tmp_path / "other")
    assert "was written with tokenizer 'bytes', not 'bpe-300'" in refusal((source,), out, tokenizer="bpe-300")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty" in refusal((source,), tmp_path / "full")
    with pytest.raises(ValueError, match="holds token shards, and text is read here"):
        load_documents(str(out))


def test_a_full_disk_is_a_line_and_what_is_written_stays(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", texts(60))
    add = ShardWriter.add

    def full(self, *args, **options):
        if self.path.name == "part-00003.npy":
            raise OSError(28, "No space left on device")
        add(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        assert "No space left on device" in refusal((source,), tmp_path / "out", shard_tokens=700)
    assert len(list((tmp_path / "out").glob("part-*.npy"))) == 3
    with pytest.raises(ValueError, match=r"has no tokens\.json"):
        open_shards(tmp_path / "out")
    run((source,), tmp_path / "out", shard_tokens=700)
    run((source,), tmp_path / "whole", shard_tokens=700)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_command_writes_says_what_it_wrote_and_writes_nothing_twice(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["tokenize", *sources, str(tmp_path / "out"), "--shard-tokens", "1000"]
    for said in ("", "out is finished already"):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert said in printed
        assert "out: 120 documents, " in printed
    assert open_shards(tmp_path / "out").index.sources == sources


def test_bpe_is_trained_on_a_part_that_is_drawn_from_all(monkeypatch):
    monkeypatch.setattr(tokenize, "_BPE_BYTES", 100)
    found = [stream.Piece(f"{number:010}", True, stream.START) for number in range(500)]
    drawn = tokenize._sample(found)
    assert len(drawn) == 10
    assert len({int(text) // 100 for text in drawn}) > 3
    assert drawn == tokenize._sample(found)


def test_hub_data_sets_are_read_from_any_row_on(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a", None, "", "b", "c"], "id": range(5)})
    monkeypatch.setattr(corpus, "require_hub", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: rows)
    found = list(stream.stream_pieces(stream.find_sources(["some/name"]), "text"))
    assert [piece.text for piece in found] == ["a", "b", "c"]
    later = stream.stream_pieces(stream.find_sources(["some/name"]), "text", found[0].after)
    assert [piece.text for piece in later] == ["b", "c"]
