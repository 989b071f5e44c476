"""Documents come whole, in order and with their domain, or the caller learns in one line why not."""

import bz2
import dataclasses
import gzip
import http.server
import json
import logging
import lzma
import os
import shutil
import sysconfig
import threading
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from huggingface_hub import constants as hub
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as model_logging

from gated_attention.train.text import corpus
from gated_attention.train.text.corpus import load_documents, passed_over, quiet, require_hub, source_files

ROWS = [{"text": "one", "domain": "prose"}, {"text": "zwei ü 漢 😀\n", "domain": "code"}]
NOBODY = "http://127.0.0.1:9"
"""An address that refuses at once: the discard port, on which nothing listens."""


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """No network, no proxy, and a cache of datasets that no other test has seen."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(hub, "ENDPOINT", NOBODY)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(source, **options):
    return load_documents(str(source), **options).to_list()


def refusal(source, **options):
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_documents(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stdlib_is_the_source_of_the_running_python():
    documents = load_documents("stdlib")
    assert documents.column_names == ["text", "domain"]
    texts = documents["text"][:]
    assert Path(dataclasses.__file__).read_text(encoding="utf-8") in texts
    assert sum(map(len, texts)) > 5_000_000


def test_stdlib_is_sorted_and_leaves_out_tests_packages_and_odd_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("b.py", "a/z.py", "a/test/t.py", "site-packages/s.py", "lib2to3/l.py", "idle_test/i.py", "notes.txt"):
        write(tmp_path / name, f"# {name}")
    write(tmp_path / "a/__pycache__/c.py", "# cached")
    write(tmp_path / "latin.py", "# é".encode("latin-1"))
    assert [row["text"] for row in read("stdlib")] == ["# a/z.py", "# b.py"]


def test_a_text_file_is_one_document(tmp_path):
    assert read(write(tmp_path / "a.TXT", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n", "domain": ""}]


def test_a_folder_is_all_its_files_in_order_of_path(tmp_path):
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a/deep/x.txt", "first")
    write(tmp_path / "c.jsonl", lines({"text": "third", "domain": "d"}))
    pq.write_table(pa.table({"text": ["fourth"]}), tmp_path / "d.parquet")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git/x.txt", "no")
    write(tmp_path / "image.png", b"\x89PNG")
    write(tmp_path / "empty.txt", "")
    assert [row["text"] for row in read(tmp_path)] == ["first", "second", "third", "fourth"]
    assert [row["domain"] for row in read(tmp_path)] == ["", "", "d", ""]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".bz2", bz2.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines_are_read_packed_or_not(tmp_path, name, suffix, pack):
    assert read(write(tmp_path / (name + suffix), pack(lines(*ROWS).encode()))) == ROWS


def test_json_may_be_an_array_indented_or_not(tmp_path):
    assert read(write(tmp_path / "a.json", json.dumps(ROWS))) == ROWS
    assert read(write(tmp_path / "b.json", "\n" + json.dumps(ROWS, indent=2))) == ROWS


def test_blank_lines_a_byte_order_mark_and_empty_texts_are_passed_over(tmp_path):
    content = lines(ROWS[0]) + "\n  \n" + lines({"text": ""}, {"text": None}, ROWS[1])
    marked = b"\xef\xbb\xbf" + content.encode()
    assert read(write(tmp_path / "a.jsonl", marked)) == ROWS
    assert read(write(tmp_path / "a.jsonl.zst", zstandard.ZstdCompressor().compress(marked))) == ROWS


def test_other_fields_may_come_late_and_change_their_type(tmp_path):
    early = {"text": "x" * 10_000, "meta": 1}
    late = {"text": "y", "domain": "d", "meta": {"a": [1]}, "extra": None}
    source = write(tmp_path / "a.jsonl", lines(early) * 1100 + lines(late))  # datasets infers types from 10 MB
    rows = read(source)
    assert len(rows) == 1101
    assert rows[-1] == {"text": "y", "domain": "d"}


def test_text_that_looks_like_a_date_or_a_number_stays_as_written(tmp_path):
    rows = [{"text": text, "domain": "2020-01-01"} for text in ("2020-01-01T00:00:00Z", "007", "true")]
    assert read(write(tmp_path / "a.jsonl", lines(*rows))) == rows


def test_unicode_line_ends_inside_a_text_do_not_end_its_line(tmp_path):
    row = {"text": "a\u2028b\x85c", "domain": ""}
    assert read(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_text_and_domain_come_from_parquet_shards_of_different_columns(tmp_path):
    pq.write_table(
        pa.table({"body": ["a", None, "b"], "domain": ["x", "y", None], "n": [1, 2, 3]}), tmp_path / "0.parquet"
    )
    pq.write_table(pa.table({"body": pa.array(["c"], pa.large_string())}), tmp_path / "1.parquet")
    expected = [{"text": "a", "domain": "x"}, {"text": "b", "domain": ""}, {"text": "c", "domain": ""}]
    assert read(tmp_path, text_field="body") == expected


def test_a_changed_file_is_read_again(tmp_path):
    source = write(tmp_path / "a.txt", "before")
    assert read(source)[0]["text"] == "before"
    write(tmp_path / "a.txt", "after, longer")
    assert read(source)[0]["text"] == "after, longer"


@pytest.mark.parametrize("source", ["/no/such/path", "nonsense", "", "./a/b", "a/b/c", "two words", "data/train.jsonl"])
def test_what_is_neither_a_path_nor_a_hub_name_is_refused_without_the_network(source, monkeypatch):
    monkeypatch.setattr(corpus, "require_hub", lambda name: pytest.fail("asked the hub"))
    assert f"no file or folder {source!r}" in refusal(source)


def test_a_hub_name_is_refused_at_once_where_the_hub_does_not_answer():
    start = time.monotonic()
    message = refusal("owner/name:config@train")
    assert time.monotonic() - start < 5
    assert "'owner/name:config@train'" in message
    assert "HF_HUB_OFFLINE=1" in message


def test_offline_mode_asks_nothing(monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    require_hub("owner/name")


def test_any_answer_of_the_hub_will_do(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), Unfriendly)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    require_hub("owner/name")
    thread.join()
    server.server_close()


class Unfriendly(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:en", ("owner/name", "en", "train")),
        ("owner/name@train[:10%]", ("owner/name", None, "train[:10%]")),
        ("owner/na-me.1:20220301.en@test", ("owner/na-me.1", "20220301.en", "test")),
    ],
)
def test_a_hub_name_may_carry_a_config_and_a_split(monkeypatch, source, asked):
    calls = hub_data(monkeypatch, text=["a"])
    assert read(source) == [{"text": "a", "domain": ""}]
    assert calls == [asked]


def hub_data(monkeypatch, **columns):
    """A hub that answers every name with these columns; returns the list of what it was asked."""
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(corpus, "require_hub", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_columns_are_narrowed_to_text_and_domain(monkeypatch):
    hub_data(monkeypatch, body=["a", None, "", "b"], domain=[1, 2, 3, None], meta=[[1]] * 4)
    assert read("owner/name", text_field="body") == [{"text": "a", "domain": "1"}, {"text": "b", "domain": ""}]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"body": ["a"], "n": [1]}, "no field 'text'; choose text_field from body, n"),
        ({"text": [1, 2]}, "'text' of owner/name holds int64, not text"),
        ({"text": ["", None]}, "owner/name holds no text"),
    ],
)
def test_hub_data_that_does_not_fit_is_refused(monkeypatch, columns, reason):
    hub_data(monkeypatch, **columns)
    assert reason in refusal("owner/name")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"),
        datasets.exceptions.DatasetNotFoundError("no such data set"),
        datasets.exceptions.DatasetGenerationError("broken"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_what_the_hub_refuses_comes_as_one_line_with_its_reason(monkeypatch, error):
    hub_data(monkeypatch)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    message = refusal("owner/name")
    assert " ".join(str(error).split()) in message
    assert "owner/name:config@split" in message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "", "a.txt holds no text"),
        ("a.jsonl", "", "a.jsonl holds no text"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "holds no text"),
        ("a.jsonl.gz", b"", "a.jsonl.gz cannot be read (an empty file"),
        ("a.json", "[]", "holds no text"),
        ("a.jsonl", lines({"text": None}), "holds no text"),
        (
            "a.jsonl",
            lines({"text": "a"}, {"body": "b", "n": 1}),
            "line 2 has no field 'text'; choose text_field from body, n",
        ),
        ("a.jsonl", lines({}), "line 1 has no field 'text'; choose text_field from none"),
        ("a.jsonl", lines({"text": "a"}) * 150 + lines({"text": 5}), "line 151 holds int in 'text', not text"),
        ("a.jsonl", lines({"text": 0}), "line 1 holds int in 'text', not text"),
        ("a.jsonl", lines({"text": ["a"]}), "line 1 holds list in 'text'"),
        ("a.jsonl", lines({"text": "a"}) + '{"text": "b', "line 2 is not JSON"),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not JSON"),
        ("a.jsonl", '{"text": "a", "id": ' + "1" * 5_000 + "}", "line 1 is not JSON"),
        ("a.jsonl", '"text"\n', "line 1 is not a JSON object"),
        ("a.json", '[{"text": "a"}, 3]', "entry 2 is not a JSON object"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1 is no valid Unicode"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "a.jsonl cannot be read"),
        ("a.txt", "é".encode("latin-1"), "a.txt cannot be read"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(*ROWS).encode(), mtime=0)[:-12], "a.jsonl.gz cannot be read"),
        ("a.jsonl.xz", b"no xz", "a.jsonl.xz cannot be read"),
        ("a.jsonl.bz2", b"no bzip2", "a.jsonl.bz2 cannot be read"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst cannot be read"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read"),
        ("a.bin", b"abc", "a.bin has no known format; use .txt"),
        ("a.txt.gz", gzip.compress(b"abc", mtime=0), "a.txt.gz has no known format"),
        (".gz", b"", ".gz has no known format"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, name, content, reason):
    message = refusal(write(tmp_path / name, content))
    assert reason in message
    assert str(tmp_path) in message


def test_parquet_that_does_not_fit_is_refused(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    assert "no field 'text'; choose text_field from body" in refusal(tmp_path)
    pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
    assert "holds int in 'text'" in refusal(tmp_path)


def test_one_bad_file_in_a_folder_is_not_passed_over(tmp_path):
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "b.txt", "é".encode("latin-1"))
    assert "b.txt cannot be read" in refusal(tmp_path)


def test_a_folder_without_known_files_is_refused(tmp_path):
    write(tmp_path / "a.bin", b"abc")
    assert "no files of a known format; use .txt" in refusal(tmp_path)


PACKERS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("members", [1, 2])
def test_a_packed_file_is_read_whole_or_not_at_all(tmp_path, suffix, members):
    """Whatever its length when it is cut: never fewer rows without a word."""
    half = len(ROWS) // members
    parts = [PACKERS[suffix](lines(*ROWS[i * half : (i + 1) * half]).encode()) for i in range(members)]
    whole = b"".join(parts)
    path = tmp_path / f"a.jsonl{suffix}"
    assert read(write(path, whole)) == ROWS[: members * half]
    between = {len(b"".join(parts[:i])) for i in range(1, members)}  # a cut between members cannot be told
    for length in {0, 1, 4, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1} - between:
        assert "cannot be read" in refusal(write(path, whole[:length])), length


def test_long_packed_text_comes_whole(tmp_path):
    rows = [{"text": f"{i} " * 200, "domain": ""} for i in range(2000)]
    content = lines(*rows).encode()
    assert read(write(tmp_path / "a.jsonl.zst", zstandard.ZstdCompressor().compress(content))) == rows


def test_links_to_folders_are_followed_and_nothing_is_read_twice(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    write(outside / "deep/a.txt", "from outside")
    write(inside / "b.txt", "from inside")
    (inside / "linked").symlink_to(outside)
    (inside / "again").symlink_to(outside / "deep")
    (inside / "loop").symlink_to(inside)
    (inside / "c.txt").symlink_to(inside / "b.txt")
    assert sorted(row["text"] for row in read(inside)) == ["from inside", "from outside"]


def test_what_would_be_read_and_cannot_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "fine")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "gone.txt is a link to nothing; repair it" in refusal(tmp_path)
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt is no regular file" in refusal(tmp_path)
    assert "pipe.txt is no regular file" in refusal(tmp_path / "pipe.txt")
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert "locked cannot be read (Permission denied)" in refusal(tmp_path)


def test_files_of_other_formats_are_counted(tmp_path):
    for name in ("a.txt", "b.csv", "c.CSV", "d.pdf", ".hidden.csv", "deep/README"):
        write(tmp_path / name, "text")
    assert passed_over(str(tmp_path)) == {".csv": 2, ".pdf": 1, "without a suffix": 1}
    assert passed_over("stdlib") == passed_over(str(tmp_path / "a.txt")) == {}


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", write(tmp_path / "taken", "a file, not a folder"))
    assert "set HF_HOME" in refusal(write(tmp_path / "a.txt", "fine"))


def test_libraries_print_nothing_and_keep_their_settings(tmp_path, capfd):
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    read(write(tmp_path / "a.jsonl", lines(*ROWS)))
    refusal(write(tmp_path / "b.jsonl", "{"))
    refusal(write(tmp_path / "c.parquet", b"no parquet"))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == level


def test_quiet_silences_what_the_libraries_log():
    loggers = [datasets.logging.get_logger("datasets.load"), hub_logging.get_logger("huggingface_hub.utils._http")]
    loggers.append(model_logging.get_logger("transformers.configuration_utils"))
    with quiet():
        assert not any(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    assert all(logger.isEnabledFor(logging.ERROR) for logger in loggers)


def test_quiet_leaves_bars_off_where_they_were_off():
    datasets.disable_progress_bars()
    try:
        with quiet():
            pass
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()


def test_source_files_are_what_is_read(tmp_path, monkeypatch):
    inside = tmp_path / "home"
    write(inside / "b/x.py", "x")
    write(inside / "a.txt", "a")
    monkeypatch.setenv("HOME", str(inside))
    assert source_files("~") == [inside / "a.txt", inside / "b/x.py"]
    assert source_files("~/a.txt") == [inside / "a.txt"]
    shutil.rmtree(inside)
    assert source_files("~/a.txt") == []
