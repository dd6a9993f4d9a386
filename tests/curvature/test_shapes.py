"Shapes against dense float64 matrices and against the package curvlinops"
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature.core import find_layers, gradient, outer
from yokolab.curvature.engine import Preconditioner
from yokolab.curvature.measure import Recorder
from yokolab.curvature.shapes import (
    BLOCK,
    DIAGONAL,
    EIGEN,
    INPUT,
    KRON,
    KRON_ROWS,
    MOMENTS,
    UNIT,
    Method,
    Options,
    average,
    gram,
    merge,
    running,
    unit_inverse,
)
from yokolab.curvature.solve import cholesky, damped, root, times, woodbury

D = torch.float64
PLAIN = Options(rule="plain")


def record(model, x, y, loss=F.cross_entropy):
    out = []
    rec = Recorder(find_layers(model)[0], out.append)
    rec.attach()
    model.zero_grad()
    loss(model(x), y).backward()
    rec.detach()
    return out


def data(seed, n=9, d=5, k=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=D), torch.randint(k, (n,), generator=g)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6),
                         nn.Linear(6, 4, bias=False)).double()


def apply(shape, t, G, solver=cholesky, lam=.1, opt=PLAIN):
    inv = shape.solve(average(shape.measure(t, opt)), solver, lam, opt)
    if shape.refine is not None:
        s, n = shape.refine([t], inv)
        inv["S"]["value"] = s / n
    return shape.apply(G, inv)


@given(seed=st.integers(0, 10**6), lam=st.floats(1e-3, 10))
@settings(max_examples=8, deadline=None)
def test_every_shape_is_its_dense_matrix(seed, lam):
    for t in record(net(seed), *data(seed)):
        G, a, b = gradient(t.layer), t.a(), t.b()
        g = outer(t.layer, a, b).flatten(1)
        E = g.t() @ g / len(g)
        dense = lambda M, G=G: torch.linalg.solve(damped(M, lam), G.reshape(-1)).view_as(G)
        torch.testing.assert_close(apply(BLOCK, t, G, lam=lam), dense(E), atol=1e-8, rtol=1e-7)
        torch.testing.assert_close(apply(DIAGONAL, t, G, lam=lam), dense(E.diag().diag()))
        if t.layer.kind == "norm":
            i = torch.arange(len(E)) // 2
            torch.testing.assert_close(apply(UNIT, t, G, lam=lam), dense(E * (i[:, None] == i)))
            continue
        a, b = a[:, 0], b[:, 0]
        A, B = a.t() @ a / 9, b.t() @ b / 9
        K = (torch.linalg.inv(damped(B, lam)) @ G @ torch.linalg.inv(damped(A, lam)))
        torch.testing.assert_close(apply(KRON, t, G, lam=lam), K, atol=1e-8, rtol=1e-7)
        torch.testing.assert_close(apply(KRON_ROWS, t, G, woodbury, lam=lam), K, atol=1e-8,
                                   rtol=1e-7)
        torch.testing.assert_close(apply(INPUT, t, G, lam=lam),
                                   G @ torch.linalg.inv(damped(A, lam)), atol=1e-8, rtol=1e-7)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_eigenbasis(seed):
    t = record(net(seed), *data(seed))[0]
    G, g = gradient(t.layer), outer(t.layer, t.a(), t.b()).flatten(1)
    E = g.t() @ g / len(g)
    inv = EIGEN.solve(average(EIGEN.measure(t, PLAIN)), None, .1, PLAIN)
    U = torch.kron(inv["B"]["basis"], inv["A"]["basis"])
    A, B = (average(KRON.measure(t, PLAIN))[k] for k in "AB")
    K = torch.kron(B, A)
    # eigenvalue products in the basis are K-FAC with the damping undivided
    P = torch.linalg.solve(damped(K, .1), G.reshape(-1)).view_as(G)
    torch.testing.assert_close(EIGEN.apply(G, inv), P, atol=1e-8, rtol=1e-7)
    s, n = EIGEN.refine([t], inv)
    torch.testing.assert_close((s / n).reshape(-1), (U.t() @ E @ U).diag())
    err = lambda d: float(((U * d.reshape(-1)) @ U.t() - E).norm())
    best = err(s / n)
    assert best <= err(inv["S"]["value"]) + 1e-12
    gen = torch.Generator().manual_seed(seed)
    for _ in range(5): assert best <= err(s / n + .1 * torch.randn(s.shape, generator=gen, dtype=D))


