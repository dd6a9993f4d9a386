"""Losses, gradients and Hessians against automatic differentiation; minimisers; bad input."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.logistic import (
    classification,
    curvature,
    federate,
    heavy_tailed,
    logistic_hess,
    minimise,
    random_quadratic,
)
from yokolab.federated.splits import contiguous_split, dirichlet_split

fast = settings(max_examples=10, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unequal(seed=0, dim=4, lam=0.1):
    "Clients of different sizes, and what they were made of"
    g = seeded(seed)
    X = torch.randn(60, dim, generator=g, dtype=torch.float64)
    y = torch.arange(60) % 2
    split = dirichlet_split(y, 5, 0.7, minimum=2, generator=g)
    return federate(X, y, split, lam), X, 2*y - 1, split


@fast
@given(st.integers(0, 99), st.floats(0., 3.), st.booleans())
def test_against_automatic_differentiation(seed, lam, one):
    problem, X, sign, split = unequal(seed, lam=lam)
    theta = torch.randn(*(() if one else (5,)), 4, generator=seeded(seed + 1), dtype=torch.float64)

    def loss(i, t):
        a, b = X[split[i]], sign[split[i]]
        return torch.log1p(torch.exp(-b*(a @ t))).mean() + lam/2*t @ t
    for i in range(5):
        t = theta if one else theta[i]
        g = torch.autograd.functional.jacobian(lambda t, i=i: loss(i, t), t)
        H = torch.autograd.functional.hessian(lambda t, i=i: loss(i, t), t)
        assert torch.allclose(problem.loss(theta)[i], loss(i, t), rtol=1e-13)
        assert torch.allclose(problem.grad(theta)[i], g, rtol=1e-11, atol=1e-14)
        assert torch.allclose(problem.hess(theta)[i], H, rtol=1e-10, atol=1e-14)
        assert torch.allclose(problem.hess_row(theta, 1)[i], H[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk, block", [(1, None), (2, 1), (5, 3), (100, 4), (3, 100)])
def test_chunks_and_blocks_do_not_change_the_hessian(chunk, block):
    problem, *_ = unequal()
    theta = torch.ones(4, dtype=torch.float64)
    plain = (problem.x*curvature(problem, theta)[..., None]).mT @ problem.x + 0.1*torch.eye(4).double()
    H = logistic_hess(problem, theta, chunk, block)
    assert torch.allclose(H, plain, rtol=1e-13, atol=1e-16) and torch.allclose(H, H.mT)


def test_stable_far_out():
    "Margins of thousands: no overflow, exact limits, full relative precision of small losses"
    problem, X, sign, split = unequal()
    far = 1e4*torch.ones(4, dtype=torch.float64)
    f, g, H = problem.loss(far), problem.grad(far), problem.hess(far)
    assert all(torch.isfinite(x).all() for x in (f, g, H))
    hinge = torch.stack([(-sign[s]*(X[s] @ far)).clamp_min(0).mean() for s in split])
    assert torch.allclose(f - 0.05*far @ far, hinge, rtol=1e-6)
    assert torch.allclose(H, 0.1*torch.eye(4).double().expand(5, 4, 4))     # only lambda is left
    one = federate(torch.tensor([[1.], [-1.]]).double(), torch.tensor([1, 0]), [torch.arange(2)], 0.)
    z = torch.tensor([25.]).double()
    assert torch.allclose(one.loss(z), torch.log1p(torch.exp(-z)), rtol=1e-12)   # softplus is not


def test_take_keeps_the_clients():
    problem, *_ = unequal()
    ids, theta = torch.tensor([4, 1]), torch.randn(4, generator=seeded(), dtype=torch.float64)
    part = problem.take(ids)
    assert torch.equal(part.sizes, problem.sizes[ids]) and torch.equal(part.weights, problem.weights[ids])
    assert torch.allclose(part.hess(theta), problem.hess(theta)[ids])
    assert problem.take(torch.arange(5)) is problem


@fast
@given(st.integers(0, 99), st.sampled_from([1e-3, 1e-1, 1.]))
def test_minimise_finds_the_stationary_point(seed, lam):
    problem, *_ = unequal(seed, lam=lam)
    star = minimise(problem)
    assert (problem.weights @ problem.grad(star)).norm() < 1e-13
    assert torch.allclose(minimise(problem, 10*torch.ones(4).double()), star, rtol=1e-9)


def test_minimise_of_weighted_clients_is_that_of_the_pooled_data():
    g = seeded()
    X, y, _ = heavy_tailed(200, 5, generator=g)
    split = torch.arange(200).tensor_split([20, 50, 130])
    apart = federate(X, y, split, 0.1, weights="size")
    pooled = federate(X, y, [torch.arange(200)], 0.1)
    assert torch.allclose(minimise(apart), minimise(pooled), rtol=1e-11)


def test_sampled_gradient_estimates_the_diagonal():
    problem, *_ = unequal()
    theta, g = torch.ones(4).double()/2, seeded()
    draws = torch.stack([problem.sampled_grad(theta, g) for _ in range(3000)])
    want = problem.hess(theta).diagonal(dim1=1, dim2=2) - 0.1
    assert (draws.mean(0)/(draws.std(0)/3000**0.5)).abs().max() < 5
    assert torch.allclose(problem.sizes[:, None]*draws.square().mean(0), want, rtol=0.2)


def test_heavy_tails_are_heavy():
    X, y, theta = heavy_tailed(20_000, 3, tail=3., generator=seeded())
    z = X[:, 0]/X[:, 0].std()
    assert (z.abs() > 6).sum() > 20 and set(y.tolist()) == {-1, 1}
    star = minimise(federate(X, y, contiguous_split(len(X), 4), 1e-6))
    assert (star - theta).norm() < 0.15*theta.norm()                # the planted one is found


@fast
@given(st.integers(0, 99))
def test_quadratic(seed):
    q = random_quadratic(4, 3, generator=seeded(seed))
    theta = torch.randn(4, 3, generator=seeded(seed), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(q.loss(theta).sum(), theta)
    assert torch.allclose(q.grad(theta.detach()), g)
    assert torch.allclose(minimise(q), q.star(), rtol=1e-10)
    assert torch.equal(q.take(torch.tensor([2])).centers, q.centers[2:3])


def test_bundled_data():
    pytest.importorskip("sklearn")
    X, y = classification("breast_cancer")
    assert X.shape == (569, 31) and (X[:, -1] == 1).all() and y.unique().numel() == 2
    assert torch.allclose(X[:, :-1].mean(0), torch.zeros(30).double(), atol=1e-12)
    assert torch.allclose(X[:, :-1].square().mean(0), torch.ones(30).double())


@pytest.mark.parametrize("change, message", [
    (dict(labels=torch.zeros(60)), "two classes are needed"),
    (dict(labels=torch.arange(60)), "two classes are needed"),
    (dict(lam=-1.), "lam=-1.0"),
    (dict(labels=torch.arange(50) % 2), r"shapes \(60, 4\), \(50,\)"),
    (dict(split=[torch.arange(60), torch.arange(0)]), "every client needs a sample"),
    (dict(weights="mass"), "kind='mass'"),
])
def test_bad_input(change, message):
    given = dict(features=torch.randn(60, 4), labels=torch.arange(60) % 2, lam=0.1,
                 split=contiguous_split(60, 3))
    with pytest.raises(ValueError, match=message):
        federate(**given | change)
    with pytest.raises(ValueError, match="degrees of freedom are positive"):
        heavy_tailed(10, 2, tail=0.)


def test_minimise_says_when_it_gives_up():
    problem, *_ = unequal()
    with pytest.raises(ValueError, match="limit=1: the Newton decrement is still"):
        minimise(problem, limit=1)
