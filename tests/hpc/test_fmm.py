"""Fast sums against direct ones, symmetries, and bad input."""
import re

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="needs the extra hpc")
from yokolab.hpc.fmm import Plan, laplace, move, solve, wrap
from yokolab.hpc.near import direct, direct_ref
from yokolab.hpc.periodic import ewald_ref
from yokolab.hpc.vortex_fmm import biot_savart

rng = np.random.default_rng(0)
X, G, Q = rng.random((1500, 3)), rng.standard_normal((1500, 3)), rng.standard_normal(1500)
rel = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
SETS = dict(
    uniform=X,
    clustered=X * 10 ** (-2 * rng.random((1500, 1))),
    collinear=X[:, :1] * [1, 2, 3.0],
    surface=X / np.linalg.norm(X, axis=1)[:, None],
    coincident=np.repeat(X[:500], 3, 0),
)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("eps", [1e-3, 1e-7])
def test_error_is_within_the_tolerance(name, eps):
    x = SETS[name]
    f = laplace(x, Q, eps=eps, ncrit=20, threads=1)
    ref = direct_ref(np.column_stack([x, Q]).T, x.T, 1)
    assert rel(f.value, ref[:, 0]) < eps and rel(f.gradient, ref[:, 1:]) < eps and f.error < 2 * eps
    u = biot_savart(x, G, eps=eps, ncrit=20, threads=1).value
    assert rel(u, direct_ref(np.hstack([x, G]).T, x.T, 2) / (4 * np.pi)) < eps


def test_velocity_gradient_and_other_targets():
    t = rng.random((200, 3)) * 2 - .5
    f = biot_savart(X, G, t, eps=1e-6, gradient=True, ncrit=20, threads=1)
    ref = direct_ref(np.hstack([X, G]).T, t.T, 3) / (4 * np.pi)
    assert rel(f.value, ref[:, :3]) < 1e-6 and rel(f.gradient.reshape(-1, 9), ref[:, 3:]) < 1e-6
    assert (
        abs(np.trace(f.gradient, axis1=1, axis2=2)).max() < 1e-5 * abs(f.gradient).max()
    )  # divergence


def test_float32_and_threads():
    x, g = X.astype(np.float32), G.astype(np.float32)
    a = biot_savart(x, g, eps=1e-4, ncrit=20, threads=1)
    assert (
        a.value.dtype == np.float32
        and rel(
            a.value,
            direct_ref(np.hstack([x, g]).T.astype(float), x.T.astype(float), 2) / (4 * np.pi),
        )
        < 1e-4
    )
    b = biot_savart(X, G, ncrit=20, threads=3).value
    assert np.array_equal(b, biot_savart(X, G, ncrit=20, threads=1).value)


def test_linear_equivariant_reciprocal():
    u = lambda x, g, **k: biot_savart(x, g, eps=1e-7, ncrit=20, threads=1, **k).value
    a, H = u(X, G), rng.standard_normal(G.shape)
    assert rel(u(X, 2 * G + H), 2 * a + u(X, H)) < 1e-12
    Q3, _ = np.linalg.qr(rng.standard_normal((3, 3))); Q3 *= np.sign(np.linalg.det(Q3))
    assert rel(u(X @ Q3.T + [1, 2, 3], G @ Q3.T), a @ Q3.T) < 2e-7
    mirror = np.diag([1, 1, -1.0])
    assert rel(u(X @ mirror, -G @ mirror), a @ mirror) < 2e-7 # pseudovectors
    A = lambda g: np.stack(
        [
            laplace(X, g[:, k], eps=1e-7, gradient=False, ncrit=20, threads=1).value
            for k in range(3)
        ],
        1,
    )
    assert abs((G * A(H)).sum() / (H * A(G)).sum() - 1) < 1e-5


def test_plummer_and_gaussian_cores():
    s = np.hstack([X, G]).T
    for k in (dict(soft=.01), dict(core=.004)):
        assert (
            rel(
                biot_savart(X, G, eps=1e-5, ncrit=20, threads=1, **k).value,
                direct_ref(s, X.T, 2, **k) / (4 * np.pi),
            )
            < 1e-5
        )


def test_small_movement_keeps_the_tree():
    p = Plan(X, kind="biot", ncrit=20, threads=1)
    assert move(p, X + 0) and not move(p, X[::-1].copy())
    assert rel(solve(p, G, 2)[0], direct(np.hstack([X[::-1], G]).T, X[::-1].T, 2)) < 1e-6
    with pytest.raises(ValueError, match="new Plan"): move(p, X[:5])


def test_periodic_box():
    g = G[:60] - G[:60].mean(0); x, box = X[:60], (0.0, 1.0)
    f = biot_savart(x, g, eps=1e-7, box=box, ncrit=8, threads=1)
    ref = ewald_ref(np.hstack([x, g]).T, x.T, 1.0, 7.5, 16) / (4 * np.pi)
    assert rel(f.value, ref) < 1e-6
    y = wrap(x + [.37, -.2, .9], box)
    assert rel(biot_savart(y, g, eps=1e-7, box=box, ncrit=8, threads=1).value, ref) < 1e-6
    with pytest.raises(ValueError, match="must vanish"): biot_savart(x, g + 1, box=box, threads=1)
    with pytest.raises(ValueError, match="wrap"): biot_savart(x + 1, g, box=box, threads=1)


