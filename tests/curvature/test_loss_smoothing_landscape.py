"""Loss landscape: sharpness, lines, curvature and batch noise against dense references."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature.loss_smoothing_landscape import (
    filter_direction,
    fisher_error,
    gradient_gram,
    hessian_top,
    hessian_trace,
    keskar_sharpness,
    line_path,
    noise_gap,
)
from yokolab.curvature.mixup import soft_cross_entropy

quick = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**31)


def rng(seed): return torch.Generator().manual_seed(seed)


def least_squares(seed, n=20, d=5):
    "A linear model whose Hessian is A'A/n."
    lin = nn.Linear(d, 1, bias=False).double()
    A = torch.randn(n, d, dtype=torch.float64, generator=rng(seed))
    return lin, lambda out, y: 0.5 * (out**2).mean(), A, A.T @ A / n


def classifier(seed=0, n=14):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    g = rng(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=g)
    return net, x, torch.randint(3, (n,), generator=g)


@quick
@given(seeds)
def test_lanczos_finds_the_largest_eigenvalue(seed):
    lin, loss, A, H = least_squares(seed)
    want = float(torch.linalg.eigvalsh(H)[-1])
    assert hessian_top(lin, loss, A, A, generator=rng(seed)) == pytest.approx(want, rel=1e-9)


def test_lanczos_takes_the_largest_not_the_largest_in_magnitude():
    lin, _, A, H = least_squares(0)
    top = hessian_top(lin, lambda out, y: -0.5 * (out**2).mean(), A, A, generator=rng(0))
    assert top == pytest.approx(-float(torch.linalg.eigvalsh(H)[0]), rel=1e-8)


@quick
@given(seeds, st.floats(0.01, 1))
def test_noise_gap_and_trace_agree_on_a_quadratic(seed, a):
    lin, loss, A, H = least_squares(seed)
    trace = hessian_trace(lin, loss, A, A, 200, rng(seed))
    assert abs(trace.value - H.trace()) <= 5 * trace.stderr + 1e-9
    before = lin.weight.detach().clone()
    gap = noise_gap(lin, loss, A, A, a, 800, generator=rng(seed))
    assert abs(gap.value - a**2 / 6 * H.trace()) <= 5 * gap.stderr
    assert torch.equal(lin.weight, before)


@quick
@given(seeds, st.floats(1e-3, 0.2))
def test_keskar_is_exact_for_a_linear_loss_and_restores(seed, eps):
    lin = nn.Linear(6, 1, bias=False).double()
    slope = torch.randn(6, dtype=torch.float64, generator=rng(seed))
    w = lin.weight.detach()[0].clone()
    loss = lambda out, y: out.sum() + 10
    phi = keskar_sharpness(lin, loss, slope[None], None, eps)
    value = float(slope @ w) + 10
    rise = eps * float((slope.abs() * (w.abs() + 1)).sum())
    assert phi == pytest.approx(100 * rise / (1 + value), rel=1e-9)
    assert torch.equal(lin.weight[0], w)


def test_keskar_never_leaves_the_box_and_grows_with_it():
    net, x, y = classifier()
    values = [keskar_sharpness(net, soft_cross_entropy, x, y, eps) for eps in (1e-4, 1e-3, 1e-2)]
    assert 0 <= values[0] < values[1] < values[2]


def test_a_line_passes_its_ends_and_restores():
    net, x, y = classifier()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    end = filter_direction(net, rng(0))
    loss = lambda m: float(soft_cross_entropy(m(x), y).detach())
    at = line_path(net, start, end, (0, 0.3, 1), loss)
    assert at[0] == loss(net)
    net.load_state_dict({k: start[k] + 0.3 * (end[k] - start[k]) for k in start})
    assert at[1] == pytest.approx(loss(net), rel=1e-12)
    net.load_state_dict(end)
    assert at[2] == loss(net)
    with pytest.raises(ValueError, match="argument start"): line_path(net, {}, end, (0,), loss)


def test_a_line_of_a_network_with_counters():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    start = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(8, 4, generator=rng(0)))
    assert len(line_path(net, start, filter_direction(net, rng(1)), (0.5,), lambda m: 1)) == 1


@quick
@given(seeds, st.lists(st.integers(0, 13), min_size=1, max_size=9))
def test_gram_gives_the_distance_of_the_dense_fishers(seed, indices):
    net, x, y = classifier(seed % 50)
    K = gradient_gram(net, soft_cross_entropy, x, y, 5)
    J = torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(
        soft_cross_entropy(net(x[i:i + 1]), y[i:i + 1]), list(net.parameters()))])
        for i in range(14)])
    assert torch.allclose(K, J @ J.T, rtol=1e-9, atol=1e-13)
    F, FB = J.T @ J / 14, J[indices].T @ J[indices] / len(indices)
    want = float((FB - F).norm() / F.norm())
    assert fisher_error(K, torch.tensor(indices)) == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("make", [
    lambda *a: noise_gap(*a, 0.1, draws=1), lambda *a: hessian_trace(*a, draws=1),
    lambda *a: keskar_sharpness(*a, eps=0.0)])
def test_errors_name_the_argument(make):
    lin, loss, A, _ = least_squares(0)
    with pytest.raises(ValueError, match="argument"): make(lin, loss, A, A)
