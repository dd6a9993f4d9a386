"""Every text decodes to itself."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.lab.sources import DataNotFound
from yokolab.language.text import Bytes, corpus, load_bpe, save_bpe, train_bpe

pytest.importorskip("tokenizers")
TEXTS = corpus("python_source", limit=60)
BPE = train_bpe(TEXTS, 500)
few = settings(max_examples=60, deadline=None)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@few
@given(anything)
def test_round_trip(text):
    for t in (Bytes(), BPE):
        ids = t.encode(text)
        assert t.decode(ids) == t.decode([*ids, t.end]) == text
        assert all(0 <= i < t.end for i in ids)
    assert len(BPE.encode(text)) <= len(text.encode())


@few
@given(st.lists(anything, max_size=5))
def test_many_at_once(texts):
    for t in (Bytes(), BPE):
        assert [i.tolist() for i in t.encode_all(texts)] == [t.encode(x) for x in texts]


def test_sizes():
    assert BPE.vocab_size == 500 and BPE.end == 499
    assert Bytes().vocab_size == 257 and Bytes().encode("é") == [195, 169]
    assert train_bpe(["aaaa"], 5000).vocab_size < 300        # no more pairs to join
    assert Bytes().decode([195]) == "\ufffd"
    with pytest.raises(ValueError, match="vocab_size=200"): train_bpe(TEXTS, 200)


def test_training_repeats():
    again = train_bpe(TEXTS, 500)
    assert json.loads(again.inner.to_str()) == json.loads(BPE.inner.to_str())


def test_file(tmp_path):
    path = tmp_path/"new"/"tokenizer.json"
    save_bpe(BPE, path)
    back = load_bpe(path)
    assert back.vocab_size == 500 and back.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    for broken in (path.read_text()[:300], "", "{}", "[1]"):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"path=.*tokenizer\.json"): load_bpe(path)


@pytest.mark.parametrize("tokenizer", [Bytes(), BPE], ids=["bytes", "bpe"])
def test_what_is_no_text(tokenizer):
    with pytest.raises(ValueError, match="surrogate"): tokenizer.encode("ab\udc80")
    with pytest.raises(ValueError, match="surrogate"): tokenizer.encode_all(["", "\udc80"])
    with pytest.raises(TypeError, match="'bytes'"): tokenizer.encode(b"ab")


@pytest.mark.data
@pytest.mark.parametrize("name, split", [("multilingual_text", "validation"),
                                         ("tiny_shakespeare", "validation")])
def test_corpora_by_name(name, split):
    try: texts = corpus(name, split, limit=40)
    except DataNotFound: pytest.skip(f"{name} is not in YOKOLAB_DATA")
    bpe = train_bpe(texts, 400)
    for t in texts: assert bpe.decode(bpe.encode(t)) == Bytes().decode(Bytes().encode(t)) == t


def test_corpus():
    assert len(corpus("python_source", limit=3)) == 3 and all(TEXTS)
    with pytest.raises(ValueError, match="no column"): corpus("python_source", column="txt")
    with pytest.raises(ValueError, match="data not found"): corpus("tiny_shakespear")
