"""Step sizes, groups of weights and what a recipe refuses."""
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.language.recipe import Recipe, adamw, learning_rate, parameter_groups


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1))
def test_schedule(steps, warmup, final):
    r = Recipe(steps=steps, batch_size=1, lr=2.0, warmup=warmup, final=final)
    rates = [learning_rate(t, r) for t in range(steps + 1)]
    assert all(0 <= x <= 2 + 1e-12 for x in rates)
    top = min(warmup, steps)
    assert all(a < b for a, b in pairwise(rates[:top]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    if steps > warmup:
        assert math.isclose(rates[warmup], 2) and math.isclose(rates[-1], 2*final, abs_tol=1e-12)


@pytest.mark.parametrize("schedule, decay", [("wsd", 30), ("constant", 0)])
def test_stable_schedules(schedule, decay):
    r = Recipe(steps=100, batch_size=1, lr=2.0, warmup=10, final=0.2, schedule=schedule,
               decay=decay)
    rates = [learning_rate(t, r) for t in range(101)]
    assert rates[9:101 - decay] == [2.0]*(92 - decay)
    for t in range(100 - decay, 101):
        u = (t - 100 + decay)/max(decay, 1)
        assert math.isclose(rates[t], 2*(0.2 + 0.8*(1 - u**0.5)))


def test_adamw_written_out():
    torch.manual_seed(0)
    m = nn.Linear(3, 2).double()
    r = Recipe(steps=1, batch_size=1, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    opt = adamw(m, r)
    w, b = m.weight.detach().clone(), m.bias.detach().clone()
    moments = {id(p): [torch.zeros_like(p), torch.zeros_like(p)] for p in (w, b)}
    for t in range(1, 4):
        g = {id(w): torch.randn(2, 3).double(), id(b): torch.randn(2).double()}
        m.weight.grad, m.bias.grad = g[id(w)], g[id(b)]
        opt.step()
        for p, decay in ((w, 0.5), (b, 0)):
            a, v = moments[id(p)]
            a.lerp_(g[id(p)], 0.2); v.lerp_(g[id(p)]**2, 0.1)
            p.mul_(1 - 0.1*decay)
            p.sub_(0.1*a/(1 - 0.8**t)/((v/(1 - 0.9**t)).sqrt() + 1e-3))
        torch.testing.assert_close(m.weight.data, w)
        torch.testing.assert_close(m.bias.data, b)


def test_groups():
    m = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    m[0].extra = nn.Parameter(torch.ones(2, 2))
    m[0].frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    m[0].no_decay = ("extra",)
    yes, no = parameter_groups(m, 0.3)
    assert [id(p) for p in yes["params"]] == [id(m[0].weight)] and yes["weight_decay"] == 0.3
    assert len(no["params"]) == 4 and no["weight_decay"] == 0
    assert id(m[0].frozen) not in {id(p) for g in (yes, no) for p in g["params"]}


@pytest.mark.parametrize("change, text", [
    (dict(accumulate=3), "accumulate=3"), (dict(steps=0), "steps=0"), (dict(lr=0.0), "lr"),
    (dict(precision="fp8"), "fp32, bf16"), (dict(clip=-1.0), "clip"),
    (dict(warmup=-1), "warmup=-1"), (dict(schedule="cos"), "cosine, wsd, constant"),
    (dict(decay=2), "decay=2"), (dict(decay=9, schedule="wsd"), "shorten it")])
def test_recipes_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text): Recipe(**dict(steps=4, batch_size=4) | change)
