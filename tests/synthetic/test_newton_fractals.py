"""Newton maps against closed forms and their symmetries; pictures that are the same anywhere."""
import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.synthetic import newton_fractals as nf
from yokolab.synthetic import newton_fractals_map as nm
from yokolab.synthetic import newton_fractals_pictures as pics
from yokolab.synthetic.newton_fractals_controls import Julia, JuliaCategory
from yokolab.synthetic.pictures import fixed_set

unit = lambda d: tuple(complex(np.exp(2j*np.pi*k/d)) for k in range(d))
C = torch.complex128
finite = st.floats(-1.5, 1.5)


def attracting(d, re, im, least=0.95):
    p = nm.Relaxed(unit(d), complex(re, im))
    return p if max(p.rates) < least else None


@settings(deadline=None, max_examples=20)
@given(finite, finite, finite, finite)
def test_two_roots_halve_the_plane(a, b, c, d):
    """Cayley and Schröder: w = (z - r1)/(z - r2) is squared by every step."""
    r1, r2 = complex(a, b), complex(c, d)
    if abs(r1 - r2) < 0.2: return
    p, z = nm.Relaxed((r1, r2)), nm.window(65)
    w = (z - r1)/(z - r2)
    o = nm.iterate(z, p, 64)
    side = (z - r1).abs() - (z - r2).abs()
    clear = side.abs() > 1e-6
    assert torch.equal((o.label == 1)[clear], (side > 0)[clear])
    x = z
    for t in range(5):
        wt = w**2**t
        sure = ((1 - wt).abs() > 1e-2) & (wt.abs() < 1e6)
        exact = (r1 - r2*wt)/(1 - wt)
        assert ((x - exact).abs()/(1 + exact.abs()))[sure].max() < 1e-8
        x = nm.step(x, p)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 7), st.floats(0.1, 1.9), st.floats(-0.8, 0.8), st.floats(0, 6.3))
def test_symmetries_of_roots_of_unity(d, re, im, angle):
    p = attracting(d, re, im, 0.85)
    if p is None: return
    z = nm.window(48, 0.03 + 0.01j, 1.6, angle)
    o, turned = nm.iterate(z, p), nm.iterate(z*complex(np.exp(2j*np.pi/d)), p)
    shifted = torch.where(o.label < 0, -1, (o.label + 1) % d)
    assert (turned.label == shifted).double().mean() > 0.995
    assert (turned.count == o.count).double().mean() > 0.98
    bar = nm.Relaxed(tuple(r.conjugate() for r in p.roots), p.relaxation.conjugate())
    mirrored = nm.iterate(z.conj().resolve_conj(), bar)
    assert torch.equal(mirrored.label, o.label) and torch.equal(mirrored.count, o.count)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=6), st.floats(0.3, 3),
       st.floats(0, 6.3), finite, finite, st.floats(0.3, 1.7))
def test_affine_maps_move_the_picture(points, scale, turn, x, y, a):
    roots = tuple(complex(*v) for v in points)
    if min(abs(r - q) for i, r in enumerate(roots) for q in roots[:i]) < 0.2: return
    alpha, beta = scale*complex(np.exp(1j*turn)), complex(x, y)
    z, rad = nm.window(40, 0.1j), 1e-3*min(1, 1/scale)
    one = nm.iterate(z, nm.Relaxed(roots, a), radius=rad)
    two = nm.iterate(z*alpha + beta, nm.Relaxed(tuple(r*alpha + beta for r in roots), a),
                     radius=rad*scale)
    assert (one.label == two.label).double().mean() > 0.99
    assert (one.count == two.count).double().mean() > 0.97


@settings(deadline=None, max_examples=10)
@given(finite, finite, st.floats(-1.5, 1.5), st.floats(0.3, 1.6))
def test_real_polynomials_are_symmetric(x, y, r, a):
    if abs(y) < 0.1 or abs(complex(x, y) - r) < 0.2: return
    p = nm.Relaxed((complex(x, y), complex(x, -y), complex(r)), a)
    o = nm.iterate(nm.window(51), p)
    swapped = torch.tensor([1, 0, 2, -1])[o.label.long()].to(torch.int16)
    assert (o.label.flip(0) == swapped).double().mean() > 0.998       # the axis itself may differ
    assert (o.count.flip(0) == o.count).double().mean() > 0.998


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(finite, finite, st.sampled_from([1.0, 2.0, 3.0, 1.5])), min_size=1,
                max_size=6), st.floats(0.2, 1.8), st.floats(-0.8, 0.8))
