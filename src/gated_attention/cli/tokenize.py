"""The command that turns text into token shards."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from gated_attention.cli.models import TextField

tokenize_commands = Typer()


@tokenize_commands.command()
def tokenize(
    sources: Annotated[
        list[str],
        Argument(
            metavar="SRC...",
            help="Text, one source or several: files, folders, hub names, or 'stdlib', as for `compare`.",
        ),
    ],
    folder: Annotated[Path, Argument(metavar="DST", help="The folder of token shards.")],
    tokenizer: Annotated[
        str, Option(help="'bytes', 'bpe-N' trained on the text, a folder, a run of `compare`, or a hub name.")
    ] = "bytes",
    text_field: TextField = "text",
    shard_tokens: Annotated[
        int | None,
        Option(help="A shard ends with the first document that brings it to so many tokens; default: 100 million."),
    ] = None,
    processes: Annotated[
        int, Option(help="Processes that tokenise, a core each; one process uses all cores as threads.")
    ] = 1,
) -> None:
    """Write text as token shards, which `compare`, `study` and OLMo-core read as --data.

    Run the same command again to resume; finished shards are kept. The files do not depend on the number of processes.
    """
    from gated_attention.shards.unfinished import SHARD_TOKENS, TokenizeConfig  # here, not where `--help` would wait

    config = TokenizeConfig(
        tuple(sources), tokenizer, text_field, SHARD_TOKENS if shard_tokens is None else shard_tokens
    )

    from gated_attention.report.progress import ShardsDisplay
    from gated_attention.train.text.tokenize import tokenize as run

    display = ShardsDisplay()
    with display:
        shards = run(config, folder, processes, display.say, display.progress)
    display.summary(shards)
