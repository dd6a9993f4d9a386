"""Loss smoothing: closed forms, estimators, exact restoration, baselines, bad input."""
import copy
import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from torch import nn

from yokolab.curvature.loss_smoothing import (
    NOISES,
    Smoothing,
    draw_noise,
    gnc_backward,
    noise_coefficient,
    sam_backward,
    shifted,
    smooth_ref,
    smoothable,
    smoothed_abs_ref,
    smoothed_backward,
    smoothed_cosine_ref,
    smoothed_quadratic_ref,
)
from yokolab.curvature.loss_smoothing_landscape import smoothed_value
from yokolab.curvature.mixup import soft_cross_entropy, soft_labels

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
sizes = st.floats(0.01, 2.0)


def rng(seed): return torch.Generator().manual_seed(seed)


def normal(seed, *shape): return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def classifier(seed=0, n=23, dtype=torch.float64):
    "Network, inputs, soft labels."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    g = rng(seed + 1)
    y = soft_labels(torch.randint(4, (n,), generator=g), 4, dtype=dtype)
    return net, torch.randn(n, 6, generator=g, dtype=dtype), y


def grads(net): return [p.grad.clone() for p in net.parameters()]


# --- closed forms


@quick
@given(seeds, sizes, st.integers(1, 3))
def test_a_quadratic_rises_by_its_trace_and_keeps_its_gradient(seed, a, d):
    H = normal(seed, d, d)
    H, theta = H + H.T, normal(seed + 1, d)
    f = lambda t: 0.5 * torch.einsum("mi,ij,mj->m", t, H, t)
    want = f(theta[None])[0] + a**2 / 6 * H.trace()
    assert torch.allclose(smooth_ref(f, theta, a, 6), want, rtol=1e-11, atol=1e-11)
    assert torch.allclose(smoothed_quadratic_ref(H, theta, a), want, rtol=1e-12, atol=1e-12)
    gradient = smooth_ref(lambda t: t @ H, theta, a, 6)
    assert torch.allclose(gradient, H @ theta, rtol=1e-11, atol=1e-11)


@quick
@given(seeds, sizes)
def test_a_cubic_shifts_the_gradient_by_that_of_the_trace(seed, a):
    T, theta = normal(seed, 3, 3, 3), normal(seed + 1, 3)
    S = sum(T.permute(p) for p in permutations(range(3))) / 6     # tr H = 6 S_iik t_k
    gradient = lambda t: 3 * torch.einsum("mi,mj,ijk->mk", t, t, S)
    want = gradient(theta[None])[0] + a**2 / 6 * 6 * torch.einsum("iik->k", S)
    assert torch.allclose(smooth_ref(gradient, theta, a, 6), want, rtol=1e-10, atol=1e-10)


@quick
@given(st.floats(0.1, 8), st.floats(-3, 3), sizes)
def test_a_ripple_is_damped_by_sinc(k, theta, a):
    at = torch.tensor([theta], dtype=torch.float64)
    got = smooth_ref(lambda t: torch.cos(k * t[:, 0]), at, a, 32)
    assert torch.allclose(got, smoothed_cosine_ref(k, at[0], a), rtol=1e-9, atol=1e-9)


def test_a_ripple_vanishes_when_the_window_is_its_period():
    theta = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert smoothed_cosine_ref(4.0, theta, math.pi / 4).abs().max() < 1e-15


def test_a_kink_becomes_a_parabola_of_curvature_one_over_a():
    a, h = 0.3, 1e-4
    theta = torch.tensor([-h, 0.0, h, a, 2 * a], dtype=torch.float64)
    v = smoothed_abs_ref(theta, a)
    assert abs(v[1] - a / 2) < 1e-15
    assert abs((v[0] - 2 * v[1] + v[2]) / h**2 - 1 / a) < 1e-5
    left, right = smoothed_abs_ref(torch.tensor([a - h, a + h], dtype=torch.float64), a)
    assert abs((v[3] - left) - (right - v[3])) < 1e-6 and v[4] == 2 * a     # C1 at the seam