def test_multipliers(points, re, im):
    """Roots are fixed with derivative 1 - a/m; infinity with N(z)/z -> 1 - a/D."""
    roots, m = [complex(u, v) for u, v, _ in points], [w for _, _, w in points]
    if any(abs(r - q) < 0.2 for i, r in enumerate(roots) for q in roots[:i]): return
    p = nm.Relaxed(tuple(roots), complex(re, im), tuple(m))
    r = torch.tensor(roots, dtype=C)
    assert torch.equal(nm.step(r, p), r)
    for h in (1e-5, 1e-5j):
        slope = (nm.step(r + h, p) - nm.step(r - h, p))/(2*h)
        assert (slope - torch.tensor([1 - p.relaxation/w for w in m], dtype=C)).abs().max() < 1e-6
    far = torch.tensor([1e9 + 0j, -1e9j], dtype=C)
    assert (nm.step(far, p)/far - (1 - p.relaxation/sum(m))).abs().max() < 1e-6


@settings(deadline=None, max_examples=10)
@given(finite, finite, st.sampled_from([1.0, 2.0, 3.0]), st.floats(0.3, 1.4))
def test_one_multiple_root_is_linear(x, y, m, share):
    p = nm.Relaxed((complex(x, y),), share*m, (m,))
    z = z0 = nm.window(7)
    for _ in range(6): z = nm.step(z, p)
    torch.testing.assert_close(z, p.roots[0] + (1 - share)**6*(z0 - p.roots[0]))
    quick = nm.iterate(z0, nm.Relaxed(p.roots, m, (m,)))
    assert quick.count.max() <= 1 and (quick.label == 0).all()


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=6), st.floats(0.3, 1.7))
def test_sum_over_roots_is_the_quotient(points, a):
    roots = np.array([complex(*v) for v in points])
    if min(abs(r - q) for i, r in enumerate(roots) for q in roots[:i]) < 0.2: return
    c = np.poly(roots.astype(complex))
    z = nm.window(21, half=2.1).flatten()
    away = (np.abs(z.numpy()[:, None] - np.roots(np.polyder(c))).min(1) > 0.1)
    z = z[away]
    plain = z.numpy() - a*np.polyval(c, z.numpy())/np.polyval(np.polyder(c), z.numpy())
    ours = nm.step(z, nm.Relaxed(tuple(map(complex, roots)), a)).numpy()
    assert (np.abs(ours - plain)/(1 + np.abs(plain))).max() < 1e-8


def test_a_cycle_is_no_root():
    p = nm.from_coefficients([2, -2, 0, 1])
    zero = torch.zeros(1, dtype=C)
    one = nm.step(zero, p)
    assert abs(one - 1) < 1e-12 and abs(nm.step(one, p)) < 1e-12
    assert nm.iterate(zero, p, 500).label.item() == -1
    lost = lambda a: float((nm.iterate(nm.window(128), nm.Relaxed(p.roots, a), 64).label < 0)
                           .double().mean())
    assert 0.005 < lost(1.0) < 0.02 and lost(0.5) == 0


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 7), st.floats(0.2, 1.8), st.floats(-0.6, 0.6), st.integers(1, 30))
def test_more_steps_change_nothing_that_arrived(d, re, im, steps):
    p = attracting(d, re, im)
    if p is None: return
    z = nm.window(32, 0.1, 1.7)
    few, many = nm.iterate(z, p, steps), nm.iterate(z, p, steps + 25)
    there = few.label >= 0
    assert torch.equal(few.label[there], many.label[there])
    assert torch.equal(few.count[there], many.count[there])
    assert (few.count[~there] == steps).all() and (many.count[~there] > steps).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 8), st.integers(0, 10**6), st.sampled_from([C, torch.complex64]),
       st.integers(1, 50))
def test_compiled_and_torch_give_the_same_bits(d, seed, dtype, size):
    g = np.random.default_rng(seed)
    maps = [nm.Relaxed(tuple(map(complex, g.normal(size=k) + 1j*g.normal(size=k))),
                       complex(g.uniform(0.3, 1.6), g.uniform(-0.5, 0.5)),
                       tuple(g.choice([1.0, 2.0], k))) for k in (d, 3)]
    z = torch.stack([nm.window(size, half=1 + g.random(), dtype=dtype) for _ in maps])
    both = nm.iterate_torch(z, maps)
    for i, p in enumerate(maps):
        one = nm.iterate(z[i], p)
        for f in ("label", "count", "distance"):
            assert torch.equal(getattr(one, f), getattr(both, f)[i])


def test_points_next_to_a_root_stay():
    for dtype, tiny in ((torch.complex128, 1e-311), (torch.complex64, 1e-41)):
        z = torch.tensor([tiny, -1j*tiny, 0, 1e-3], dtype=dtype)
        got = nm.step(z, nm.Relaxed((0j,), 0.5))
        assert (got - 0.5*z).abs().max() < 1e-9


