"""Tokenizers lose nothing, repeat exactly, and say which size they can reach."""

import json
import re

import pytest
from datasets import Dataset
from huggingface_hub import constants as hub
from transformers import AutoTokenizer

from gated_attention.train.text.tokenizer import END_OF_TEXT, check_tokenizer_name, load_tokenizer, tokenizer_files

TEXTS = [
    "plain",
    "",
    " lead and trail  ",
    "tab\tnew\nline\r\nand\rold",
    "a . b , don ' t 's ?",
    "Ġ Ċ ġ are letters too",
    "\x00\x01\x1b\x7f\x85\u2028",
    "naïve 漢字 かな 한글 עברית",
    "😀 👩‍👩‍👧 🇩🇪 \u202e\ufeff\U0010ffff",
    f"not {END_OF_TEXT} the end",
    "1234567890 0x1F",
]
CORPUS = [f"def function_{i}(argument):\n    return argument + {i * 37}\n" for i in range(200)]


def documents(*texts):
    return Dataset.from_dict({"text": list(texts)})


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer("bpe-280", documents(*CORPUS))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_lose_nothing(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_bytes_lose_nothing_of_any_character():
    tokenizer = load_tokenizer("bytes")
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 997)]))
    found = ids(tokenizer, text)
    assert len(found) == len(text.encode())
    assert tokenizer.decode(found) == text


def test_bytes_are_256_tokens_and_the_end_of_text():
    tokenizer = load_tokenizer("bytes")
    assert len(tokenizer) == 257
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 256


def test_no_token_is_padding():
    # An embedding leaves the row of its padding index untrained, and ours would be the end of text.
    assert load_tokenizer("bytes").pad_token_id is None


@pytest.mark.parametrize("text", TEXTS)
def test_bpe_loses_nothing_of_text_it_never_saw(bpe, text):
    assert bpe.decode(ids(bpe, text)) == text


def test_bpe_has_exactly_the_size_asked_for(bpe):
    assert len(bpe) == 280
    assert sorted(bpe.get_vocab().values()) == list(range(280))
    assert bpe.eos_token_id == bpe.bos_token_id == 279


def test_bpe_merges_words(bpe):
    assert len(ids(bpe, " argument")) == 1


def test_bpe_keeps_digits_apart_however_often_they_meet():
    tokenizer = load_tokenizer("bpe-260", documents("ab 1000 abc 1000 abcd 1000 " * 20))
    assert [tokenizer.decode([i]) for i in ids(tokenizer, "1000")] == list("1000")


def test_bpe_repeats_exactly(bpe):
    again = load_tokenizer("bpe-280", documents(*CORPUS))
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()


def test_a_capped_bpe_is_trained_on_text_of_every_domain():
    texts = ["alphabetical " * 10] * 100 + ["zyzzyva " * 10] * 100
    tokenizer = load_tokenizer("bpe-268", documents(*texts), max_train_bytes=2_000)
    merged = [token for token in tokenizer.get_vocab() if len(token) > 1 and token != END_OF_TEXT]
    assert any("z" in token for token in merged)
    assert any("p" in token for token in merged)


def test_the_cap_bounds_the_text_that_is_read():
    texts = ["aa " * 10] * 50 + ["qq " * 10] * 50
    for cap, known in ((1, 1), (10_000, 2)):
        tokenizer = load_tokenizer("bpe-259", documents(*texts), max_train_bytes=cap)
        assert len({"aa", "qq"} & set(tokenizer.get_vocab())) == known


def test_a_size_out_of_reach_names_one_that_is_not():
    with pytest.raises(ValueError, match="yields only") as caught:
        load_tokenizer("bpe-5000", documents("low lower lowest"))
    reachable = re.search(r"use (bpe-\d+)", str(caught.value))[1]
    assert f"bpe-{len(load_tokenizer(reachable, documents('low lower lowest')))}" == reachable


def test_a_text_without_any_pair_leaves_bytes():
    with pytest.raises(ValueError, match="only 257 tokens of bpe-258; use bytes"):
        load_tokenizer("bpe-258", documents("a", "b"))


@pytest.mark.parametrize("name", ["bpe-0", "bpe-257"])
def test_a_size_below_the_alphabet_is_refused(name):
    with pytest.raises(ValueError, match="at least bpe-258"):
        check_tokenizer_name(name)
    with pytest.raises(ValueError, match="at least bpe-258"):
        load_tokenizer(name, documents(*CORPUS))


def test_bpe_needs_documents():
    with pytest.raises(ValueError, match="pass documents"):
        load_tokenizer("bpe-300")


@pytest.fixture
def folder(tmp_path, bpe):
    bpe.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_a_saved_tokenizer_comes_back_the_same(folder, bpe, text):
    for tokenizer in (load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)):
        assert ids(tokenizer, text) == ids(bpe, text)
        assert tokenizer.decode(ids(tokenizer, text)) == text
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (bpe.eos_token_id, bpe.bos_token_id)


def test_the_files_of_a_local_tokenizer_are_known(folder, monkeypatch):
    assert folder / "tokenizer.json" in tokenizer_files(str(folder))
    (folder / "bytes").mkdir()
    monkeypatch.chdir(folder)
    assert tokenizer_files("bytes") == tokenizer_files("bpe-300") == tokenizer_files("owner/name") == []


def test_a_run_lends_the_tokenizer_of_its_last_checkpoint(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("out") / "runs" / "study" / "baseline" / "seed0"
    for step in (20, 100):
        checkpoint = run / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    for path in folder.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    assert len(load_tokenizer(str(run))) == len(load_tokenizer(str(folder)))
    assert checkpoint / "tokenizer.json" in tokenizer_files(str(run))
    (run.parent / "seed1").mkdir()
    with pytest.raises(ValueError, match="seed1 holds no tokenizer; use 'bytes', 'bpe-N', a folder or a hub name"):
        load_tokenizer(str(run.parent / "seed1"))


def edit(path, **changes):
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def test_a_tokenizer_without_eos_is_refused(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="has no EOS token"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("damage", ["empty", "torn", "unknown model"])
def test_a_broken_folder_is_refused_in_one_line(folder, damage):
    if damage == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif damage == "torn":
        (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    else:
        edit(folder / "tokenizer.json", model={"type": "Nonsense"})
    with pytest.raises(ValueError, match="use 'bytes', 'bpe-N', a folder or a hub name") as caught:
        load_tokenizer(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such", "", "a/b/c", "two words"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name):
    with pytest.raises(ValueError, match=f"no tokenizer folder {name!r}"):
        load_tokenizer(name)


def test_a_file_is_no_tokenizer(folder):
    with pytest.raises(ValueError, match="no tokenizer folder"):
        load_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["nonsense", "owner/name", "bpe-x"])
def test_a_hub_name_is_refused_at_once_where_the_hub_does_not_answer(name, monkeypatch, capfd):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ValueError, match=f"{name!r} here, and http://127.0.0.1:9 does not answer"):
        load_tokenizer(name)
    assert capfd.readouterr() == ("", "")
