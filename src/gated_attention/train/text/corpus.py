"""Documents from files, folders, the hub, or the running Python's own standard library."""

import json
import lzma
import os
import re
import ssl
import sysconfig
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset
from huggingface_hub import constants as hub

from gated_attention.shards import is_token_folder
from gated_attention.train.quiet import quiet
from gated_attention.train.text.files import KNOWN, files_below, open_text, text_format

STDLIB = "stdlib"
"""The default corpus, present on every machine: the source text of Python's standard library."""

_SKIPPED = {"__pycache__"}
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
_HUB_TIMEOUT_S = 10
_PARQUET_ROWS = 1_000  # held in memory at a time

_FEATURES = datasets.Features({"text": datasets.Value("string"), "domain": datasets.Value("string")})
_ROWS = 2  # version of what `_documents` yields: datasets caches its rows by the arguments, not by the code
_DAMAGE = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, pa.ArrowException)


def load_documents(source: str, text_field: str = "text", domain_field: str = "domain") -> Dataset:
    """One row per document that has text: `text`, and `domain`, which is empty where the source names none.

    Args:
        source: `stdlib`; a file of plain text (one document), JSON lines or an array (also .gz .xz .zst .bz2) or
            Parquet; a folder of such files; or a hub data set, `owner/name`, `owner/name:config`,
            `owner/name@split` or both. A path that exists takes precedence over a hub name.
        text_field: The field that holds the text in JSON, Parquet and hub data sets.
        domain_field: The field that names the domain there; other fields are ignored.

    Raises:
        ValueError: if the source cannot be found or read, has no such field, or holds no text.
    """
    require_text(source)
    with quiet():
        if files := source_files(source):
            return _load_files(files, source, text_field, domain_field)
        return _load_hub(source, text_field, domain_field)


def source_files(source: str) -> list[Path]:
    """The local files that a source is read from, sorted; empty for a hub name.

    Hidden files and folders are skipped, and so are files of other formats and the tests of the standard library.
    Links to folders are followed.

    Raises:
        ValueError: if a file has no known format, no file of a folder has one, or something in it cannot be read.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        found = files_below(root, _SKIPPED | _STDLIB_SKIPPED, follow_links=False)
        return [file for file in found if file.suffix == ".py"]
    path = Path(os.path.expanduser(source))
    if not source or not os.path.exists(path):
        return []
    if path.is_dir():
        files = [file for file in files_below(path, _SKIPPED) if text_format(file)]
        if not files:
            raise ValueError(f"{path} has no files of a known format; use {KNOWN}")
        return files
    if not text_format(path):
        raise ValueError(f"{path} has no known format; use {KNOWN}")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; copy its text to one")
    return [path]


def passed_over(source: str) -> dict[str, int]:
    """How many files of a folder are skipped because their format is unknown, by suffix, most frequent first."""
    path = Path(os.path.expanduser(source))
    if source in (STDLIB, "") or not path.is_dir():
        return {}
    others = (file for file in files_below(path, _SKIPPED) if not text_format(file))
    return dict(Counter(file.suffix.lower() or "without a suffix" for file in others).most_common())


def say_passed_over(source: str, say: Callable[[str], None]) -> None:
    """Say which files of a folder are skipped, if any are."""
    if formats := passed_over(source):
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in formats.items())
        say(f"skipping files of other formats in {source}: {listed}")


def require_text(source: str) -> None:
    """Refuse a folder of token shards where text is read.

    Raises:
        ValueError: if it is one.
    """
    if is_token_folder(source):
        raise ValueError(f"{source} holds token shards, and text is read here; give the text they were made of")


def require_hub(name: str) -> None:
    """Fail at once if the hub does not answer; its own client retries for half a minute first.

    With `HF_HUB_OFFLINE=1` the hub is not asked: the libraries then look only in their download cache.
    """
    if hub.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        urllib.request.urlopen(urllib.request.Request(hub.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()  # an error is an answer
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # an answer too; the hub's client knows which certificates to trust
        raise ValueError(
            f"no file or folder {name!r} here, and {hub.ENDPOINT} does not answer; "
            "check the path or the network, or set HF_HUB_OFFLINE=1 to use earlier downloads"
        ) from error


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, cut to a readable length."""
    return " ".join(str(error).split())[:300]


