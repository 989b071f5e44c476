"""From the end of a command to an exit code: one line on what went wrong, and how to resume after an interruption."""

import io
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

TERMINATED = 143
"""Exit code after SIGTERM, which batch systems send before they kill."""

_BROKEN_PIPE = 141
_LONGEST = 1000  # characters of an error line, which may repeat the input


def run(app: typer.Typer, words: Sequence[str]) -> NoReturn:
    """Run a command and exit; wrong input is one line and code 2, an interruption one line and 130 or 143."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that cannot print a character
    try:
        with _terminable():
            code = app(list(words) or ["--help"], standalone_mode=False)
    except BrokenPipeError:
        sys.stdout = io.StringIO()  # the interpreter flushes stdout at exit, and nobody reads it
        sys.exit(_BROKEN_PIPE)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        _refuse(reason if error.filename is None else f"{error.filename}: {reason}")
    except ValueError as error:
        _refuse(str(error))
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        # typer's exceptions for wrong options belong to no public class in some versions and to click in others.
        if not hasattr(error, "format_message"):
            raise
        _refuse(error.format_message().replace("Value error, ", ""))  # pydantic's words, by way of typer
    if code in (INTERRUPTED, TERMINATED):
        kept = dict.fromkeys(("compare", "study", "adapt", "train"), "checkpoint") | {"tokenize": "shard"}
        last = kept.get(words[0]) if words else None
        resumes = f"; the same command resumes from the last {last}" if last else ""
        typer.echo(f"stopped{resumes}", err=True)
    sys.exit(code or (0 if words else 2))


def _refuse(message: str) -> NoReturn:
    line = " ".join(message.splitlines())
    typer.echo(f"error: {line if len(line) <= _LONGEST else line[: _LONGEST - 3] + '...'}", err=True)
    sys.exit(2)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that everything cleans up."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
