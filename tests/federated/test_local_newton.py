"""Identities of the methods that step on the clients."""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.core import fit
from yokolab.federated.local_newton import LTDA, FedSophia, LocalNewton, newton_steps
from yokolab.federated.logistic import Quadratic, federate, heavy_tailed, random_quadratic
from yokolab.federated.second_order import Newton

fast = settings(max_examples=10, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def path(method, problem, rounds=6, **options):
    return torch.stack([r.theta for r in fit(method, problem, rounds, generator=seeded(), **options)])


def logistic(seed=0, alike=False):
    X, y, _ = heavy_tailed(90, 4, tail=5., generator=seeded(seed))
    split = [torch.arange(90)]*3 if alike else torch.arange(90).tensor_split([20, 50])
    return federate(X, y, split, 0.05)


@fast
@given(st.integers(0, 99), st.integers(1, 4), st.floats(0.2, 1.))
def test_local_newton_on_quadratics_goes_to_the_plain_mean(seed, steps, eta):
    q = random_quadratic(4, 3, generator=seeded(seed))
    errors = path(LocalNewton(steps, eta), q, theta=torch.ones(3).double()) - q.centers.mean(0)
    assert torch.allclose(errors[1:], (1 - eta)**steps*errors[:-1], rtol=1e-9, atol=1e-11)


@fast
@given(st.integers(0, 99))
def test_identical_clients_make_it_newton(seed):
    problem = logistic(seed, alike=True)
    assert torch.allclose(path(LocalNewton(), problem), path(Newton(), problem), atol=1e-10)


@fast
@given(st.integers(0, 99), st.floats(0.5, 20.))
def test_line_search_never_raises_a_client_loss(seed, far):
    problem = logistic(seed)
    theta = far*torch.randn(4, generator=seeded(seed), dtype=torch.float64)
    losses = [problem.loss(theta)] + [problem.loss(newton_steps(problem, theta, k, search=True)[0])
                                      for k in (1, 2, 5)]
    assert all((b <= a*(1 + 1e-12)).all() for a, b in zip(losses, losses[1:]))


def test_the_matrices_returned_are_those_of_the_last_step():
    problem = logistic()
    before, _ = newton_steps(problem, torch.zeros(4).double(), 2, 0.5, 0.1)
    after, P = newton_steps(problem, torch.zeros(4).double(), 3, 0.5, 0.1)
    assert torch.allclose(P, problem.hess(before) + 0.1*torch.eye(4))
    step = torch.linalg.inv(P) @ problem.grad(before)[..., None]
    assert torch.allclose(after, before - 0.5*step[..., 0])


@fast
@given(st.integers(0, 99))
def test_ltda_is_newton_for_diagonals_of_rank_one_hessians(seed):
    v = torch.randn(3, generator=seeded(seed), dtype=torch.float64)
    v[0] = v[0].abs() + 0.5
    q = Quadratic(torch.outer(v, v)[None], torch.ones(1, 3).double(), torch.ones(1).double())
    want = -0.7*q.grad(torch.zeros(3).double())[0]/(v.square() + 0.2)
    assert torch.allclose(path(LTDA(1, 0.7, 0.2), q, 1)[1], want, rtol=1e-10)


def test_ltda_guards_a_vanishing_first_entry():
    q = Quadratic(torch.tensor([[[0., 1.], [1., 1.]]]).double(), torch.ones(1, 2).double(),
                  torch.ones(1).double())
    assert torch.isfinite(path(LTDA(3, 0.1, 0.1), q)).all()


@fast
@given(st.integers(0, 99), st.floats(0.01, 1.), st.integers(1, 4))
def test_fedsophia_moves_at_most_eta_rho_per_step(seed, rho, steps):
    moved = path(FedSophia(steps, 0.1, rho), logistic(seed)).diff(dim=0).abs().max()
    assert moved <= steps*0.1*rho*(1 + 1e-12)


def test_fedsophia_by_hand():
    "One client, two rounds of one step, curvature sampled every second step"
    problem = logistic(alike=True).take(torch.tensor([0]))
    problem = type(problem)(problem.x, problem.s, torch.ones(1).double(), problem.lam)
    method, g = FedSophia(1, 0.1, 0.5, 0.8, 0.9, 1e-2, tau=2, decay=0.01), seeded()
    theta = m = torch.zeros(4).double()
    h = torch.zeros(4).double()
    for t, got in enumerate(path(method, problem, 3)):
        assert torch.allclose(got, theta, rtol=1e-12)
        m = 0.8*m + 0.2*problem.grad(theta)[0]
        if t % 2 == 0: h = 0.9*h + 0.1*90*problem.sampled_grad(theta[None], g)[0].square()
        theta = (1 - 0.001)*theta - 0.1*(m/h.clamp_min(1e-2)).clamp(-0.5, 0.5)
