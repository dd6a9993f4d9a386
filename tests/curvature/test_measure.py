"Errors, rows and second moments against automatic differentiation"
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature import measure
from yokolab.curvature.core import find_layers, gradient, inputs
from yokolab.curvature.measure import (
    Recorder,
    conv_moment,
    error_moment,
    exact_errors,
    input_moment,
    loss_kind,
    loss_terms,
    patch_moment,
    pull,
    sampled_error,
)

D = torch.float64


@given(N=st.integers(1, 3), C=st.integers(1, 4), H=st.integers(1, 6), W=st.integers(1, 6),
       seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_autocorrelation_equals_unfolding(N, C, H, W, seed):
    x = torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=D)
    u = F.unfold(x, 3, padding=1)
    torch.testing.assert_close(conv_moment(x), torch.einsum("nit,njt->ij", u, u), atol=1e-10,
                               rtol=1e-10)


CONVS = {"3x3": nn.Conv2d(2, 3, 3, padding=1),
         "3x3 plain": nn.Conv2d(2, 3, 3, padding=1, bias=False),
         "1x1 strided": nn.Conv2d(2, 3, 1, stride=(2, 1)), "strided": nn.Conv2d(2, 3, 3, 2, 1),
         "dilated": nn.Conv2d(2, 3, (2, 3), dilation=2, padding="same"),
         "1d": nn.Conv1d(2, 3, 3, padding=1), "1d pointwise": nn.Conv1d(2, 3, 1)}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("calls", [1, 2])
def test_moments_of_convolutions_are_those_of_their_rows(name, calls):
    m = CONVS[name].double()
    xs = [torch.randn(3, 2, 6, 5)[..., :6 - len(name) % 2].double() for _ in range(calls)]
    if "1d" in name: xs = [x[:, :, 0] for x in xs]
    (t,) = _record(m, xs, lambda r: sum(m(x).sin().sum() for x in xs).backward())
    a, b = t.a().flatten(0, 1), t.b().flatten(0, 1)
    torch.testing.assert_close(input_moment(t)[0], a.t() @ a)
    B, n = error_moment(t)
    torch.testing.assert_close(B, b.t() @ b)
    assert n == len(b)


def test_the_usual_convolution_is_not_unfolded(monkeypatch):
    def refuse(*args): raise AssertionError("unfolded")
    monkeypatch.setattr(measure, "patches", refuse)
    for name in ("3x3", "3x3 plain", "1x1 strided", "1d pointwise"):
        x = torch.randn(2, 2, 5, 5) if "1d" not in name else torch.randn(2, 2, 5)
        patch_moment(CONVS[name].double(), x.double())


def test_output_that_is_not_finite_is_named():
    bad = torch.tensor([[0., float("nan")], [1., float("inf")]])
    for kind in ("cross_entropy", "mse", "binary"):
        with pytest.raises(ValueError, match=r"argument output=\(2, 2\): holds 2 entries"):
            sampled_error(kind, bad)
        with pytest.raises(ValueError, match="holds 2 entries"): next(exact_errors(kind, bad))


@pytest.mark.parametrize("kind", ["cross_entropy", "mse", "binary"])
def test_exact_errors_are_a_square_root_of_the_hessian(kind):
    f = torch.randn(5, 4, dtype=D)
    y = torch.tensor([0, 1, 2, 3, 0])
    loss = {"cross_entropy": lambda z: F.cross_entropy(z, y, reduction="sum"),
            "mse": lambda z: 5 * F.mse_loss(z, f * 0),
            "binary": lambda z: 5 * F.binary_cross_entropy_with_logits(z, f * 0)}[kind]
    H = torch.autograd.functional.hessian(loss, f)
    S = torch.stack(list(exact_errors(kind, f)))
    for i in range(5): torch.testing.assert_close(S[:, i].t() @ S[:, i], H[i, :, i])
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([sampled_error(kind, f, g) for _ in range(10000)])
    for i in range(5): assert (draws[:, i].t() @ draws[:, i] / 10000 - H[i, :, i]).abs().max() < .03


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(),
                         nn.Linear(48, 4)).double()


def _record(model, x, run, what="empirical"):
    out = []
    rec = Recorder(find_layers(model)[0], out.append, what)
    rec.attach()
    run(rec)
    rec.flush()
    rec.detach()
    return out


def test_rows_of_a_pass_give_the_gradient_and_survive_in_place_operations():
    m, x, y = _net(), torch.randn(5, 1, 4, 4, dtype=D), torch.randint(4, (5,))
    for t in _record(m, x, lambda r: F.cross_entropy(m(x), y).backward()):
        G = torch.einsum("nro,nri->oi", t.b(), t.a()) / 5
        torch.testing.assert_close(G, gradient(t.layer))
    seen = _record(m, x, lambda r: pull(r, iter([torch.ones(5, 4, dtype=D)]), m(x)), "mc")
    m.zero_grad()
    m(x).sum().backward()
    for t in seen:
        torch.testing.assert_close(torch.einsum("nro,nri->oi", t.b(), t.a()), gradient(t.layer))


def test_a_layer_called_twice_is_one_layer_with_more_rows():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(3, 3)
        def forward(self, x): return self.f(torch.tanh(self.f(x)))
    m, x = Twice().double(), torch.randn(4, 3, dtype=D)
    (t,) = _record(m, x, lambda r: m(x).square().mean().backward())
    assert t.a().shape == (4, 2, 4)
    torch.testing.assert_close(torch.einsum("nro,nri->oi", t.b(), t.a()) / 4, gradient(t.layer))


def test_no_gradient_no_rows():
    m, x = _net(), torch.randn(2, 1, 4, 4, dtype=D)
    assert _record(m, x, lambda r: m(x)) == []
    with torch.no_grad(): assert _record(m, x, lambda r: m(x)) == []
    assert not any(k._forward_hooks for k in m.modules())


@pytest.mark.parametrize("share", ["expand", "reduce"])
def test_moments_are_plain_sums(share):
    m, x, y = _net(), torch.randn(5, 1, 4, 4, dtype=D), torch.randint(4, (5,))
    for t in _record(m, x, lambda r: F.cross_entropy(m(x), y).backward()):
        a, b = t.a(), t.b()
        a, b = (a.flatten(0, 1), b.flatten(0, 1)) if share == "expand" else (a.mean(1), b.sum(1))
        A, nA = input_moment(t, share)
        B, nB = error_moment(t, share)
        torch.testing.assert_close(A, a.t() @ a)
        torch.testing.assert_close(B, b.t() @ b)
        assert nA == 5 and nB == (len(b) if share == "expand" else 5)


def test_embedding_has_a_diagonal_input_factor():
    m, x = nn.Embedding(6, 3).double(), torch.tensor([[0, 1, 1], [5, 1, 0]])
    (t,) = _record(m, x, lambda r: m(x).square().sum().backward())
    onehot = F.one_hot(inputs(t.layer, m, x), 6).double().flatten(0, 1)
    A, _ = input_moment(t)
    torch.testing.assert_close(A.double().diag(), onehot.t() @ onehot)


def test_losses():
    assert loss_kind(nn.MSELoss()) == "mse"
    assert loss_terms("cross_entropy", torch.zeros(4, 7, 3)) == 12
    with pytest.raises(ValueError, match="argument loss='huber'"): loss_kind("huber")