@quick
@given(seeds, st.lists(sizes, min_size=2, max_size=4))
def test_a_convex_loss_lies_below_its_averages_which_grow_with_a(seed, widths):
    W, theta = normal(seed, 5, 2), normal(seed + 1, 2)
    f = lambda t: torch.logsumexp(t @ W.T, 1)
    values = [f(theta[None])[0]] + [smooth_ref(f, theta, a, 20) for a in sorted(widths)]
    assert all(v <= w + 1e-9 for v, w in pairwise(values))
    left, right = normal(seed + 2, 2), normal(seed + 3, 2)
    mid = smooth_ref(f, (left + right) / 2, widths[0], 20)
    ends = (smooth_ref(f, left, widths[0], 20) + smooth_ref(f, right, widths[0], 20)) / 2
    assert mid <= ends + 1e-9                                             # still convex


@quick
@given(seeds, sizes)
def test_no_smoothed_gradient_is_longer_than_the_steepest(seed, a):
    W, theta = normal(seed, 5, 2), normal(seed + 1, 2)
    slope = smooth_ref(lambda t: torch.softmax(t @ W.T, 1) @ W, theta, a, 20)
    assert slope.norm() <= W.norm(dim=1).max() * (1 + 1e-9)


# --- sampling


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_the_estimate_is_unbiased_and_its_error_falls_with_the_root_of_the_draws(kind):
    theta, k, a = normal(0, 3), 2.0, 0.8
    damp = (math.sin(k * a) / (k * a) if kind == "uniform" else math.exp(-(k * a) ** 2 / 6))
    exact = damp * torch.cos(k * theta).sum()
    f = lambda t: torch.cos(k * t).sum(1)
    few, many = (smoothed_value(f, theta, a, m, kind, generator=rng(m)) for m in (2000, 32000))
    for est in (few, many): assert abs(est.value - exact) < 4.5 * est.stderr
    assert few.stderr / many.stderr == pytest.approx(4, rel=0.1)


@quick
@given(seeds, sizes)
def test_antithetic_pairs_remove_odd_terms(seed, a):
    H, theta = normal(seed, 3, 3), normal(seed + 1, 3)
    est = smoothed_value(lambda t: t @ H, theta, a, 4, antithetic=True, generator=rng(seed))
    assert torch.allclose(est.value, theta @ H, rtol=1e-10, atol=1e-10)


@quick
@given(seeds, st.sampled_from(NOISES), sizes)
def test_noise_is_reproducible_bounded_and_has_its_scale(seed, kind, a):
    params = [normal(seed, 4, 3, 2), normal(seed + 1, 4)]
    one, two = (draw_noise(params, a, kind, rng(seed)) for _ in range(2))
    for p, d, e in zip(params, one, two, strict=True):
        assert torch.equal(d, e)
        if kind == "uniform": assert d.abs().max() <= a
        if kind == "weight": assert bool((d.abs() <= a * p.abs()).all())
        if kind == "filter":
            rows = lambda v: v.reshape(len(v), -1).norm(dim=1)
            assert torch.allclose(rows(d), a * rows(p), rtol=1e-10)
        if kind in ("filter", "weight"):                     # follows the weights' scale
            (scaled,) = draw_noise([8 * p], a, kind, rng(seed)) if p is params[0] else (8 * d,)
            assert torch.allclose(scaled, 8 * d, rtol=1e-12)


@pytest.mark.parametrize("n", [8191, 8192, 40_003])
def test_uniform_noise_is_uniform_symmetric_and_uncorrelated_at_every_size(n):
    (d,) = draw_noise([torch.zeros(n, dtype=torch.float64)], 0.5, generator=rng(n))
    assert sps.kstest(d.numpy(), sps.uniform(-0.5, 1).cdf).pvalue > 1e-3
    assert d.abs().max() < 0.5 and abs(d.mean()) < 4 * 0.5 / math.sqrt(3 * n)
    for lag in (1, 2, 3, 4):
        r = float(torch.corrcoef(torch.stack([d[:-lag], d[lag:]]))[0, 1])
        assert abs(r) < 4.5 / math.sqrt(n)


