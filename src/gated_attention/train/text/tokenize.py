"""Sources into a folder of token shards, taken up again where it stopped."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from heapq import heappop, heappush
from pathlib import Path
from random import Random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gated_attention.files import claimed, new_folder, remove_parts, write_text, writing_to
from gated_attention.ranges import require_within
from gated_attention.shards.index import (
    FORMAT,
    INDEX_NAME,
    TOKENIZER_NAME,
    UNFINISHED_NAME,
    TokenIndex,
    TokenizerRecord,
    array_type,
    token_type,
)
from gated_attention.shards.read import TokenShards, open_shards
from gated_attention.shards.unfinished import TokenizeConfig, Unfinished, config_of, find_state, require_same
from gated_attention.shards.write import ShardWriter
from gated_attention.train.text.corpus import file_state, say_passed_over
from gated_attention.train.text.encode import encode_in_order
from gated_attention.train.text.stream import (
    START,
    Piece,
    Place,
    Source,
    find_sources,
    require_outside,
    stream_pieces,
)
from gated_attention.train.text.tokenizer import check_tokenizer_name, fingerprint, load_tokenizer, vocabulary_size

_BPE_BYTES = 50_000_000  # text that BPE is trained on, as in `load_tokenizer`
_PROGRESS_TOKENS = 500_000  # between reports of progress


def tokenize(
    config: TokenizeConfig,
    folder: Path,
    processes: int = 1,
    say: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> TokenShards:
    """Tokenise sources into `folder`, in the format of `gated_attention.shards`.

    Called again after any interruption, it keeps the finished shards and goes on. The folder is the same to the byte
    whatever the interruptions and the number of processes. If files of the sources changed meanwhile, the shards whose
    text was read before the first of these are kept, but none of a tokenizer that was trained on the sources.

    Args:
        processes: As `encode.encode_in_order`.
        progress: Called now and then with the documents and tokens so far.

    Raises:
        ValueError: if a source cannot be read or holds no text, there is no such tokenizer, the folder holds something
            else or lies within a source, another process writes it, or nothing can be written.
    """
    check_tokenizer_name(config.tokenizer)
    require_within("processes", processes, least=1, most=1024)
    sources = find_sources(config.sources)
    for source in sources:
        require_outside(folder, source)
    with claimed(folder, "folder"), writing_to(folder, "free space or choose another folder"):
        remove_parts(folder)
        if (folder / INDEX_NAME).exists():
            finished = open_shards(folder)
            require_same(folder, config_of(finished.index), config)
            (folder / UNFINISHED_NAME).unlink(missing_ok=True)
            say(f"{folder} is finished already")
            return finished
        wanted = Unfinished(config, tuple(tuple(map(file_state, source.files)) for source in sources))
        state = find_state(folder, wanted)
        for source in sources:
            say_passed_over(source.name, say)
            next(stream_pieces((source,), config.text_field))  # refuses what is wrong with the whole source
        if state.shards:
            say(f"keeping {len(state.shards):,} finished shards")
        home = folder / TOKENIZER_NAME
        made = None if home.exists() else _make_tokenizer(config, sources, say)
        state.write(folder)
        if made is not None:
            with new_folder(home) as part:
                made.save_pretrained(part)
        tokenizer = load_tokenizer(str(home))
        record = TokenizerRecord(
            config.tokenizer, fingerprint(tokenizer), vocabulary_size(tokenizer), tokenizer.eos_token_id,
            tokenizer.bos_token_id, tokenizer.pad_token_id,
        )  # fmt: skip
        try:
            for later in _write_shards(folder, state, sources, record, processes, progress):
                state = later
                state.write(folder)
        except ValueError:
            if not state.shards:  # nothing to go on with
                (folder / UNFINISHED_NAME).unlink()
                shutil.rmtree(home)
            raise
        index = TokenIndex(
            FORMAT, record, token_type(record.vocab_size), config.sources, config.text_field, config.shard_tokens,
            documents=sum(shard.documents for shard in state.shards),
            tokens=sum(shard.tokens for shard in state.shards),
            bytes=sum(shard.bytes for shard in state.shards),
            shards=state.shards,
        )  # fmt: skip
        write_text(folder / INDEX_NAME, json.dumps(asdict(index), indent=2) + "\n")
        (folder / UNFINISHED_NAME).unlink()
    return open_shards(folder)


def _write_shards(
    folder: Path, state: Unfinished, sources: Sequence[Source], record: TokenizerRecord, processes: int,
    progress: Callable[[int, int], None],
) -> Iterator[Unfinished]:  # fmt: skip
    """Write the shards that are missing; yields the state after each."""
    start = Place(*state.ends[-1]) if state.ends else START
    documents, tokens, reported = sum(one.documents for one in state.shards), sum(one.tokens for one in state.shards), 0
    stream, dtype = stream_pieces(sources, state.config.text_field, start), token_type(record.vocab_size)
    writer, last = None, start
    with ExitStack() as stack:
        for piece, ids, size in encode_in_order(stream, folder / TOKENIZER_NAME, array_type(dtype), processes):
            writer = writer or stack.enter_context(ShardWriter(folder, len(state.shards)))
            writer.add(ids, size, is_end=piece.is_end)
            last, tokens, documents = piece.after, tokens + len(ids), documents + piece.is_end
            if tokens - reported >= _PROGRESS_TOKENS:
                progress(documents, reported := tokens)
            if piece.is_end and writer.tokens >= state.config.shard_tokens:
                yield (state := state.add(writer.close(), last))
                writer = None
        if writer is not None:
            yield state.add(writer.close(), last)


def _make_tokenizer(
    config: TokenizeConfig, sources: Sequence[Source], say: Callable[[str], None]
) -> PreTrainedTokenizerBase:
    if not config.is_trained:
        return load_tokenizer(config.tokenizer)
    say(f"training {config.tokenizer}")
    return load_tokenizer(
        config.tokenizer, Dataset.from_dict({"text": _sample(stream_pieces(sources, config.text_field))})
    )


def _sample(stream: Iterable[Piece]) -> list[str]:
    """About `_BPE_BYTES` of text, drawn evenly with a fixed seed, in one pass that holds no more than that."""
    draw, drawn, num_bytes = Random(0), list[tuple[float, int, str]](), 0
    for piece in stream:
        size = len(piece.text.encode())
        heappush(drawn, (draw.random(), size, piece.text))
        num_bytes += size
        while num_bytes - drawn[0][1] >= _BPE_BYTES:
            num_bytes -= heappop(drawn)[1]
    return [text for _, _, text in sorted(drawn)]
