"""The command line: reads options, calls the packages below, prints results."""

import sys

import typer

from gated_attention.cli.adapt import adapt_commands
from gated_attention.cli.entry import run
from gated_attention.cli.models import model_commands
from gated_attention.cli.study import study_commands
from gated_attention.cli.tokenize import tokenize_commands
from gated_attention.cli.train import train_commands

app = typer.Typer(
    name="gated-attention",
    help="Train, compare and inspect gated softmax attention.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(study_commands)
app.add_typer(model_commands)
app.add_typer(adapt_commands)
app.add_typer(tokenize_commands)
app.add_typer(train_commands)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit; bad input is one line and exit code 2, an interruption exit code 130 or 143."""
    run(app, sys.argv[1:] if arguments is None else arguments)