def test_periodic_charges_have_the_potential_of_zero_mean():
    x, q, box = X[:60] * 2 - 5, Q[:60] - Q[:60].mean(), (-5.0, 2.0)
    f = laplace(x, q, X[60:90] * 2 - 5, eps=1e-7, box=box, ncrit=8, threads=1)
    ref = ewald_ref(np.column_stack([x, q]).T, (X[60:90] * 2 - 5).T, 2.0, 7.5, 16)
    assert rel(f.value, ref[:, 0]) < 1e-6 and rel(f.gradient, ref[:, 1:]) < 1e-6


@pytest.mark.parametrize("eps", [1e-3])
def test_distant_clusters_meet_the_tolerance(eps):
    t = X[:400, ::-1] * .2 + .8
    f = biot_savart(X * .2, G, t, eps=eps, gradient=True, ncrit=20, threads=1)
    ref = direct_ref(np.hstack([X * .2, G]).T, t.T, 3) / (4 * np.pi)
    assert rel(f.value, ref[:, :3]) < eps and rel(f.gradient.reshape(-1, 9), ref[:, 3:]) < eps
    g = laplace(X * .2, Q, t, eps=eps, ncrit=20, threads=1)
    assert rel(g.gradient, direct_ref(np.column_stack([X * .2, Q]).T, t.T, 1)[:, 1:]) < eps


def test_place_and_unit_of_length_do_not_matter():
    far = X + [1e11, 0, -7]
    ref = direct_ref(np.hstack([far, G]).T, far.T, 2) / (4 * np.pi)
    assert rel(biot_savart(far, G, ncrit=20, threads=1).value, ref) < 1e-6
    a = biot_savart(X, G, gradient=True, ncrit=20, threads=1)
    for scale in (1e-70, 1e70):
        b = biot_savart(X * scale, G, gradient=True, ncrit=20, threads=1)
        assert b.error < 1e-6 and rel(b.value * scale * scale, a.value) < 1e-6
        assert rel(b.gradient * scale * scale * scale, a.gradient) < 1e-6
    with pytest.raises(ValueError, match="unit of length"): biot_savart(X * 1e-120, G, threads=1)


def test_close_pairs_over_many_scales():
    x = X * 10.0 ** (-18 * rng.random((1500, 1)))
    f = biot_savart(x, G, eps=1e-6, ncrit=20, threads=1)
    assert rel(f.value, direct_ref(np.hstack([x, G]).T, x.T, 2) / (4 * np.pi)) < 1e-6
    assert f.error < 1e-6
    y = np.float32([[0, 0, 0], [1e-13, 0, 0], [1, 1, 1]])  # closer than floats resolve in a cell
    g = np.ones((3, 3), np.float32)
    assert np.isfinite(biot_savart(y, g, eps=1e-4, gradient=True, threads=1).gradient).all()


def test_gaussian_core_at_small_tolerances():
    ref = direct_ref(np.hstack([X, G]).T, X.T, 2, core=.004) / (4 * np.pi)
    assert rel(biot_savart(X, G, eps=1e-9, core=.004, ncrit=20, threads=1).value, ref) < 1e-9


def test_torch_in_torch_out():
    f = biot_savart(torch.from_numpy(X), torch.from_numpy(G), threads=1)
    assert isinstance(f.value, torch.Tensor) and f.value.dtype == torch.float64


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(points=np.where(X == X[7], np.nan, X)), "points: row 7"),
        (dict(points=np.where(X == X[3], np.inf, X)), "points: row 3"),
        (dict(strengths=G[:9]), "9 rows"),
        (dict(points=X[:, :2]), "expected"),
        (dict(eps=1e-20), "arithmetic carries"),
        (dict(eps=1e-9, points=X.astype(np.float32)), "float64"),
        (dict(theta=0.7), "theta=0.7"),
        (dict(theta=0), "theta=0"),
        (dict(threads=0), "threads=0"),
        (dict(soft=-1.0), "soft=-1.0"),
        (dict(core=np.nan), "core=nan"),
        (dict(order=0), "order=0"),
        (dict(ncrit=-5), "ncrit=-5"),
        (dict(box=(0.0, 1.0), images=0), "images=0"),
        (dict(box=((0, np.nan, 0), 1.0)), "corner be finite"),
        (dict(box=3), "expected (corner, side)"),
        (dict(core=0.1, gradient=True), "core"),
    ],
)
def test_bad_input_is_named(change, text):
    args = {**dict(points=X, strengths=G, threads=1), **change}
    with pytest.raises(ValueError, match=re.escape(text)) as e: biot_savart(**args)
    assert "src" not in str(e.value) or "argument" in str(e.value)


def test_plans_check_what_they_sum():
    with pytest.raises(ValueError, match="Gaussian core"): laplace(X, Q, core=.1, threads=1)
    p = Plan(X, kind="biot", core=.01, threads=1)
    for mode in (1, 3):
        with pytest.raises(ValueError, match=f"mode={mode}"): solve(p, G, mode)
    with pytest.raises(ValueError, match="9 rows"): solve(p, G[:9], 2)
    with pytest.raises(ValueError, match="strength: row 4"):
        solve(p, np.where(X == X[4], np.nan, G), 2)


def test_empty_and_coinciding_sets():
    none = np.zeros((0, 3))
    assert biot_savart(none, none, threads=1).value.shape == (0, 3)
    assert not biot_savart(none, none, X[:4], threads=1).value.any()
    assert biot_savart(X, G, none, threads=1).value.shape == (0, 3)
    assert not biot_savart(np.ones((40, 3)), G[:40], threads=1).value.any()
