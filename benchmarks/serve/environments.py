"""The servers' environments, made below `.serve/`; the one of llama.cpp takes ten minutes, as it is compiled."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PLACE = Path(".serve")
TORCH = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "torch==2.13.0"]
"""PyTorch without CUDA: from its own index, unless pip is told of another place that has it."""
ONLY_AUDIO = ["torchaudio", "torchcodec"]
"""Required by vLLM, not needed for text; those of the index are built for CUDA and cannot be imported here."""


def environment(name: str) -> Path:
    """The Python of a server's environment: of the folder that `SERVE_<NAME>` names, else made where it is missing."""
    given = os.environ.get(f"SERVE_{name.upper()}")
    place = Path(given or PLACE / name)
    python = (place / "bin" / "python").absolute()
    if not given and not (place / ".ready").exists():
        pip = [python, "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([*pip, "install", "--quiet", *TORCH], check=True)
        subprocess.run([*pip, "install", "--quiet", "--requirement", HERE / f"{name}.txt"], check=True)
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *ONLY_AUDIO], check=True, stderr=subprocess.DEVNULL)
        (place / ".ready").touch()
    return python


def installed(python: Path, package: str) -> str:
    """The version of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def converter() -> Path:
    """llama.cpp's own, which lies in the source distribution of its Python binding."""
    script = "llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"
    if not any(PLACE.glob(script)):
        pinned = next(line for line in (HERE / "llama_cpp.txt").read_text().splitlines() if line.startswith("llama"))
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", PLACE]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, pinned], check=True)
        subprocess.run(["tar", "-xzf", next(PLACE.glob("llama_cpp_python-*.tar.gz")), "-C", PLACE], check=True)
    return next(PLACE.glob(script)).absolute()
