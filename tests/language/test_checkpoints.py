"""Whole files or none, and nothing changed by a file that does not fit."""
import os
import random
from dataclasses import replace

import pytest
import torch

from yokolab.language import checkpoints
from yokolab.language.checkpoints import load_model, read_whole, write_whole
from yokolab.language.model import Config, Transformer
from yokolab.language.packing import pack
from yokolab.language.recipe import Recipe
from yokolab.language.training import Trainer

SHAPE = Config(vocab_size=9, d_model=16, n_layers=1, n_heads=2, d_ff=16, context=8,
               rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                 original_max_position_embeddings=8))
DATA = pack([[1, 2, 3, 4, 5, 6, 7, 8]*3], 8)
RECIPE = Recipe(steps=4, batch_size=2)


def fresh(shape=SHAPE, data=DATA, recipe=RECIPE, **kw):
    return Trainer(Transformer(shape), data, recipe, **kw)


@pytest.fixture
def saved(tmp_path):
    """A trainer after three steps and its file."""
    t = fresh()
    t.run(3, checkpoint=tmp_path/"run.pt")
    return t, tmp_path/"run.pt"


def test_model_of_a_checkpoint(saved):
    t, path = saved
    m = load_model(path)
    assert m.config == SHAPE
    for p, q in zip(m.parameters(), t.model.parameters(), strict=True): assert torch.equal(p, q)


def untouched(t, path):
    with pytest.raises(ValueError) as e: t.run(checkpoint=path)
    plain = Transformer(t.model.config)
    assert t.done == 0 and not t.optimizer.state and not t.history.steps
    for p, q in zip(plain.parameters(), t.model.parameters(), strict=True): assert torch.equal(p, q)
    return str(e.value)


@pytest.mark.parametrize("make, text", [
    (lambda: fresh(replace(SHAPE, d_ff=24)), "another model (d_ff: 16 there, 24 here)"),
    (lambda: fresh(replace(SHAPE, rope_theta=5.0)), "another model (rope_theta"),
    (lambda: fresh(recipe=replace(RECIPE, steps=9)), "another recipe (steps: 4 there, 9 here)"),
    (lambda: fresh(data=pack([[1, 2, 3]*8], 8)), "other data"),
    (lambda: fresh(optimizer=lambda m, r: torch.optim.SGD(m.parameters())), "another optimizer")])
def test_of_another_run(saved, make, text):
    raw = saved[1].read_bytes()
    assert text in untouched(make(), saved[1])
    assert saved[1].read_bytes() == raw


def test_fields_of_the_recipe_may_differ(saved):
    t = fresh(recipe=replace(RECIPE, steps=6, schedule="wsd", decay=2))
    with pytest.raises(ValueError, match="decay: 0 there, 2 here"): t.load(saved[1])
    with pytest.raises(ValueError, match="steps: 4 there, 6 here"):
        t.load(saved[1], may_differ=("schedule", "decay"))
    assert t.done == 0
    t.load(saved[1], may_differ=("schedule", "decay", "steps"))
    assert t.done == 3 and len(t.run().steps) == 6


def test_truncated_anywhere(saved):
    path = saved[1]
    raw = path.read_bytes()
    rng = random.Random(0)
    for cut in (0, 1, 4, *(rng.randrange(len(raw)) for _ in range(6)), len(raw) - 1):
        path.write_bytes(raw[:cut])
        assert "truncated" in untouched(fresh(), path)
        assert path.read_bytes() == raw[:cut]                # nothing overwritten


def test_a_flipped_bit_in_the_weights(saved):
    path = saved[1]
    raw = bytearray(path.read_bytes())
    w = saved[0].model.embedding.weight.detach().numpy().tobytes()
    at = bytes(raw).index(w)
    raw[at + 5] ^= 4
    path.write_bytes(raw)
    assert "damaged" in untouched(fresh(), path)


@pytest.mark.parametrize("value", [dict(a=1), [1, 2], 3])
def test_another_kind_of_file(tmp_path, value):
    torch.save(value, tmp_path/"x.pt")
    assert "not a checkpoint of a training run" in untouched(fresh(), tmp_path/"x.pt")
    with pytest.raises(ValueError, match="not a checkpoint"): load_model(tmp_path/"x.pt")


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"): fresh().load(tmp_path/"none.pt")


def test_a_crash_while_writing_keeps_the_old_file(saved, monkeypatch):
    t, path = saved
    raw = path.read_bytes()

    def crash(*a, **k): raise OSError("disk full")
    for module, name in ((os, "fsync"), (os, "replace"), (torch, "save")):
        with monkeypatch.context() as m:
            m.setattr(module, name, crash)
            with pytest.raises(OSError, match="disk full"): t.save(path)
        assert path.read_bytes() == raw and [p.name for p in path.parent.iterdir()] == ["run.pt"]


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"owned"),)

    torch.save(dict(config=Evil()), tmp_path/"x.pt")
    with pytest.raises(ValueError, match="more than numbers"): read_whole(tmp_path/"x.pt")
    assert not (tmp_path/"owned").exists()


def test_values_come_back(tmp_path):
    value = dict(a=torch.arange(5.0), b=[1, "x", None], c=dict(d=(0.5, True)))
    write_whole(tmp_path/"sub"/"v.pt", value)
    back = read_whole(tmp_path/"sub"/"v.pt")
    assert torch.equal(back.pop("a"), value.pop("a")) and back == value
    assert checkpoints.KEYS[0] == "config"