@given(seed=st.integers(0, 10**6), r=st.floats(0, 10), n=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_unit_blocks(seed, r, n):
    g = torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=D)
    U = torch.einsum("ncp,ncq->cpq", g, g) + 1e-3 * torch.eye(2, dtype=D)
    torch.testing.assert_close(unit_inverse(U, r), torch.linalg.inv(U + r * torch.eye(2, dtype=D)),
                               atol=1e-7, rtol=1e-9)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 7), cols=st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_one_step_of_shampoo_is_orthogonal(seed, rows, cols):
    G = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=D)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    opt = Options(vector=root(2))
    inv = MOMENTS.solve(average(MOMENTS.measure(G, opt)), root(4), 1e-13 * float(S[-1]) ** 2, opt)
    torch.testing.assert_close(MOMENTS.apply(G, inv), U @ V, atol=1e-6, rtol=1e-6)


def test_gram_in_blocks():
    X = torch.randn(70, 9, dtype=D)
    torch.testing.assert_close(gram(X, block=16), X @ X.t())


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_affine_invariance_without_damping(seed):
    "An invertible affine map of the inputs, undone in the weights, leaves the function as it is"
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(60, 4, generator=g, dtype=D), torch.randn(60, 3, generator=g, dtype=D)
    T = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=D))[0] * 3
    c = torch.randn(4, generator=g, dtype=D)
    T = T @ torch.diag(torch.tensor([1., 2, .5, 1], dtype=D))
    torch.manual_seed(seed)
    one, two = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    z = x @ T.t() + c
    with torch.no_grad():
        two.weight.copy_(one.weight @ torch.linalg.inv(T))
        two.bias.copy_(one.bias - two.weight @ c)
    for shape in (KRON, INPUT, BLOCK):
        steps = []
        for m, u in ((one, x), (two, z)):
            (t,) = record(m, u, y, F.mse_loss)
            P = apply(shape, t, gradient(t.layer), lam=0.0)
            steps.append(u @ P[:, :-1].t() + P[:, -1])
        torch.testing.assert_close(steps[0], steps[1], atol=1e-7, rtol=1e-6)
        tilted = apply(shape, t, gradient(t.layer), lam=1.0)
        assert not torch.allclose(u @ tilted[:, :-1].t() + tilted[:, -1], steps[0])


def test_kfac_of_a_deep_linear_net_with_squared_loss_is_the_gauss_newton_block():
    from yokolab.curvature.products import fisher_ref
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(8, 3, dtype=D)
    full = fisher_ref(m, x, kind="mse")
    pre = Preconditioner(m, Method("exact", "exact", KRON, cholesky), loss="mse")
    out = m(x)
    pre.backward(F.mse_loss(out, torch.zeros_like(out)), out)
    at = 0
    for k in pre.layers:
        s = average(pre.pending[k])
        n = k.weight.numel()
        torch.testing.assert_close(torch.kron(s["B"], s["A"]), full[at:at + n, at:at + n])
        at += n


def test_micro_batches_add_up_and_averages():
    m = net()
    x, y = data(0, n=8)
    whole = record(m, x, y)
    for t, u, v in zip(whole, record(m, x[:2], y[:2]), record(m, x[2:], y[2:]), strict=True):
        for shape in (KRON, DIAGONAL, BLOCK) if t.layer.kind != "norm" else (UNIT, BLOCK):
            sums = {}
            merge(sums, shape.measure(u, PLAIN))
            merge(sums, shape.measure(v, PLAIN))
            for k, s in average(shape.measure(t, PLAIN)).items():
                torch.testing.assert_close(average(sums)[k], s)
    one, two = {"A": torch.ones(2)}, {"A": torch.full((2,), 3.)}
    assert running(None, one, .1) is one and running({"A": torch.ones(2)}, two, .5)["A"][0] == 2
    assert running({"A": torch.ones(2)}, two, 0)["A"][0] == 4


