"""What a record says of the code that made its numbers: versions of libraries, and the commit."""

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path


def library_versions() -> dict[str, str]:
    """Versions of Python and of those libraries on which numbers depend that are installed."""
    found = {"python": platform.python_version()}
    for name in ("gated-attention", "torch", "transformers", "accelerate", "datasets", "tokenizers"):
        with suppress(metadata.PackageNotFoundError):  # benchmarks need fewer, and run from a source tree
            found[name] = metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of the source tree, with `+dirty` if it has changes; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails if the package is installed below another checkout
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+dirty" if changes else commit