# --- the smoothed gradient


def test_without_smoothing_the_trajectory_is_the_plain_one_bit_for_bit():
    net, x, y = classifier(dtype=torch.float32)
    twin = copy.deepcopy(net)
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    a, b = make(net), make(twin)
    for _ in range(20):
        a.zero_grad(), b.zero_grad()
        smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(chunk=None), rng(0))
        soft_cross_entropy(twin(x), y).backward()
        a.step(), b.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True): assert torch.equal(p, q)


@quick
@given(seeds, st.integers(1, 30), st.sampled_from(NOISES))
def test_chunks_with_given_shifts_are_the_mean_over_all_samples(seed, chunk, kind):
    net, x, y = classifier(seed % 100)
    smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(a=0.2, chunk=chunk, kind=kind),
                      rng(seed))
    fast, g, out = grads(net), rng(seed), []
    net.zero_grad()
    for xc in x.split(chunk):
        delta = draw_noise(list(net.parameters()), 0.2, kind, g)
        values = {n: p + d for (n, p), d in zip(net.named_parameters(), delta, strict=True)}
        out.append(torch.func.functional_call(net, values, (xc,)))
    soft_cross_entropy(torch.cat(out), y).backward()
    for u, v in zip(fast, grads(net), strict=True):
        assert torch.allclose(u, v, rtol=1e-9, atol=1e-12)


def test_relative_noise_is_held_fixed_while_differentiating():
    net, x, y = classifier()
    smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(0.2, chunk=None, kind="weight"),
                      rng(3))
    fast = grads(net)
    delta = draw_noise(list(net.parameters()), 0.2, "weight", rng(3))
    net.zero_grad()
    with shifted(list(net.parameters()), delta): soft_cross_entropy(net(x), y).backward()
    for u, v in zip(fast, grads(net), strict=True): assert torch.equal(u, v)


def test_the_mean_smoothed_gradient_tends_to_the_gradient_of_the_mean():
    lin = nn.Linear(2, 1, bias=False).double()
    cubic = lambda out, y: (out**3).mean() / 6
    x = torch.ones(4000, 2, dtype=torch.float64)
    smoothed_backward(lin, cubic, x, x, Smoothing(a=0.5, chunk=1), rng(0))
    s = lin.weight.detach().sum()
    want = (s**2 + 2 * 0.5**2 / 3) / 2          # E (s + d1 + d2)^2 / 2
    assert torch.allclose(lin.weight.grad, want.expand(1, 2), rtol=0.05)


def test_parameters_are_restored_to_the_bit_even_when_the_loss_fails():
    net, x, y = classifier(dtype=torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    calls = []
    def fails(out, target):
        calls.append(1)
        if len(calls) == 2: raise RuntimeError("stop")
        return soft_cross_entropy(out, target)
    with pytest.raises(RuntimeError, match="stop"):
        smoothed_backward(net, fails, x, y, Smoothing(a=3.0, chunk=5), rng(0))
    for p, b in zip(net.parameters(), before, strict=True): assert torch.equal(p, b)
    with pytest.raises(RuntimeError, match="stop"), shifted(list(net.parameters()), before):
        raise RuntimeError("stop")
    for p, b in zip(net.parameters(), before, strict=True): assert torch.equal(p, b)


def test_backward_sees_shifted_parameters_and_losses_that_sum():
    net, x, y = classifier()
    theta, seen = net[0].weight.detach().clone(), []
    def backward(loss, output):
        loss.backward()
        seen.append((len(output), float(loss.detach()),
                     float((net[0].weight.detach() - theta).abs().max())))
    info = smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(a=0.1, chunk=10), rng(0),
                             backward=backward)
    assert [s[0] for s in seen] == [10, 10, 3] and info.draws == 3 and info.samples == 23
    assert sum(s[1] for s in seen) == pytest.approx(float(info.loss))
    assert all(0 < s[2] <= 0.1 for s in seen)


