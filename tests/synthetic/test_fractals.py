"""Iterated function systems: definitions, closed forms, both paths."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.synthetic.chaos import (
    Diverges,
    Flat,
    draw_points,
    filling_rate,
    orbit,
    orbit_ref,
    orbits_on,
    symbols,
    to_pixels,
)
from yokolab.synthetic.core import Stream, words
from yokolab.synthetic.fractals import (
    FractalDB,
    OnePerturbed,
    ifs,
    sample_svs,
    sample_system,
    weightings,
)
from yokolab.synthetic.solids import ExFractalDB, cloud, project, solid


def drawn(seed, n, numbers, scale=0.5):
    """Random maps and weights."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.1, 1, n)
    return rng.uniform(-scale, scale, (n, numbers)), p/p.sum()


@given(st.integers(0, 1000), st.integers(1, 7), st.sampled_from([6, 12]))
@settings(deadline=None, max_examples=15)
def test_three_ways_to_play(seed, n, numbers):
    maps, p = drawn(seed, n, numbers)
    u = symbols(150)
    want, gone = orbit_ref(maps, p, u)
    assert gone == 0 and (orbit(maps, p, u) == want).all()
    cumulated = np.cumsum(p)
    cumulated[-1] = 2.
    got = orbits_on(torch.tensor(maps)[None], torch.tensor(cumulated)[None], torch.tensor(u))
    assert (got[0].numpy() == want).all()


def test_the_loop_against_a_naive_transcription():
    maps, p = drawn(4, 3, 6)
    u, v, total = symbols(400), np.zeros(2), np.cumsum(p)
    for t in range(399):
        a, b, c, d, e, f = maps[min(np.searchsorted(total, u[t]), 2)]
        v = np.array([a*v[0] + b*v[1] + e, c*v[0] + d*v[1] + f])
    assert np.abs(orbit(maps, p, u)[-1] - v).max() < 1e-13


