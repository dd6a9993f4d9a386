"""Natural gradient of a smoothed loss: factors and gradient come from the same shifted passes."""
import copy

import pytest
import torch
from torch import nn

from yokolab.curvature.engine import Method, Preconditioner
from yokolab.curvature.loss_smoothing import Smoothing, draw_noise, smoothed_backward
from yokolab.curvature.mixup import soft_cross_entropy, soft_labels
from yokolab.curvature.shapes import KRON
from yokolab.curvature.solve import cholesky


def problem(n=23):
    "Network, inputs, soft labels."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    g = torch.Generator().manual_seed(1)
    y = soft_labels(torch.randint(4, (n,), generator=g), 4, dtype=torch.float64)
    return net, torch.randn(n, 6, generator=g, dtype=torch.float64), y


def exact(net, chunks=1):
    "K-FAC with the exact Fisher: no labels are drawn."
    return Preconditioner(net, Method("K-FAC", "exact", KRON, cholesky), damping=0.1,
                          accumulate=chunks)


def by_hand(net, x):
    "Kronecker factors of each layer at the parameters as they are."
    with torch.no_grad(): hidden = torch.tanh(net[0](x))
    p = torch.softmax(net[2](hidden), 1).detach()
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]         # Hessian in the logits
    V = net[2].weight.detach() * (1 - hidden[:, None, :] ** 2)      # logits over pre-activations
    one = lambda a: torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    A = [one(a).T @ one(a) / len(x) for a in (x, hidden)]
    return list(zip(A, [(V.transpose(1, 2) @ S @ V).mean(0), S.mean(0)], strict=True))


@pytest.mark.parametrize("chunk", [None, 8, 5])
def test_factors_are_those_of_the_shifted_passes_weighted_by_their_share(chunk):
    net, x, y = problem()
    twin, kfac = copy.deepcopy(net), exact(net, -(-len(x) // (chunk or len(x))))
    smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(0.5, chunk=chunk),
                      torch.Generator().manual_seed(2), backward=kfac.backward)
    gradients = [p.grad.clone() for p in net.parameters()]
    kfac.precondition()
    g, parts = torch.Generator().manual_seed(2), []
    for xc in x.split(chunk or len(x)):
        delta = draw_noise(list(twin.parameters()), 0.5, generator=g)
        shifted = copy.deepcopy(twin)
        with torch.no_grad():
            for p, d in zip(shifted.parameters(), delta, strict=True): p.add_(d)
        parts.append((len(xc) / len(x), by_hand(shifted, xc)))
    lam = 0.1**0.5
    for k, layer in enumerate(kfac.layers):
        A, B = (sum(w * f[k][i] for w, f in parts) for i in (0, 1))
        torch.testing.assert_close(kfac.stats[layer]["A"], A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(kfac.stats[layer]["B"], B, rtol=1e-9, atol=1e-12)
        pi = (A.diagonal().mean() / B.diagonal().mean()).sqrt()
        G = torch.cat([gradients[2 * k], gradients[2 * k + 1][:, None]], 1)
        eye = lambda M: torch.eye(len(M), dtype=M.dtype)
        dense = torch.kron(B + lam / pi * eye(B), A + lam * pi * eye(A))
        want = torch.linalg.solve(dense, G.reshape(-1)).reshape(G.shape)
        got = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def test_without_smoothing_the_step_is_that_of_plain_natural_gradient_to_the_bit():
    net, x, y = problem()
    twin = copy.deepcopy(net)
    a, b = exact(net), exact(twin)
    for _ in range(3):
        for n in (net, twin): n.zero_grad()
        smoothed_backward(net, soft_cross_entropy, x, y, Smoothing(chunk=None), backward=a.backward)
        out = twin(x)
        b.backward(soft_cross_entropy(out, y), out)
        for n, kfac in ((net, a), (twin, b)):
            kfac.precondition()
            with torch.no_grad():
                for p in n.parameters(): p.sub_(p.grad, alpha=0.1)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True): assert torch.equal(p, q)
