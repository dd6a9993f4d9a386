"Statistics: against SciPy's own tests, and what must hold for any data"

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from yokolab.lab.stats import Estimate, mean, paired, ratio, slope

floats = st.floats(-1e6, 1e6, allow_subnormal=False)
vectors = st.lists(floats, min_size=2, max_size=12)
few = settings(deadline=None, max_examples=60)


def test_paired_is_scipys_paired_test():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7)) + [[0.5], [0]]
    e, r = paired(a, b), sps.ttest_rel(a, b)
    assert e.value == pytest.approx((a - b).mean())
    assert e.p == pytest.approx(r.pvalue)
    assert e.ci == pytest.approx(tuple(r.confidence_interval(0.95)))
    assert e.n == 7


@few
@given(vectors)
def test_mean_lies_in_its_interval(a):
    e = mean(a)
    assert e.lo <= e.value <= e.hi and 0 <= e.p <= 1 and e.n == len(a)


@few
@given(vectors, st.floats(-10, 10))
def test_swapping_the_methods_mirrors_the_interval(a, shift):
    b = [x*0.9 + shift for x in a]
    e, f = paired(a, b), paired(b, a)
    assert (e.value, e.lo, e.hi) == pytest.approx((-f.value, -f.hi, -f.lo), rel=1e-9, abs=1e-9)
    assert e.p == pytest.approx(f.p)


@few
@given(vectors)
def test_a_higher_level_gives_a_wider_interval(a):
    narrow, wide = mean(a, level=0.8), mean(a, level=0.99)
    assert wide.lo <= narrow.lo and narrow.hi <= wide.hi


@pytest.mark.parametrize("value", [0.0, 3.0, 0.1])
def test_constant_values_have_no_width_and_no_warning(value):
    e = mean([value]*5)
    assert e.lo == pytest.approx(e.hi) and e.value == pytest.approx(value)
    assert e.p == (1.0 if value == 0 else 0.0)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=9), st.floats(0.1, 50))
def test_ratio_of_scaled_times_is_the_scale(fast, c):
    e = ratio([c*t for t in fast], fast)
    assert e.value == pytest.approx(c) and e.lo == pytest.approx(c) and e.hi == pytest.approx(c)


def test_ratio_is_repeatable_and_ignores_one_interruption():
    rng = np.random.default_rng(1)
    fast = 1 + 0.05*rng.random(11)
    slow = 3*(1 + 0.05*rng.random(11))
    slow[4] = 100
    e = ratio(slow, fast)
    assert e == ratio(slow, fast)
    assert 2.8 < e.lo <= e.value <= e.hi < 3.3 and e.p < 0.01


def test_ratio_of_equal_times_shows_no_effect():
    e = ratio([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (e.value, e.lo, e.hi, e.p) == (1.0, 1.0, 1.0, 1.0)


def test_ratio_interval_covers_the_true_ratio():
    rng = np.random.default_rng(2)
    noise = np.exp(0.1*rng.standard_normal((100, 2, 15)))
    found = [ratio(2*a, b, resamples=499) for a, b in noise]
    assert np.mean([e.lo <= 2 <= e.hi for e in found]) > 0.85


@few
@given(st.floats(-3, 3), st.floats(0.01, 100))
def test_slope_finds_an_exact_power(k, c):
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    e = slope(x, c*x**k)
    assert e.value == pytest.approx(k, abs=1e-9) and e.lo - 1e-9 <= k <= e.hi + 1e-9


def test_slope_interval_matches_scipy():
    rng = np.random.default_rng(3)
    x = np.arange(1, 9.0)
    y = x**2*np.exp(0.1*rng.standard_normal(8))
    r = sps.linregress(np.log(x), np.log(y))
    half = sps.t.ppf(0.975, 6)*r.stderr
    assert slope(x, y).ci == pytest.approx((r.slope - half, r.slope + half))


@pytest.mark.parametrize("call, words", [
    (lambda: mean([1.0]), ["a=[1.0]", "at least 2"]),
    (lambda: mean([]), ["a=[]"]),
    (lambda: mean([1, np.inf]), ["a[1]=inf"]),
    (lambda: mean([[1, 2]]), ["shape (1, 2)"]),
    (lambda: mean([1, 2], level=1.5), ["level=1.5"]),
    (lambda: paired([1, 2, 3], [1, 2]), ["3 and 2 values", "same order"]),
    (lambda: paired([1, 2], [1, float("nan")]), ["b[1]=nan"]),
    (lambda: ratio([1, -1], [1, 1]), ["slow", "-1", "positive"]),
    (lambda: ratio([1, 1], [1, 0]), ["fast", "positive"]),
    (lambda: slope([1, 2], [1, 2]), ["at least 3"]),
    (lambda: slope([1, 1, 1], [1, 2, 3]), ["x=", "vary the size"]),
    (lambda: slope([1, 2, 3], [1, 2, -3]), ["y", "positive"]),
])
def test_what_cannot_be_meant_is_refused(call, words):
    with pytest.raises(ValueError) as e: call()
    assert all(w in str(e.value) for w in words), e.value


def test_what_is_no_number_is_a_type_error():
    with pytest.raises(TypeError, match="a='abc'"): mean("abc")


def test_tensors_are_taken():
    torch = pytest.importorskip("torch")
    a = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert mean(a) == mean([1.0, 2.0, 4.0])


def test_estimate_shows_itself():
    e = Estimate(1.23456, 1.0, 1.5, 4, 0.0123)
    assert str(e) == "1.235 [1, 1.5] (n=4, p=0.012)"
    assert "1.235" in e._repr_markdown_() and float(e) == 1.23456