def test_expand_equals_reduce_with_one_position():
    t = record(net(), *data(1))[0]
    one, two = (average(KRON.measure(t, Options(share=s))) for s in ("expand", "reduce"))
    for k in one: torch.testing.assert_close(one[k], two[k])


def test_arguments():
    with pytest.raises(ValueError, match="argument what='hessian'"): Method("x", "hessian", KRON)
    with pytest.raises(ValueError, match="argument ema=2"): Method("x", "mc", KRON, ema=2)
    with pytest.raises(ValueError, match="cannot be averaged"): Method("x", "mc", KRON_ROWS, ema=.5)


# against curvlinops ------------------------------------------------------------------------------
CASES = {
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)),
                    torch.randn(12, 6)),
    "conv": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(),
                                   nn.Conv2d(3, 4, 3, stride=2),
                                   nn.Flatten(), nn.Linear(16, 5)), torch.randn(7, 2, 6, 6)),
}


@pytest.mark.parametrize("what", ["exact", "empirical"])
@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape, share", [(KRON, "expand"), (KRON, "reduce"), (EIGEN, "expand")])
def test_kfac_and_ekfac_equal_curvlinops(case, kind, what, share, shape, curvlinops):
    torch.manual_seed(0)
    model, x = CASES[case]()
    model, x = model.double(), x.double()
    y = torch.randint(5, (len(x),)) if kind == "cross_entropy" else torch.randn(len(x), 5, dtype=D)
    loss = nn.CrossEntropyLoss() if kind == "cross_entropy" else nn.MSELoss()
    pre = Preconditioner(model, Method("m", what, shape, cholesky, options=Options(share=share)),
                         loss=loss)
    out = model(x)
    pre.backward(loss(out, y), out)
    pending = {k: average(v) for k, v in pre.pending.items()}
    pre.precondition()
    op = {"K-FAC": curvlinops.KFACLinearOperator, "E-KFAC": curvlinops.EKFACLinearOperator}[
        "K-FAC" if shape is KRON else "E-KFAC"]
    types = curvlinops.FisherType
    their = op(model, loss, [p for p in model.parameters()], [(x, y)], check_deterministic=False,
               fisher_type=types.TYPE2 if what == "exact" else types.EMPIRICAL,
               kfac_approx=share, separate_weight_and_bias=False)
    v = [torch.randn_like(p) for p in model.parameters()]
    want = their @ v
    if kind == "mse" and what == "empirical":
        # theirs counts each of the 5 outputs as a loss term of its own
        want = [w / 5 for w in want]
    at = 0
    for k in pre.layers:
        parts = [p for p in (k.weight, k.bias) if p is not None]
        V = torch.cat([u.reshape(u.shape[0], -1) for u in v[at:at + len(parts)]], 1)
        W = torch.cat([u.detach().reshape(u.shape[0], -1) for u in want[at:at + len(parts)]], 1)
        if shape is KRON: mine = pending[k]["B"] @ V @ pending[k]["A"]
        else:
            inv = pre.solved[k]
            Ua, Ub = inv["A"]["basis"], inv["B"]["basis"]
            mine = Ub @ (inv["S"]["value"] * (Ub.t() @ V @ Ua)) @ Ua.t()
        torch.testing.assert_close(mine, W, atol=1e-9, rtol=1e-6)
        at += len(parts)


def test_times_is_used_for_left_and_right():
    M, G = torch.eye(3, dtype=D) * 2, torch.ones(2, 3, dtype=D)
    torch.testing.assert_close(times(G, {"dense": M}), 2 * G)
