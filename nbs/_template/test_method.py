"topicNAME: exact cases, the reference, and what is refused"

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.topicAREA.topicNAME import antithetic, plain, variances_ref


def gen(seed=0): return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=25)
@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(1, 20), st.integers(0, 100))
def test_affine_integrands_are_exact(a, b, pairs, seed):
    got = antithetic(lambda u: a*u + b, 2*pairs, repeats=3, generator=gen(seed))
    assert torch.allclose(got, torch.full_like(got, a/2 + b), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [antithetic, plain])
@pytest.mark.parametrize("f, exact", [(torch.exp, math.e - 1), (torch.square, 1/3)])
def test_estimates_are_unbiased(method, f, exact):
    x = method(f, 32, repeats=4000, generator=gen())
    assert abs(x.mean() - exact) < 4*x.std()/len(x)**0.5


@pytest.mark.parametrize("method", ["antithetic", "plain"])
def test_variances_are_those_of_the_reference(method):
    x = globals()[method](torch.exp, 32, repeats=8000, generator=gen())
    assert x.var().item()*32 == pytest.approx(getattr(variances_ref(torch.exp), method), rel=0.08)


def test_the_seed_decides():
    one, same, other = (antithetic(torch.exp, 8, generator=gen(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("kw, words", [
    (dict(n=7), "n=7"), (dict(n=0), "n=0"), (dict(n=2, repeats=0), "repeats=0")])
def test_what_cannot_be_sampled_is_refused(kw, words):
    for method in (antithetic, plain):
        with pytest.raises(ValueError, match=words): method(torch.exp, **kw)
