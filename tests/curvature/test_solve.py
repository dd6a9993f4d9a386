"Solvers against dense float64 linear algebra"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.curvature.blocks import (
    blocked_cholesky,
    gram,
    pack,
    spd_inverse,
    stacked_inverses,
    substitute,
    unpack,
)
from yokolab.curvature.solve import (
    Rows,
    SolveError,
    cheapest,
    cholesky,
    damped,
    finite,
    newton_root,
    root,
    sketch,
    split_damping,
    times,
    triangular,
    woodbury,
)

D = torch.float64
sizes = st.integers(1, 40)
seeds = st.integers(0, 10**6)


def spd(d, seed, cond=1e4, dtype=D):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=D))[0]
    w = cond ** -torch.rand(d, generator=g, dtype=D)
    M = (Q * w) @ Q.t()
    return ((M + M.t()) / 2).to(dtype)


@given(d=st.integers(1, 400), seed=seeds)
@settings(max_examples=15, deadline=None)
def test_inverse(d, seed):
    M = spd(d, seed)
    torch.testing.assert_close(spd_inverse(M, block=8), torch.linalg.inv(M), atol=1e-7, rtol=1e-7)


def test_inverse_in_single_precision_is_as_good_as_lapack():
    M = spd(900, 0, 1e4, torch.float32)
    exact = torch.linalg.inv(M.double())
    err = lambda X: float((X.double() - exact).norm() / exact.norm())
    assert err(spd_inverse(M)) < 5 * max(err(torch.linalg.inv(M)), 1e-6)