def test_fixed_point_dimension_and_divergence():
    rng = np.random.default_rng(2)
    A, t = 0.6*np.linalg.qr(rng.normal(size=(2, 2)))[0], rng.normal(size=2)
    last = orbit([[*A.ravel(), *t]], [1.], symbols(200))[-1]
    assert np.abs(last - np.linalg.solve(np.eye(2) - A, t)).max() < 1e-12
    carpet = [(1/3, 0, 0, 1/3, i/3, j/3) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    v = orbit(carpet, [1/8]*8, symbols(60_000))
    for k in (1, 2, 3): assert len(np.unique(np.floor(v*3**k + 1e-9) @ [1, 1000])) == 8**k
    with pytest.raises(Diverges, match="the points are farther than"):
        orbit([[1.01, 0, 0, 1.01, 1, 1]], [1.], symbols(5000))
    with pytest.raises(ValueError, match="6 or 12 numbers"): orbit([[1, 2, 3]], [1.], symbols(9))


def test_patches_overwrite_what_was_there():
    maps, p = drawn(1, 3, 6)
    at, key, size = orbit(maps, p, symbols(800)), 5, 40
    px, py = to_pixels(at, size, 4)
    want = np.zeros((size, size), int)
    u = (words(key, np.arange(800)) >> np.uint64(11))*2.0**-53
    for x, y, b in zip(px, py, 1 + (511*u).astype(int), strict=True):
        bits = np.array(list(f"{b:09b}"), int).reshape(3, 3)
        want[y + 1:y + 4, x + 1:x + 4] = 127*bits
    got = draw_points(at, key, size, 4)
    assert (got.numpy() == want[::-1]).all()
    assert (draw_points(torch.tensor(at), key, size, 4) == got).all()


def test_rescaling_is_that_of_the_public_renderer():
    at = np.array([[0., 0.], [-2., 1.], [6., 3.]])
    x, y = to_pixels(at, 100, 6)
    assert x.tolist() == [int(2/8*88 + 6), 6, 94] and y.tolist() == [6, int(1/3*88 + 6), 94]
    with pytest.raises(Flat, match="one coordinate in common"): to_pixels(at*[1, 0], 100, 6)
    assert filling_rate(at, 10, 1) == 0.03


@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_singular_values_have_the_sigma_factor(n, share, seed):
    alpha = 3*n*share
    s = sample_svs(n, alpha, Stream(seed))
    assert abs((s @ [1, 2]).sum() - alpha) < 1e-12
    assert (s >= -1e-12).all() and (s <= 1 + 1e-12).all() and (s[:, 0] >= s[:, 1] - 1e-12).all()


def test_systems_with_a_sigma_factor():
    s = sample_system(2, 3.5, Stream(8))
    sv = np.linalg.svd(np.array(s.maps)[:, :4].reshape(2, 2, 2))[1]
    assert abs((sv @ [1, 2]).sum() - 3.5) < 1e-8 and abs(sum(s.weights) - 1) < 1e-12
    with pytest.raises(ValueError, match="argument alpha=9"): sample_svs(2, 9, Stream(0))


def test_perturbations_stay_within_delta():
    for additive in (True, False):
        g = OnePerturbed(delta=0.2, additive=additive, points=500, searched=3000, rate=0.008)
        base, some = np.array(g.base(3).maps), g.categories(6, 3)
        for c in some:
            e = np.array(c.maps) - base if additive else np.array(c.maps)/base - 1
            assert 0 < np.abs(e).max() <= (0.1 if additive else 0.2) + 1e-12


def test_weightings_and_instances():
    for w in (weightings(0.4), weightings(0.1)):
        assert w.shape == (25, 6) and ((w == 1).all(1)).sum() == 1 and (w[0] == 1).all()
    g = FractalDB(points=800, searched=4000, rate=0.01, pad=3)
    c = g.categories(1, seed=1)[0]
    seen = {tuple(g.prepare(c, i)[0].maps.ravel()) for i in range(0, 100, 4)}
    assert len(seen) == 25 and np.allclose(g.prepare(c, 0)[0].maps, c.maps)
    assert len({g.prepare(c, i)[1] for i in range(1000)}) == 250          # 25 weightings x 10
    assert {g.prepare(c, i)[0].turn for i in range(4)} == {0, 1, 2, 3}
    x = g.render_batch([c]*4, range(4), 32)
    assert (x[0].flip(-2) == x[1]).all() and (x[0].flip(-1) == x[2]).all()
    assert g.filling(c) >= 0.01 and set(x.unique().tolist()) == {0, 127}


def test_bad_systems():
    with pytest.raises(ValueError, match="all determinants are 0"): ifs([(1, 2, 2, 4, 0, 0)])
    with pytest.raises(ValueError, match="argument weights="): ifs([(1, 0, 0, 1, 0, 0)], [0.5])
    with pytest.raises(ValueError, match="finite numbers"): ifs([(1, 0, 0, np.nan, 0, 0)])
    big = ifs([(1.5, 0, 0, 1.5, 1, 0)])
    for points, message in ((900, "expand on average"), (0, "argument points=0")):
        with pytest.raises(ValueError, match=message): FractalDB(points=points).render(big, 0, 32)
    with pytest.raises(ValueError, match="all determinants"): solid(np.ones((2, 12)))
    half = ifs([(.5, 0, 0, .5, 0, 0), (.5, 0, 0, .5, .5, .2)])
    for change in (dict(pad=0, patch=False), dict(pad=-3), dict(level=300)):   # no stray writes
        with pytest.raises(ValueError, match=f"argument {next(iter(change))}="):
            FractalDB(points=50, **change).render(half, 0, 32)
    still = solid([(.5, 0, 0, 0, .5, 0, 0, 0, .5, 0, 0, 0)])
    with pytest.raises(ValueError, match="maps that move the point"):
        ExFractalDB(points=50).render(still, 0, 16)
    with pytest.raises(ValueError, match="argument points=1"):
        ExFractalDB(points=1).render(still, 0, 16)


def test_clouds_and_cameras():
    g = ExFractalDB(points=1500)
    c = g.categories(1, seed=2)[0]
    x = cloud(orbit(c.maps, c.weights, symbols(1500, 1))[1:])
    assert np.abs(x.mean(0)).max() < 1e-9 and (x.var(0) > 0.05).all() and np.abs(x).max() <= 2
    same = cloud(torch.tensor(orbit(c.maps, c.weights, symbols(1500, 1))[1:]))
    assert (same.numpy() == x).all()
    for a in np.linspace(0, 6, 7):
        eye = -4*np.array([np.cos(a), 0, -np.sin(a)])
        world = np.random.default_rng(1).uniform(-1, 1, (50, 3))
        f = -eye/4
        r = np.cross(f, [0, 1, 0])
        z = (world - eye) @ f
        want = np.stack([(world - eye) @ r, world[:, 1]], 1)/z[:, None]/np.tan(np.pi/8)
        want = np.floor((want + 1)*100).astype(int)
        assert (project(world, a, 200) == want[:, 1]*200 + want[:, 0]).mean() > 0.97
