"""The command that trains one run on the engine."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer, echo

train_commands = Typer()


@train_commands.command()
def train(
    file: Annotated[Path, Argument(help="The run, a TOML file; docs/train.md has its keys.")],
    changes: Annotated[
        list[str] | None, Option("--set", help="SECTION.KEY=VALUE in place of what the file says; may be repeated.")
    ] = None,
    plan: Annotated[
        bool, Option("--plan", help="Print parameters, memory, operations, hours and cost, and run nothing.")
    ] = False,
    output: Annotated[Path, Option(help="Folder for runs/<name>/.")] = Path(),
) -> None:
    """Train one model from one file, on one GPU or many; needs the extra `engine`.

    On several GPUs: torchrun --nproc-per-node N -m gated_attention train FILE. Run the same command again to resume,
    also with another number of processes.
    """
    from gated_attention.engine.run.plan import plan_run
    from gated_attention.engine.run.plan_text import plan_lines
    from gated_attention.engine.run.run_file import read_run

    processes = os.environ.get("WORLD_SIZE")
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        if plan:
            run = read_run(file, changes or ())
            echo("\n".join(plan_lines(run, plan_run(run))))
            return
        from torch import cuda

        run = read_run(file, changes or (), int(processes) if processes else None, cuda.is_available())
        if find_spec("olmo_core") is None:
            raise ValueError(
                "train needs OLMo-core, which has an environment of its own: "
                "pip install 'gated-attention[engine]'; --plan works without it"
            )
        if processes is None and run.file.parallel.gpus > 1:
            raise ValueError(
                f"{file} is for {run.file.parallel.gpus} GPUs; start it with torchrun --nproc-per-node N -m "
                "gated_attention train, or add --set parallel.gpus=1"
            )
    except ValueError:
        if not is_first:
            sys.exit(2)  # the first process says it
        raise

    from gated_attention.study.engine_run.run import train_run

    sys.exit(train_run(run, output, echo if is_first else lambda message: None))