def test_points_on_roots_and_critical_points():
    p = nm.Relaxed(unit(4))
    z = torch.tensor([0, 1, -1j], dtype=C)                  # critical, root, root
    o = nm.iterate(z, p, 200)
    assert o.count[1:].tolist() == [0, 0] and o.label[1] == 0
    assert torch.isfinite(o.distance).all() and o.label[0] >= 0    # far away and back again
    two = nm.Relaxed((1 + 0j, -1 + 0j))
    assert nm.step(z[:1], two).item() == nm.FAR             # the sum is 0 exactly
    assert nm.iterate(z[:1], two, 200).count.item() > 10


def test_same_picture_in_another_process_and_any_batch():
    code = ("from yokolab.synthetic.newton_fractals import NewtonFractals as N\n"
            "import hashlib\n"
            "h = hashlib.sha256()\n"
            "for k in ('boundary', 'colour', 'gray-count'):\n"
            "    g = N(k); c = g.categories(3, 5)\n"
            "    for i in (0, 4): h.update(g.render_batch(c, [i]*3, 24).numpy().tobytes())\n"
            "print(h.hexdigest())")
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "2"}).stdout.strip()
    here = hashlib.sha256()
    for kind in ("boundary", "colour", "gray-count"):
        g = nf.NewtonFractals(kind)
        c = g.categories(3, 5)
        for i in (0, 4):
            for k in range(3): here.update(g.render(c[k], i, 24).numpy().tobytes())
    assert here.hexdigest() == there
    g = nf.NewtonFractals("colour")
    cats = g.categories(4, 2)
    x, _ = fixed_set(g, cats, 3, 24, threads=1)
    y, _ = fixed_set(g, cats, 3, 24, threads=3)
    assert torch.equal(x, y) and torch.equal(x[5], g.render(cats[1], 2, 24))
    frames = [g.frame(c, i) for c in cats for i in range(3)]
    assert torch.equal(nf.render_frames(frames, "colour", 24), x)


def test_categories_keep_their_promises():
    g = nf.NewtonFractals(double=0.3)
    cats = g.categories(25, 4)
    for i, c in enumerate(cats):
        r, m = np.array(c.roots), np.array(c.multiplicities)
        assert abs((r*m).sum()) < 2e-8 and abs((np.abs(r)**2).mean() - 1) < 1e-8
        assert abs(r[0].imag) < 1e-9 and r[0].real == pytest.approx(np.abs(r).max())
        assert min(nf.distance(c, o) for o in cats[:i] + [replace(c, roots=(0j,))]) >= 0.1
        v = nf.look(c)
        assert 0.05 <= v.boundary <= 0.5 and v.lost < 0.2 and v.least >= 0.01
    assert {m for c in cats for m in c.multiplicities} == {1.0, 2.0}
    assert cats[:7] == g.categories(7, 4)
    assert len(nf.NewtonFractals(coefficients=True).categories(4)) == 4


def test_two_levels_and_no_constant_pictures():
    for kind in pics.BLACK_WHITE:
        g = nf.NewtonFractals(kind)
        x, _ = fixed_set(g, g.categories(6, 1), 4, 32, threads=1)
        assert set(x.unique().tolist()) == {0, 255}
        assert (x.flatten(1).float().std(1) > 0).double().mean() > 0.9, kind


def test_windows_do_not_depend_on_rendering_or_size():
    a, b = nf.NewtonFractals("parity"), nf.NewtonFractals("gray-root")
    c = a.categories(2, 0)[1]
    assert c == b.categories(2, 0)[1] and a.frame(c, 3) == b.frame(c, 3)
    big, small = (a.frame(c, 3).points(n) for n in (64, 32))
    assert (big.reshape(32, 2, 32, 2).mean((1, 3)) - small).abs().max() < 1e-5


@pytest.mark.parametrize("call, message", [
    (lambda: nm.check_map(nm.Relaxed((0, 1e-9))), "make them one root"),
    (lambda: nm.check_map(nm.Relaxed((0, 1), 2.5)), "repels"),
    (lambda: nm.check_map(nm.Relaxed((0, 1), 1.0, (1.0, 0.0))), "powers"),
    (lambda: nm.from_coefficients([1.0]), "at least two"),
    (lambda: nm.iterate(nm.window(4), nm.Relaxed((0, 1)), 40, 0.0), "radius=0.0"),
    (lambda: nm.window(4, half=float("inf")), "half=inf"),
    (lambda: nf.NewtonFractals("grey"), "one of boundary"),
    (lambda: nf.NewtonFractals(zoom=(0, 40)), "at most 12"),
    (lambda: nf.NewtonFractals(jitter=-1), "jitter"),
    (lambda: nf.NewtonFractals(steps=0), "argument steps=0"),
    (lambda: Julia().render(JuliaCategory(9j), 0, 8), "no boundary"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