def _load_files(files: list[Path], source: str, text_field: str, domain_field: str) -> Dataset:
    # One generator for all formats, not the loaders of datasets: those take the schema from the first 10 MB and
    # refuse a field that appears or changes later, even in a column that is not read.
    arguments = {
        "files": tuple(map(file_state, files)),
        "source": source,
        "text_field": text_field,
        "domain_field": domain_field,
        "version": _ROWS,
    }
    try:
        return Dataset.from_generator(_documents, features=_FEATURES, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise cause from None
        raise ValueError(f"{source} cannot be copied to datasets' cache ({one_line(cause)}); set HF_HOME") from error
    except OSError as error:
        raise ValueError(f"datasets' cache cannot be written ({one_line(error)}); set HF_HOME") from error


def file_state(file: Path) -> tuple[str, int, int]:
    """Path, size and time of a file, which identify it in a cache."""
    state = file.stat()
    return str(file.resolve()), state.st_size, state.st_mtime_ns


def _documents(
    files: tuple[tuple[str, int, int], ...], source: str, text_field: str, domain_field: str, version: int
) -> Iterator[dict[str, str]]:
    # Size, time and version only serve the key that datasets derives from the arguments.
    is_empty = True
    for name, _, _ in files:
        for document in read_file(Path(name), source, text_field, domain_field):
            is_empty = False
            yield document
    if is_empty:
        raise ValueError(f"{source} holds no text; give another source")


def read_file(file: Path, source: str, text_field: str, domain_field: str = "domain") -> Iterator[dict[str, str]]:
    """The documents of one file of a source that have text.

    Raises:
        ValueError: if the file cannot be read or has no such field.
    """
    with naming(file):
        try:
            for place, row in _rows(file, text_field, domain_field):
                if document := _document(row, place, text_field, domain_field):
                    yield document
        except UnicodeDecodeError:
            if source != STDLIB:
                raise


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn a fault of a file that is read in the block into a ValueError that names it."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{file} cannot be read ({one_line(error)}); repair it or leave it out") from error


def _rows(file: Path, text_field: str, domain_field: str) -> Iterator[tuple[str, Any]]:
    """Every row of a file, and its place for messages."""
    match text_format(file):
        case "json":
            yield from _json_rows(file)
        case "parquet":
            yield from _parquet_rows(file, text_field, domain_field)
        case _:
            with open_text(file) as stream:
                yield str(file), {text_field: stream.read()}


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file} line {number}"
            if line.lstrip().startswith("["):
                rows = _parse(line + stream.read(), place)
                yield from ((f"{file} entry {i}", row) for i, row in enumerate(rows, start=1))
                return
            yield place, _parse(line, place)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{place} is not JSON ({reason}); give one object per line, or an array") from error


def _parquet_rows(file: Path, text_field: str, domain_field: str) -> Iterator[tuple[str, Any]]:
    with pq.ParquetFile(file) as parquet:
        columns = parquet.schema_arrow.names
        _require_field(columns, str(file), text_field)
        read = [name for name in columns if name in (text_field, domain_field)]
        for batch in parquet.iter_batches(_PARQUET_ROWS, columns=read):
            for row in batch.to_pylist():
                yield str(file), row


def _document(row: Any, place: str, text_field: str, domain_field: str) -> dict[str, str] | None:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object; give objects with a field {text_field!r}")
    _require_field(list(row), place, text_field)
    text, domain = row[text_field], row.get(domain_field)
    if not text and isinstance(text, str | None):
        return None
    if not isinstance(text, str):
        raise ValueError(f"{place} holds {type(text).__name__} in {text_field!r}, not text; choose another text_field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is no valid Unicode ({error.reason}); repair it or leave it out") from error
    return {"text": text, "domain": "" if domain is None else str(domain)}


def _require_field(columns: list[str], place: str, text_field: str) -> None:
    if text_field not in columns:
        raise ValueError(f"{place} has no field {text_field!r}; choose text_field from {', '.join(columns) or 'none'}")


def hub_documents(source: str, text_field: str) -> Dataset:
    """A data set of the hub, downloaded if need be; its field `text_field` holds text, or nothing in some rows.

    Raises:
        ValueError: if it cannot be loaded or has no such field of text.
    """
    match = _HUB_NAME.fullmatch(source)
    if not match or text_format(Path(source)):
        raise ValueError(f"no file or folder {source!r}; give a path that exists, a hub data set owner/name, or stdlib")
    require_hub(source)
    try:
        documents = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except (ValueError, OSError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source!r} is no file or folder here and cannot be loaded from the hub ({one_line(error)}); "
            "check the path, or the name as owner/name:config@split"
        ) from error
    _require_field(documents.column_names, source, text_field)
    kind = documents.features.arrow_schema.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"field {text_field!r} of {source} holds {kind}, not text; choose another text_field")
    return documents


def _load_hub(source: str, text_field: str, domain_field: str) -> Dataset:
    table = hub_documents(source, text_field).with_format("arrow")[:]
    text = table[text_field]
    if domain_field in table.column_names and not pa.types.is_nested(table[domain_field].type):
        domain = pc.fill_null(table[domain_field].cast(pa.string()), "")
    else:
        domain = pa.repeat(pa.scalar("", pa.string()), len(table))
    has_text = pc.fill_null(pc.greater(pc.binary_length(text), 0), False)
    if not pc.any(has_text).as_py():
        raise ValueError(f"{source} holds no text; give another source")
    selected = pa.table({"text": text, "domain": domain})
    if not pc.all(has_text).as_py():  # a filter copies
        selected = selected.filter(has_text)
    return Dataset(datasets.table.InMemoryTable(selected))
