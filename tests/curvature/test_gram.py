"Natural gradients through the samples against the dense empirical Fisher"
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature.core import find_layers, gradient, outer
from yokolab.curvature.gram import (
    FULL,
    GRAM,
    combine,
    coordinates,
    gram_matrix,
    project,
    seng,
    truncate,
)
from yokolab.curvature.measure import Recorder
from yokolab.curvature.shapes import Options, average
from yokolab.curvature.solve import SolveError, cholesky, damped, sketch, woodbury

D = torch.float64


def record(seed=0, n=6):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(),
                      nn.Linear(32, 4)).double()
    x, y, out = torch.randn(n, 1, 4, 4, dtype=D), torch.randint(4, (n,)), []
    rec = Recorder(find_layers(m)[0], out.append)
    rec.attach()
    F.cross_entropy(m(x), y).backward()
    rec.detach()
    return m, x, y, out


@given(seed=st.integers(0, 10**6), lam=st.floats(1e-3, 10))
@settings(max_examples=8, deadline=None)
def test_smw_is_the_dense_inverse(seed, lam):
    m, x, y, seen = record(seed)
    G = {t.layer: gradient(t.layer) for t in seen}
    J = torch.cat([outer(t.layer, t.a(), t.b()).flatten(1) for t in seen], 1)
    torch.testing.assert_close(sum(gram_matrix(t.layer, t.a(), t.b()) for t in seen), J @ J.t())
    ref = torch.linalg.solve(damped(J.t() @ J / 6, lam),
                             torch.cat([g.reshape(-1) for g in G.values()]))
    for shape, s in ((GRAM, None), (FULL, cholesky), (FULL, woodbury), (FULL, sketch(6))):
        stats = {t.layer: average(shape.measure(t, Options())) for t in seen}
        P = shape.apply(G, shape.solve(stats, s, lam, Options()))
        torch.testing.assert_close(torch.cat([p.reshape(-1) for p in P.values()]), ref, atol=1e-10,
                                   rtol=1e-8)
    w = (1 - torch.linalg.solve(damped(J @ J.t(), 6 * lam), (J @ J.t()).sum(1))) / (6 * lam)
    m.zero_grad()
    F.cross_entropy(m(x), y, reduction="none").backward(w)
    torch.testing.assert_close(torch.cat([gradient(t.layer).reshape(-1) for t in seen]), ref,
                               atol=1e-10, rtol=1e-8)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_seng_with_all_coordinates_is_the_layer_block(seed):
    shape = seng(size=10**6, rank=10**6)
    for t in record(seed)[3]:
        g, G = outer(t.layer, t.a(), t.b()).flatten(1), gradient(t.layer)
        stats = {t.layer: average(shape.measure(t, Options()))}
        P = shape.apply({t.layer: G}, shape.solve(stats, None, .1, Options()))
        torch.testing.assert_close(P[t.layer].reshape(-1),
                                   torch.linalg.solve(damped(g.t() @ g / 6, .1), G.reshape(-1)))


def test_outer_recombination_is_another_update_and_exact_with_one_sample():
    one, rough = seng(10**6), seng(10**6, recombine="outer")
    for n, equal in ((1, True), (6, False)):
        torch.manual_seed(3)
        m, out = nn.Linear(5, 3).double(), []
        rec = Recorder(find_layers(m)[0], out.append)
        rec.attach()
        F.cross_entropy(m(torch.randn(n, 5, dtype=D)), torch.arange(n) % 3).backward()
        (t,) = out
        G = {t.layer: gradient(t.layer)}
        solved = lambda s, t=t: s.solve({t.layer: average(s.measure(t, Options()))}, None, .1,
                                        Options())
        P, Q = (s.apply(G, solved(s))[t.layer] for s in (one, rough))
        assert torch.allclose(P, Q, rtol=1e-8) == equal


@given(seed=st.integers(0, 10**6), R=st.integers(1, 9), do=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_truncation_keeps_the_gradient_when_the_rank_suffices(seed, R, do):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, R, 5, generator=g, dtype=D), torch.randn(3, R, do, generator=g, dtype=D)
    a2, b2 = truncate(a, b, min(R, do))
    torch.testing.assert_close(torch.einsum("nro,nri->noi", b2, a2),
                               torch.einsum("nro,nri->noi", b, a), atol=1e-8, rtol=1e-6)
    assert b2.shape[1] <= max(do, R)


def test_sketched_gram_is_unbiased():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, 1, 40, generator=g, dtype=D)
    total = torch.zeros(4, 4, dtype=D)
    for _ in range(3000):
        i = coordinates(a, 10, g)
        s = a[:, 0, i] * 2
        total += s @ s.t() / 3000
    assert (total - a[:, 0] @ a[:, 0].t()).abs().max() < 1.5
    assert len(coordinates(a, 100)) == 40


def test_projection_and_combination_are_adjoint():
    for t in record()[3]:
        a, b, G, w = t.a(), t.b(), torch.randn_like(gradient(t.layer)), torch.randn(6, dtype=D)
        want = float((combine(t.layer, w, a, b) * G).sum())
        assert float(project(t.layer, G, a, b) @ w) == pytest.approx(want)


def test_not_finite_and_wrong_arguments():
    *_, seen = record()
    stats = {t.layer: average(GRAM.measure(t, Options())) for t in seen}
    stats[seen[0].layer]["b.raw"] = stats[seen[0].layer]["b.raw"] * float("nan")
    with pytest.raises(SolveError): GRAM.solve(stats, None, .1, Options())
    with pytest.raises(ValueError, match="argument recombine='x'"): seng(recombine="x")


@pytest.mark.parametrize("recombine", ["exact", "outer"])
def test_sketched_seng_is_its_formula(recombine):
    "w = (K/n + damping)^{-1} v / n from rescaled coordinates; the update uses the whole rows"
    n, di, do, lam, q = 7, 9, 8, .2, 4
    torch.manual_seed(1)
    m, out = nn.Linear(di, do, bias=False).double(), []
    rec = Recorder(find_layers(m)[0], out.append)
    rec.attach()
    F.cross_entropy(m(torch.randn(n, di, dtype=D)), torch.arange(n) % do).backward()
    (t,) = out
    a, b, G = t.a()[:, 0], t.b()[:, 0], gradient(t.layer)
    shape, gen = seng(q, recombine=recombine, seed=5), torch.Generator().manual_seed(5)
    i, j = coordinates(t.a(), q, gen), coordinates(t.b(), q, gen)
    K = (a[:, i] @ a[:, i].t() * di / q) * (b[:, j] @ b[:, j].t() * do / q)
    v = torch.einsum("nj,ji,ni->n", b[:, j], G[j][:, i], a[:, i]) * (di / q) * (do / q)
    w = torch.linalg.solve(damped(K / n, lam), v)
    if recombine == "exact": S = torch.einsum("n,no,ni->oi", w, b, a)
    else:
        r = w.abs().sqrt()
        S = torch.outer(r @ b, (w / r.sum()) @ a)
    P = shape.apply({t.layer: G}, shape.solve({t.layer: average(shape.measure(t, Options()))},
                                              None, lam, Options()))[t.layer]
    torch.testing.assert_close(P, (G - S / n) / lam)
