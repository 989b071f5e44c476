"""From a command's end to an exit code: one line for what went wrong, and how to go on after an interruption."""

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
_LONGEST = 1000  # characters of a refusal, which may repeat what was given


def run(app: typer.Typer, words: Sequence[str]) -> NoReturn:
    """Run a command and exit; wrong input is one line and code 2, an interruption one line and 130 or 143."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # terminals that cannot print a character still get the rest
    try:
        with _terminable():
            code = app(list(words) or ["--help"], standalone_mode=False)
    except BrokenPipeError:
        sys.stdout = io.StringIO()  # nobody reads what is still to be flushed
        sys.exit(_BROKEN_PIPE)
    except (ValueError, OSError) as error:
        _refuse(_of_system(error) if isinstance(error, OSError) else str(error))
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        # What typer raises for wrong options is of no public class in some versions and of click's in others.
        if not hasattr(error, "format_message"):
            raise
        _refuse(error.format_message())
    if code in (INTERRUPTED, TERMINATED):
        resumes = "; the same command goes on from the last checkpoint" if words[:1] == ["compare"] else ""
        typer.echo(f"stopped{resumes}", err=True)
    sys.exit(code or (0 if words else 2))


def _refuse(message: str) -> NoReturn:
    line = " ".join(message.splitlines())
    typer.echo(f"error: {line if len(line) <= _LONGEST else line[: _LONGEST - 3] + '...'}", err=True)
    sys.exit(2)


def _of_system(error: OSError) -> str:
    words = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {words}" if error.filename is not None else words


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does, with everything that cleans up behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
