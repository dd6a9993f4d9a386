"Recursions against dense linear algebra, optimizers on known problems"
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature.quasi import (
    KBFGS,
    LBFGS,
    MFAC,
    PSGD,
    CurveBall,
    Newton,
    bfgs,
    graph_gradient,
    powell,
    product,
    psgd_update,
    two_loop,
)

D = torch.float64
seeds = st.integers(0, 10**6)


def rand(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def spd(seed, d):
    A = rand(seed, d, d)
    return A @ A.t() / d + .1 * torch.eye(d, dtype=D)


@given(seed=seeds, d=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_bfgs_keeps_definiteness_and_the_secant(seed, d):
    H = spd(seed, d)
    s, y = rand(seed + 1, d), rand(seed + 2, d)
    if float(s @ y) < 0: y = -y
    if float(s @ y) > 1e-3:
        new = bfgs(H, s, y)
        torch.testing.assert_close(new @ y, s, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(new, new.t())
        assert torch.linalg.eigvalsh((new + new.t()) / 2)[0] > -1e-9
    assert bfgs(H, s, -y) is H
    s2, y2 = powell(H, s, -y)
    assert float(s2 @ y2) >= .2 * float(y2 @ H @ y2) - 1e-9
    assert torch.linalg.eigvalsh(bfgs(H, s2, y2))[0] > -1e-9


@given(seed=seeds, d=st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_two_loops_equal_the_dense_recursion(seed, d):
    pairs = [(s, spd(seed, d) @ s) for s in rand(seed, d, d)]
    s, y = pairs[-1]
    H = torch.eye(d, dtype=D) * (s @ y) / (y @ y)
    for s, y in pairs: H = bfgs(H, s, y)
    g = rand(seed + 3, d)
    torch.testing.assert_close(two_loop(g, pairs), H @ g, atol=1e-7, rtol=1e-6)


class Quadratic(nn.Module):
    def __init__(self, seed=0, d=5, sign=1.0):
        super().__init__()
        self.x = nn.Parameter(torch.ones(d, dtype=D))
        Q = torch.linalg.qr(rand(seed, d, d))[0]
        w = torch.linspace(.2, 2, d, dtype=D)
        w[0] *= sign
        self.Q = (Q * w) @ Q.t()

    def forward(self): return .5 * self.x @ self.Q @ self.x


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_newton_solves_a_quadratic_in_one_step_and_flees_saddles(seed):
    m = Quadratic(seed)
    Newton(m, lr=1., damping=1e-13).step(m)
    assert float(m().detach()) < 1e-18
    m = Quadratic(seed, sign=-1.)
    before = m.x.detach().clone()
    opt = Newton(m, lr=1., damping=1e-13)
    opt.step(m)
    w, V = torch.linalg.eigh(m.Q)
    torch.testing.assert_close(V.t() @ (m.x.detach() - before), -w.sign() * (V.t() @ before),
                               atol=1e-8, rtol=1e-8)


def test_products_are_hessian_times_vector():
    m = Quadratic()
    _, gs, g = graph_gradient([m.x], m)
    v = rand(1, 5)
    torch.testing.assert_close(product([m.x], gs, v), m.Q @ v)
    torch.testing.assert_close(g, (m.Q @ m.x).detach())


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_mfac_is_the_dense_inverse_of_its_gradients(seed):
    m = Quadratic(seed)
    opt = MFAC(m, lr=.1, damping=.5)
    gs = []
    for _ in range(4):
        x, g = m.x.detach().clone(), (m.Q @ m.x).detach()
        gs.append(g)
        opt.step(m)
        E = sum(torch.outer(g, g) for g in gs) / len(gs)
        want = torch.linalg.solve(E + .5 * torch.eye(5, dtype=D), g)
        torch.testing.assert_close((x - m.x.detach()) / .1, want, atol=1e-8, rtol=1e-7)


def test_psgd_finds_the_inverse_modulus():
    B, A = spd(0, 3), torch.diag(torch.tensor([1., -2., .5], dtype=D))
    QL, QR, g = torch.eye(3, dtype=D), torch.eye(3, dtype=D), torch.Generator().manual_seed(0)
    for i in range(4000):
        v = torch.randn(3, 3, generator=g, dtype=D)
        QL, QR = psgd_update(QL, QR, v, B @ v @ A, .1 / (1 + i / 200))
    P = torch.kron(QL.t() @ QL, QR.t() @ QR)
    torch.testing.assert_close(P @ torch.kron(B, A.abs()), torch.eye(9, dtype=D), atol=.2, rtol=0)
    assert torch.equal(QL, torch.triu(QL)) and torch.equal(QR, torch.triu(QR))


@pytest.mark.parametrize("make", [lambda m: Newton(m, lr=.2, damping=1e-1),
                                  lambda m: CurveBall(m, lr=.1, momentum=.8),
                                  lambda m: MFAC(m, lr=.01, damping=.1), lambda m: LBFGS(m, lr=.5),
                                  lambda m: KBFGS(m, lr=.05, damping=1e-1),
                                  lambda m: PSGD(m, lr=.05, damping=1e-2)],
                         ids=["Newton", "CurveBall", "M-FAC", "L-BFGS", "K-BFGS", "PSGD"])
def test_every_method_trains(make):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = rand(0, 40, 4), rand(0, 40, 4)[:, :3].argmax(1)
    opt = make(m)
    closure = lambda: F.cross_entropy(m(x), y)
    first = float(closure().detach())
    for _ in range(25): opt.step(closure)
    assert float(closure().detach()) < .95 * first


def test_kbfgs_factors_change_and_stay_definite():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = rand(0, 40, 4), rand(0, 40, 4)[:, :3].argmax(1)
    opt = KBFGS(m, lr=.05, damping=1e-1)
    for _ in range(10): opt.step(lambda: F.cross_entropy(m(x), y))
    for k in opt.layers:
        for H in (opt.HA[k], opt.HB[k]):
            torch.testing.assert_close(H, H.t(), atol=1e-8, rtol=1e-8)
            assert torch.linalg.eigvalsh((H + H.t()) / 2)[0] > 0
        assert not torch.equal(opt.HB[k], torch.eye(len(opt.HB[k]), dtype=D))


def test_arguments():
    with pytest.raises(ValueError, match="argument damping=0"): Newton(Quadratic(), damping=0)
    m = nn.Linear(100, 50)
    with pytest.raises(ValueError, match="too many parameters"):
        Newton(m).step(lambda: m(torch.ones(1, 100)).sum())


def test_kbfgs_damping_goes_with_the_positions_of_a_convolution():
    "A carries a factor T: lambda_A = sqrt(lambda T), lambda_B = sqrt(lambda / T)"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = rand(0, 20, 1, 4, 4), rand(1, 20, 3).argmax(1)
    opt = KBFGS(m, lr=0.0, damping=.09)
    opt.step(lambda: F.cross_entropy(m(x), y))
    rows = F.unfold(x, 3).transpose(1, 2)                                       # (20, T = 4, 9)
    A, a = torch.einsum("nti,ntj->ij", rows, rows) / 20, rows.mean((0, 1))
    H = torch.linalg.inv(A + .3 * 2 * torch.eye(9, dtype=D))
    s = H @ a
    want = bfgs(H, s, A @ s + .3 * 2 * s)
    torch.testing.assert_close(opt.HA[opt.layers[0]], want, atol=1e-9, rtol=1e-8)
    opt = KBFGS(m, lr=.05, damping=.09)
    g0, W0 = torch.autograd.grad(F.cross_entropy(m(x), y), m[0].weight)[0], m[0].weight.detach()
    W0 = W0.clone()
    def error(W):
        out = F.conv2d(x, W).requires_grad_()
        return torch.autograd.grad(F.cross_entropy(m[1:](out), y), out)[0].mean((2, 3)).sum(0)
    first = error(W0)
    opt.step(lambda: F.cross_entropy(m(x), y))
    torch.testing.assert_close(m[0].weight.detach(), W0 - .05 * (g0.view(2, 9) @ want).view_as(W0))
    s = (m[0].weight.detach() - W0).view(2, 9) @ a
    pair = powell(torch.eye(2, dtype=D), s, error(m[0].weight.detach()) - first, .2, .3 / 2)
    torch.testing.assert_close(opt.HB[opt.layers[0]], bfgs(torch.eye(2, dtype=D), *pair))
