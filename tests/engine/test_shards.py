"""OLMo-core reads token shards as they are: every sequence, the documents in it, and mixtures."""

import json

import datasets
import numpy as np
import pytest
from olmo_core.data import NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.data.source_mixture import SourceMixtureConfig, SourceMixtureDatasetConfig, SourceMixtureList
from olmo_core.data.types import NumpyDatasetDType
from olmo_core.data.utils import iter_document_indices

from gated_attention.shards import mix
from gated_attention.shards.unfinished import TokenizeConfig
from gated_attention.train.text.tokenize import tokenize
from gated_attention.train.text.tokenizer import load_tokenizer

LENGTH = 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def make_shards(folder, word):
    source = folder / f"{word}.jsonl"
    source.write_text("".join(json.dumps({"text": f"{word} " * (1 + i % 40)}) + "\n" for i in range(90)))
    return tokenize(TokenizeConfig((str(source),), shard_tokens=1_500), folder / word)


def settings(shards, work):
    special = shards.index.tokenizer
    eos, vocab = special.eos_token_id, special.vocab_size
    return {
        "tokenizer": TokenizerConfig(vocab_size=vocab, eos_token_id=eos, pad_token_id=eos, bos_token_id=None),
        "dtype": NumpyDatasetDType(shards.index.dtype),
        "sequence_length": LENGTH,
        "work_dir": str(work),
    }


def test_sequences_and_their_documents_are_those_of_the_shards(tmp_path):
    shards = make_shards(tmp_path, "gate")
    paths = [str(path) for path in shards.paths]
    found = NumpyFSLDatasetConfig(paths=paths, generate_doc_lengths=True, **settings(shards, tmp_path)).build()
    wanted = [ids[at : at + LENGTH] for ids in shards.ids for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    assert len(found) == len(wanted) > 100
    for item, ids in zip((found[i] for i in range(len(found))), wanted, strict=True):
        assert item["input_ids"].tolist() == ids.tolist()
        inner = np.flatnonzero(ids == shards.index.tokenizer.eos_token_id)
        ends = inner + 1 if len(inner) and inner[-1] == LENGTH - 1 else [*(inner + 1), LENGTH]
        assert item["doc_lens"].tolist() == np.diff([0, *ends]).tolist()


def test_tables_are_its_metadata_of_documents(tmp_path):
    shards = make_shards(tmp_path, "sink")
    for number, path in enumerate(shards.paths):
        found = list(iter_document_indices(str(path), use_array_if_local=False, dtype=np.uint16))
        assert found == [(start, end) for start, end, _ in shards.table(number)]


def test_a_mixture_has_the_shares_that_mix_gives(tmp_path):
    one, two = make_shards(tmp_path, "gate"), make_shards(tmp_path, "sink")
    mixture = mix({str(one.folder): 1, str(two.folder): 3})
    sources = [
        SourceMixtureConfig(shards.folder.name, share, [str(path) for path in shards.paths])
        for shards, share in mixture
    ]
    wanted = SourceMixtureDatasetConfig(
        source_list=SourceMixtureList(sources), requested_tokens=6_400, global_batch_size=320, quiet=True,
        render_tables=False,
    )  # fmt: skip
    found = NumpyFSLDatasetConfig.from_src_mix(wanted, **settings(one, tmp_path)).build()
    found.prepare()
    tokenizer = load_tokenizer(str(one.tokenizer))
    texts = [tokenizer.decode(found[i]["input_ids"].tolist()) for i in range(len(found))]
    assert len(texts) == 200
    assert sum("sink" in text for text in texts) == 150
    assert sum("gate" in text for text in texts) == 50
