"The topic's interface, task and counted costs"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.curvature.gradient_preconditioning import (
    NAMES,
    counted_cost,
    mlp,
    optimizer,
    step,
    step_cost,
    teacher_data,
    train,
)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "Newton"])
def test_every_method_through_one_call(name):
    x, y = teacher_data(48, d=12, classes=4)
    model = mlp(12, 8, 2, 4)
    opt = optimizer(name, model, lr=1e-3, damping=1e-1)
    before = [p.detach().clone() for p in model.parameters()]
    assert torch.isfinite(step(opt, model, x, y))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@given(n=st.integers(1, 4096), d=st.integers(1, 2048))
@settings(max_examples=30, deadline=None)
def test_costs_follow_their_exponents(n, d):
    for name, key, power, of in (("K-FAC", "solve", 3, "d"), ("K-FAC", "curvature", 1, "n"),
                                 ("SMW-NG", "solve", 3, "n"), ("SMW-NG", "curvature", 2, "n"),
                                 ("SMW-NG", "curvature", 1, "d"),
                                 ("FOOF", "solve", 3, "d")):
        a = counted_cost(name, n, d, d)[key]
        b = counted_cost(name, *((2 * n, d, d) if of == "n" else (n, 2 * d, 2 * d)))[key]
        assert math.log2(b / a) == pytest.approx(power)
    few = counted_cost("SENG", max(d // 8, 1), d, d)
    assert counted_cost("SENG", 8 * d, d, d)["solve"] > few["solve"]


def test_measured_memory_is_the_counted_one():
    for name in ("K-FAC", "FOOF", "E-KFAC"):
        want = sum(counted_cost(name, 1, i + 1, o)["memory"]
                   for i, o in ((20, 20), (20, 20), (20, 10)))
        assert step_cost(name, 32, 20, 3)["memory"] <= 1.1 * want
    for name in ("SENG", "SMW-NG"):              # rows and Gram matrices, no copy of the rows
        layers = ((21, 20), (21, 20), (21, 10))
        want = sum(counted_cost(name, 32, i, o)["memory"] for i, o in layers)
        if name == "SMW-NG": want -= 2 * 32**2   # one Gram matrix for all layers
        assert .9 * want <= step_cost(name, 32, 20, 3)["memory"] <= 1.1 * want


def test_training_is_deterministic_and_stops_at_the_target():
    data = teacher_data(256, d=8, classes=3)
    one, two = (train("K-FAC", data, 64, .05, .01, 20, width=8) for _ in range(2))
    assert one.losses == two.losses and one.steps is None
    done = train("K-FAC", data, 64, .05, .01, 20, target=one.losses[1] + 1e-6, width=8)
    assert done.steps is not None and done.steps <= 10


def test_arguments():
    with pytest.raises(ValueError, match="argument name='Adam': is no method here"):
        optimizer("Adam", mlp(), .1)
    with pytest.raises(ValueError, match="has no counted cost"): counted_cost("PSGD", 1, 1, 1)