def test_gradients_accumulate_and_frozen_parameters_stay_still():
    net, x, y = classifier()
    net[0].bias.requires_grad_(False)
    for _ in range(2): smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(0.1), rng(0))
    twice = net[2].weight.grad.clone()
    net.zero_grad()
    smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(0.1), rng(0))
    assert torch.allclose(twice, 2 * net[2].weight.grad)
    assert net[0].bias.grad is None and len(smoothable(net)) == 3


def test_normalization_is_excluded_and_shared_weights_count_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Linear(3, 3))
    net[3].weight = net[0].weight
    assert len(smoothable(net)) == 3


@pytest.mark.parametrize("kind", ["constant", "anneal", "tanh"])
def test_schedules_stay_within_one(kind):
    c = [noise_coefficient(t, 50, kind) for t in range(51)]
    assert all(0 < v <= 1 for v in c) and (c == sorted(c) or c == sorted(c, reverse=True))


# --- baselines


@quick
@given(seeds, st.floats(0, 1))
def test_sam_on_a_quadratic(seed, rho):
    lin = nn.Linear(4, 1, bias=False).double()
    A = normal(seed, 9, 4)
    H = A.T @ A / 9
    theta = lin.weight.detach()[0].clone()
    sam_backward(lin, lambda out, y: 0.5 * (out**2).mean(), A, A, rho)
    g = H @ theta
    want = H @ (theta + rho * g / g.norm())
    assert torch.allclose(lin.weight.grad[0], want, rtol=1e-9, atol=1e-12)
    assert torch.equal(lin.weight[0], theta)


@quick
@given(seeds, st.floats(-1, 1), st.integers(2, 12))
def test_gnc_on_a_quadratic(seed, c, chunk):
    lin = nn.Linear(4, 1, bias=False).double()
    A, theta = normal(seed, 24, 4), lin.weight.detach()[0].clone()
    gnc_backward(lin, lambda out, y: 0.5 * (out**2).mean(), A, A, c, chunk)
    parts = A.split(chunk)
    Hs = [p.T @ p / len(p) for p in parts]
    gs = [H @ theta for H in Hs]
    mean = A.T @ A / 24 @ theta
    want = sum(len(p) / 24 * H @ (theta + c * (gs[k - 1] - mean))
               for k, (p, H) in enumerate(zip(parts, Hs, strict=True)))
    assert torch.allclose(lin.weight.grad[0], want, rtol=1e-9, atol=1e-12)


# --- bad input


@pytest.mark.parametrize(("make", "word"), [
    (lambda: Smoothing(a=-0.1), "a=-0.1"),
    (lambda: Smoothing(a=math.nan), "a=nan"),
    (lambda: Smoothing(alpha=-1), "alpha=-1"),
    (lambda: Smoothing(chunk=0), "chunk=0"),
    (lambda: Smoothing(kind="unifrom"), "kind='unifrom'"),
    (lambda: Smoothing(schedule="cosine"), "kind='cosine'"),
    (lambda: noise_coefficient(11, 10), "t=11"),
    (lambda: smooth_ref(lambda t: t, torch.zeros(9), 1.0), "theta with 9"),
    (lambda: smoothed_value(lambda t: t, torch.zeros(2), 1.0, 3, antithetic=True), "draws=3"),
    (lambda: draw_noise([torch.zeros(2)], np.inf), "a=inf"),
])
def test_errors_name_the_argument(make, word):
    with pytest.raises(ValueError, match="argument") as error: make()
    assert word in str(error.value)


def test_errors_of_batches():
    net, x, y = classifier()
    for bad in ((x[:0], y[:0]), (x, y[:5])):
        with pytest.raises(ValueError, match="argument x"):
            smoothed_backward(net, soft_cross_entropy, *bad, Smoothing())
    with pytest.raises(ValueError, match="soft labels"):
        smoothed_backward(net, soft_cross_entropy, x, y.argmax(1), Smoothing(alpha=1.0))
    with pytest.raises(ValueError, match="argument deltas"), shifted([x], [y]): pass
