"""Identities of the first-order methods."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.core import fit
from yokolab.federated.first_order import PSGD, SCAFFOLD, FedAdam, FedAvg, FedAvgM, FedProx
from yokolab.federated.logistic import random_quadratic

fast = settings(max_examples=10, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def path(method, problem, rounds=5, **options):
    options.setdefault("theta", torch.ones(problem.dim, dtype=torch.float64))
    return torch.stack([r.theta for r in fit(method, problem, rounds, **options)])


@fast
@given(st.integers(0, 99), st.floats(0.01, 0.5))
def test_one_local_step_on_whole_batches_is_psgd(seed, eta):
    q = random_quadratic(4, 3, generator=seeded(seed))
    want = path(PSGD(eta), q)
    for method in (FedAvg(1, eta), SCAFFOLD(1, eta), FedProx(1, eta, mu=2.), FedAvgM(1, eta, beta=0.)):
        assert torch.allclose(path(method, q), want, rtol=1e-11, atol=1e-12)


@fast
@given(st.integers(0, 99), st.integers(1, 6))
def test_local_steps_on_quadratics_in_closed_form(seed, steps):
    q, eta, mu = random_quadratic(4, 3, generator=seeded(seed)), 0.1, 0.5
    theta, I = torch.ones(3).double(), torch.eye(3).double()
    for method, pull in ((FedAvg(steps, eta), 0.), (FedProx(steps, eta, mu=mu), mu)):
        R = torch.linalg.matrix_power(I - eta*(q.H + pull*I), steps)
        fixed = torch.cholesky_solve((q.H @ q.centers[..., None]) + pull*theta[:, None],
                                     torch.linalg.cholesky(q.H + pull*I))[..., 0]
        ends = fixed + (R @ (theta - fixed)[..., None])[..., 0]
        assert torch.allclose(path(method, q, 1)[-1], ends.mean(0), rtol=1e-11)


def test_server_optimizers_by_hand():
    q = random_quadratic(3, 2, generator=seeded())
    theta = torch.ones(2).double()
    m = v = n = torch.zeros(2).double()
    w = theta
    momentum, adam = path(FedAvgM(2, 0.1, 0.5, 0.9), q, 4), path(FedAdam(2, 0.1, 0.2, 0.8, 0.9, 1e-2), q, 4)
    for t in range(4):
        m = 0.9*m + path(FedAvg(2, 0.1), q, 1, theta=theta)[1] - theta
        theta = theta + 0.5*m
        delta = path(FedAvg(2, 0.1), q, 1, theta=w)[1] - w
        n, v = 0.8*n + 0.2*delta, 0.9*v + 0.1*delta**2
        w = w + 0.2*n/(v.sqrt() + 1e-2)
        assert torch.allclose(momentum[t + 1], theta, rtol=1e-12)
        assert torch.allclose(adam[t + 1], w, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(dropout=0.4, generator=seeded(3)),
                                     dict(participation=0.5, generator=seeded(4))])
def test_scaffold_ends_at_the_minimiser_where_fedavg_does_not(options):
    q = random_quadratic(6, 4, generator=seeded(1))
    end = path(SCAFFOLD(5, 0.1), q, 1200, **options)[-1]
    assert (end - q.star()).norm() < 1e-7
    assert (path(FedAvg(5, 0.1), q, 600)[-1] - q.star()).norm() > 1e-2


@fast
@given(st.integers(0, 99))
def test_weights_decide_the_minimiser(seed):
    q = random_quadratic(3, 2, generator=seeded(seed))
    p = torch.rand(3, generator=seeded(seed), dtype=torch.float64) + 0.1
    q = type(q)(q.H, q.centers, p/p.sum())
    assert torch.allclose(path(PSGD(0.3), q, 800)[-1], q.star(), atol=1e-6)