@given(d=st.integers(1, 300), m=st.integers(1, 20), block=st.sampled_from([7, 64]), seed=seeds)
@settings(max_examples=15, deadline=None)
def test_blocked_factor_and_substitution(d, m, block, seed):
    M, G = spd(d, seed), torch.randn(m, d, dtype=D, generator=torch.Generator().manual_seed(seed))
    L = blocked_cholesky(M - 2 * torch.eye(d, dtype=D), 2., block)
    full = L.tril()  # the diagonal blocks are kept inverted
    for i in range(0, d, block):
        full[i:i + block, i:i + block] = torch.linalg.inv(L[i:i + block, i:i + block])
    torch.testing.assert_close(full @ full.t(), M, atol=1e-12, rtol=1e-10)
    exact = torch.linalg.solve(M, G.t()).t()
    torch.testing.assert_close(substitute(G, L, block=block), exact, atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(substitute(G.t(), L, True, block), exact.t(), atol=1e-9, rtol=1e-8)


@given(d=st.integers(1, 90), m=st.integers(1, 9), seed=seeds)
@settings(max_examples=10, deadline=None)
def test_gram_by_blocks(d, m, seed):
    X = torch.randn(d, m, dtype=D, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(gram(X, block=16), X @ X.t())


def test_indefinite_matrices_are_refused():
    for d, block in ((3, 64), (200, 64), (200, 8)):
        M = spd(d, 0)
        M[-1, -1] = -1.
        with pytest.raises(SolveError, match="not positive definite"): spd_inverse(M, block)
        with pytest.raises(SolveError, match="not positive definite"):
            blocked_cholesky(M, 0., block)


@pytest.mark.parametrize("d", [3, 90])
def test_stacked_inverses_mark_what_has_none(d):
    P = torch.stack([spd(d, 0), -spd(d, 1), spd(d, 2), torch.full((d, d), torch.nan, dtype=D)])
    inv, bad = stacked_inverses(P, block=7)
    assert bad.tolist() == [False, True, False, True]
    exact = torch.linalg.inv(P[[0, 2]])
    torch.testing.assert_close(inv[[0, 2]], exact, atol=1e-8, rtol=1e-8)
    for i in (1, 3): assert torch.equal(inv[i], torch.eye(d, dtype=D))


def test_large_factors_that_serve_seldom_are_not_inverted():
    M, G = spd(320, 1), torch.randn(10, 320, dtype=D)
    assert cheapest(cholesky, M, 320) is triangular and cheapest(cholesky, M, 320, 10) is cholesky
    assert cheapest(root(1), M, 320) is not triangular
    assert cheapest(cholesky, M[:64, :64], 64) is cholesky
    for left in (False, True):
        X = G.t() if left else G
        torch.testing.assert_close(times(X, triangular(M, 1e-2), left),
                                   times(X, cholesky(M, 1e-2), left))
    assert "diag" in triangular(torch.ones(3), 1.0)


@given(d=sizes, seed=seeds, p=st.sampled_from([1, 2, 3, 4]), lam=st.floats(1e-4, 10))
@settings(max_examples=20, deadline=None)
def test_roots(d, seed, p, lam):
    M = spd(d, seed)
    keep = M.clone()
    for relative in (False, True):
        ridge = lam * float(torch.linalg.eigvalsh(M)[-1]) if relative else lam
        w, V = torch.linalg.eigh(damped(M, ridge))
        exact = (V * w ** (-1 / p)) @ V.t()
        torch.testing.assert_close(root(p, relative)(M, lam)["dense"], exact, atol=1e-8, rtol=1e-8)
        if not relative:
            X = newton_root(p)(M, lam)["dense"]
            torch.testing.assert_close(X, exact, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.linalg.matrix_power(X, p) @ damped(M, lam),
                                       torch.eye(d, dtype=D),
                                       atol=1e-5, rtol=0)
    assert torch.equal(M, keep)  # the ridge never enters the statistic


def test_relative_ridge_of_newton():
    M = spd(30, 3)
    torch.testing.assert_close(newton_root(4, True)(M, 1e-2)["dense"],
                               root(4, True)(M, 1e-2)["dense"], atol=1e-3, rtol=1e-3)


def test_repeated_roots_do_not_compound_the_ridge():
    M = torch.eye(3, dtype=D)
    for _ in range(5): X = newton_root(4)(M, 1.0)["dense"]
    torch.testing.assert_close(X, torch.eye(3, dtype=D) * 2 ** -.25)


@given(d=sizes, n=sizes, seed=seeds, lam=st.floats(1e-3, 10))
@settings(max_examples=20, deadline=None)
def test_every_solver_on_rows(d, n, seed, lam):
    g = torch.Generator().manual_seed(seed)
    X, G = torch.randn(n, d, generator=g, dtype=D), torch.randn(5, d, generator=g, dtype=D)
    exact = torch.linalg.solve(damped(X.t() @ X, lam), G.t()).t()
    for s in (cholesky, woodbury, root(1), sketch(d), sketch(min(n, d))):
        inv = s(Rows(X), lam)
        torch.testing.assert_close(times(G, inv), exact, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(times(G.t(), inv, left=True), exact.t(), atol=1e-7, rtol=1e-6)
    if n < d: assert woodbury(Rows(X), lam)["rows"].numel() == n * d


@given(d=sizes, seed=seeds)
@settings(max_examples=10, deadline=None)
def test_packing(d, seed):
    M = spd(d, seed)
    assert pack(M).numel() == d * (d + 1) // 2
    assert torch.equal(unpack(pack(M)), M)


@given(seed=seeds, t=st.floats(1e-3, 1e3), lam=st.floats(1e-4, 1e2))
@settings(max_examples=20, deadline=None)
def test_pi_split_is_scale_invariant(seed, t, lam):
    A, B = spd(6, seed), spd(4, seed + 1)
    G = torch.randn(4, 6, dtype=D, generator=torch.Generator().manual_seed(seed))

    def step(A, B, rule):
        la, lb = split_damping(rule, A, B, lam, floor=0)
        return times(times(G, cholesky(A, la)), cholesky(B, lb), left=True)
    torch.testing.assert_close(step(A, B, "pi"), step(t * A, B / t, "pi"), atol=1e-9, rtol=1e-8)
    la, lb = split_damping("pi", A, B, lam, floor=0)
    assert la * lb == pytest.approx(lam)


@pytest.mark.parametrize("M", [-torch.eye(3), torch.zeros(3, 3), torch.full((3, 3), float("nan")),
                               torch.eye(3) * float("inf")])
def test_what_cannot_be_solved_is_an_error(M):
    for s in (root(2), root(4)):
        with pytest.raises(SolveError):
            if (M == 0).all() or (M < 0).any(): s(M, 0.0)
            else: s(M, 1e-3)
    if not (M == 0).all():
        with pytest.raises(SolveError): cholesky(M, 1e-6)
        with pytest.raises(SolveError): newton_root(2)(M, 1e-6)
    with pytest.raises(SolveError): split_damping("pi", M, torch.zeros(2, 2), 1e-3)


def test_arguments():
    with pytest.raises(ValueError, match="argument p=0"): root(0)
    with pytest.raises(ValueError, match="argument rule='x'"):
        split_damping("x", torch.eye(2), torch.eye(2), 1.)
    assert finite(torch.ones(2)) and not finite(torch.ones(2), torch.tensor([float("nan")]))
