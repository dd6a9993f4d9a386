"""A state follows from target, null and interval, and from nothing else."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.lab.claims import ClaimError, judge, measure, parse_target, read_claim

num = st.floats(-100, 100, allow_nan=False)


def spec(target, kind="trend", **k):
    return read_claim("C1", dict(text="t", source="s", kind=kind, target=target, **k))


@settings(max_examples=200, deadline=None)
@given(num, st.tuples(num, num, num))
def test_states_of_a_threshold(x, three):
    lo, m, hi = sorted(three)
    s = spec(f"> {x!r}" if x >= 0 else f"< {x!r}")
    inside = (lambda v: v > x) if x >= 0 else (lambda v: v < x)
    state = judge(s, m, (lo, hi))
    assert (state == "confirmed") == (inside(lo) and inside(hi))
    if state == "weak": assert (inside(lo) or inside(hi)) and not (inside(lo) and inside(hi))
    if m * (1 if x >= 0 else -1) <= 0: assert state != "weak"          # wrong sign is never weak


@settings(max_examples=100, deadline=None)
@given(num, num)
def test_a_point_is_in_or_out(x, m):
    assert judge(spec(f"<= {x!r}", "bound"), m) == ("confirmed" if m <= x else "refuted")


@pytest.mark.parametrize("text,inside,outside", [
    (">= 1", 1, 0.999), ("> 1", 1.001, 1), ("== 0", 0, 1e-300), ("in [1, 2)", 1, 2)])
def test_targets(text, inside, outside):
    t = parse_target(text)
    assert inside in t and outside not in t


def test_a_half_line_is_written_with_a_sign():
    with pytest.raises(ClaimError, match="target"): parse_target("in (-inf, 2]")


@pytest.mark.parametrize("value,ci,message", [
    (math.nan, (0, 1), "not a finite number"), (math.inf, (0, 1), "not a finite number"),
    (1.0, None, "needs an interval"), (2.0, (0, 1), "outside its interval"),
    (0.5, (1, 0), "lower end first"), (0.5, (0, math.inf), "not two finite numbers"),
    (0.5, (math.nan, math.nan), "more than one seed"), (0.5, (0, 1, 2), "not two finite")])
def test_measuring_is_checked(value, ci, message):
    with pytest.raises(ClaimError, match=message): measure(spec("> 0"), "cpu", value, ci)


def test_seeds_may_be_an_array():
    assert measure(spec("> 0"), "cpu", 1.0, (0.5, 2), np.arange(3)).seeds == (0, 1, 2)


def test_out_of_scale_needs_a_reason():
    with pytest.raises(ClaimError, match="reason"): spec("> 0", profiles=())


def test_a_profile_that_cannot_show_it_keeps_the_number_but_not_the_verdict():
    c = measure(spec("> 0", profiles="gpu"), "cpu", 1.0, (0.5, 1.5))
    assert c.state == "out of scale" and c.measured == 1.0 and "gpu" in c.reason
