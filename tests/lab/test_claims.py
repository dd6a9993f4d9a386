"""A state follows from target, null and interval, and from nothing else."""
import math

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
    (">= 1", 1, 0.999), ("> 1", 1.001, 1), ("== 0", 0, 1e-300), ("in [1, 2)", 1, 2), ("in (-inf, 2]", -1e300, 2.1)])
def test_targets(text, inside, outside):
    if "inf" in text:
        with pytest.raises(ClaimError): parse_target(text)
        return
    t = parse_target(text)
    assert inside in t and outside not in t


def test_measuring_is_checked():
    for bad in (math.nan, math.inf):
        with pytest.raises(ClaimError, match="not a finite number"): measure(spec("> 0"), "cpu", bad, (0, 1))
    with pytest.raises(ClaimError, match="needs an interval"): measure(spec("> 0"), "cpu", 1.0)
    with pytest.raises(ClaimError, match="outside its interval"): measure(spec("> 0"), "cpu", 2.0, (0, 1))
    with pytest.raises(ClaimError, match="reason"): spec("> 0", profiles=())


def test_a_profile_that_cannot_show_it_keeps_the_number_but_not_the_verdict():
    c = measure(spec("> 0", profiles="gpu"), "cpu", 1.0, (0.5, 1.5))
    assert c.state == "out of scale" and c.measured == 1.0 and "gpu" in c.reason
