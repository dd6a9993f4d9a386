"""Packing loses nothing, masks what it must, and batches depend on the seed alone."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.language.model import Config, Transformer, cross_entropy
from yokolab.language.packing import IGNORE, Batches, pack

few = settings(max_examples=40, deadline=None)
documents = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=14), min_size=1, max_size=12)


@few
@given(documents, st.integers(1, 9), st.booleans(), st.sampled_from([None, 9]))
def test_every_token_once_with_its_successor(docs, context, split, end):
    p = pack(docs, context, end=end, split=split)
    tail = [] if end is None else [end]
    pairs = lambda d: sorted(zip(d, [*d[1:], IGNORE], strict=True))
    for i, d in enumerate(docs):
        mine = p.documents == i
        got = sorted(zip(p.tokens[mine].tolist(), p.targets[mine].tolist(), strict=True))
        assert got == pairs([*d, *tail])
    gap = p.documents < 0
    assert (p.targets[gap] == IGNORE).all() and (p.tokens[gap] == 0).all()
    n = sum(map(len, docs)) + len(docs)*len(tail)
    assert p.counted == n - len(docs) and abs(p.fill - n/p.tokens.numel()) < 1e-12
    if split: assert len(p) == -(-n//context)


@few
@given(documents, st.integers(1, 9))
def test_whole_documents_stay_whole(docs, context):
    p = pack(docs, context, split=False)
    for i, d in enumerate(docs):
        rows = {r for r, row in enumerate(p.documents.tolist()) if i in row}
        assert len(rows) <= -(-len(d)//context)
    used = sorted(-(-len(d)//context) for d in docs)
    assert len(p) <= sum(used)
    half = [int((row >= 0).sum()) for row in p.documents]
    assert sum(h*2 <= context for h in half) <= 1            # two such rows would share one


@few
@given(documents, st.integers(0, 9))
def test_packed_loss_is_the_documents_loss(docs, seed):
    model = Transformer(Config(vocab_size=9, d_model=8, n_layers=2, n_heads=2, d_ff=12, context=14,
                               init_std=0.4), seed=seed).double()
    p = pack(docs, 14, split=False)
    both = model.loss(p.tokens, p.targets, documents=p.documents, reduction="sum")
    alone = sum(cross_entropy(model(torch.tensor([d])), torch.tensor([[*d[1:], IGNORE]]), "sum")
                for d in docs)
    torch.testing.assert_close(both, alone)


@few
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 5))
def test_epochs_are_permutations(rows, size, seed):
    data = pack([[i] for i in range(rows)], 1)
    b = Batches(data, size, seed)
    flat = np.concatenate([b.rows(s) for s in range(3*rows)])
    for e in range(3): assert sorted(flat[e*rows:(e + 1)*rows]) == list(range(rows))
    late = Batches(data, size, seed)
    assert late.rows(2*rows).tolist() == b.rows(2*rows).tolist()
    assert late.at(1).tokens.flatten().tolist() == b.rows(1).tolist()


def test_seeds_differ():
    data = pack([[i] for i in range(50)], 1)
    assert Batches(data, 50, 0).rows(0).tolist() != Batches(data, 50, 1).rows(0).tolist()
    assert Batches(data, 50, 0).rows(0).tolist() != Batches(data, 50, 0).rows(1).tolist()


def test_fingerprint():
    a = pack([[1, 2, 3], [4, 5]], 4)
    assert a.fingerprint() == pack([[1, 2, 3], [4, 5]], 4).fingerprint()
    for docs, n in (([[1, 2, 3], [4, 6]], 4), ([[1, 2, 3, 4, 5]], 4), ([[1, 2, 3], [4, 5]], 5)):
        assert a.fingerprint() != pack(docs, n).fingerprint()


@pytest.mark.parametrize("kw, text", [
    (dict(documents=[]), "no token"), (dict(documents=[[]]), "no token"),
    (dict(documents=[[1, -2]]), "documents=-2"), (dict(context=0), "context=0")])
def test_refused(kw, text):
    with pytest.raises(ValueError, match=text): pack(**dict(documents=[[1, 2]], context=4) | kw)


def test_refused_batches():
    data = pack([[1]], 1)
    with pytest.raises(ValueError, match="batch_size=0"): Batches(data, 0)
    with pytest.raises(ValueError, match="seed=-1"): Batches(data, 1, -1).rows(0)
