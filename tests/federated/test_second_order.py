"""Identities of the methods that step on the server."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.core import fit
from yokolab.federated.logistic import (
    Quadratic,
    federate,
    heavy_tailed,
    minimise,
    random_quadratic,
)
from yokolab.federated.second_order import (
    FedNew,
    FedNL,
    FedNS,
    Newton,
    compress,
    decompress,
    sketch,
    spd_solve,
)

fast = settings(max_examples=10, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def path(method, problem, rounds=6, seed=0, **options):
    return torch.stack([r.theta for r in fit(method, problem, rounds, generator=seeded(seed), **options)])


def logistic(seed=0, lam=0.05):
    g = seeded(seed)
    X, y, _ = heavy_tailed(120, 4, tail=5., generator=g)
    return federate(X, y, torch.randperm(120, generator=g).tensor_split([15, 40, 70]), lam, "size")


def symmetric(seed, n=3, d=5):
    D = torch.randn(n, d, d, generator=seeded(seed), dtype=torch.float64)
    return D + D.mT


@fast
@given(st.integers(0, 99))
def test_newton_is_newton_on_the_pooled_data(seed):
    problem = logistic(seed)
    pooled = type(problem)(problem.x.flatten(0, 1)[None],
                           (problem.weights[:, None]*problem.s).flatten()[None],
                           torch.ones(1).double(), problem.lam)
    theta = torch.zeros(4, dtype=torch.float64)
    for got in path(Newton(), problem):
        assert torch.allclose(got, theta, rtol=1e-10, atol=1e-11)
        theta = theta - torch.linalg.inv(pooled.hess(theta)[0]) @ pooled.grad(theta)[0]


@fast
@given(st.integers(0, 99))
def test_fednl_without_compression(seed):
    "Newton if it refreshes; one Hessian late if not; both options"
    problem = logistic(seed)
    want = path(Newton(), problem)
    for method in (FedNL(mu=1e-9), FedNL(mu=1e-9, exact=False), FedNL(option=2), FedNL("rank", 4, mu=1e-9)):
        assert torch.allclose(path(method, problem), want, rtol=1e-9, atol=1e-10)
    late, theta = path(FedNL(mu=1e-9, refresh=False), problem), torch.zeros(4).double()
    mean = lambda x: torch.tensordot(problem.weights, x, 1)
    old = mean(problem.hess(theta))
    for got in late:
        assert torch.allclose(got, theta, rtol=1e-9, atol=1e-11)
        new = mean(problem.hess(theta))
        theta = theta - torch.linalg.inv(old) @ mean(problem.grad(theta))
        old = new


@fast
@given(st.integers(0, 99), st.integers(1, 5))
def test_compressors_contract(seed, size):
    D = symmetric(seed)
    lost = lambda kind, k, most: ((decompress(compress(D, kind, k, seeded()), 5) - D).square().sum((1, 2))
                                  <= (1 - k/most)*D.square().sum((1, 2)) + 1e-12).all()
    assert lost("identity", 1, 1) and lost("rank", size, 5) and lost("top", 3*size, 15)


@pytest.mark.parametrize("size", [1, 4, 15])
def test_random_entries_are_unbiased(size):
    D, n = symmetric(0, 1), 20_000
    sent = compress(D.expand(n, 5, 5), "random", size, seeded())
    mean = decompress(sent, 5).mean(0)
    assert torch.allclose(15/size*mean, D[0], atol=6*(15/size/n)**0.5*D.abs().max())
    assert sent["places"].sort(1).values.diff(dim=1).ne(0).all()                  # distinct


@pytest.mark.parametrize("method", [FedNL("rank", 1, mu=.1), FedNL("top", 3, mu=.1), FedNL("random", 4, mu=.1),
                                    FedNL("rank", 1, option=2), FedNL("random", 4, option=2),
                                    FedNS(3), FedNS(4, kind="sign"), FedNew(0., .5)], ids=repr)
def test_all_end_at_the_minimiser_of_a_quadratic(method):
    q = random_quadratic(6, 4, generator=seeded(1))
    assert (path(method, q, 250)[-1] - q.star()).norm() < 1e-6


def test_learned_hessians_converge_to_the_true_ones():
    "What the server knows at the end of FedNL is the Hessian at the minimiser"
    problem, seen = logistic(), []

    class Spy(FedNL):
        def server(self, message, server, upload, round):
            theta, server = super().server(message, server, upload, round)
            seen.append(server["H"])
            return theta, server
    end = path(Spy("rank", 1, mu=.05), problem, 60)[-1]
    H = torch.tensordot(problem.weights, problem.hess(minimise(problem)), 1)
    assert torch.allclose(end, minimise(problem), atol=1e-9)
    assert torch.allclose(seen[-1], H, atol=1e-7)


def test_fednl_keeps_the_estimates_of_absent_clients():
    problem, seen = logistic(), []

    class Spy(FedNL):
        def client(self, problem, message, state, round):
            upload, new = super().client(problem, message, state, round)
            seen.append((round.clients, state["H"], new["H"]))
            return upload, new

        def server(self, message, server, upload, round):
            theta, server = super().server(message, server, upload, round)
            own[seen[-1][0]] = seen[-1][2]
            assert torch.allclose(server["H"], torch.tensordot(problem.weights, own, 1), atol=1e-12)
            return theta, server
    own = problem.hess(torch.zeros(4).double())
    for _ in fit(Spy("rank", 1, mu=.05), problem, 12, dropout=.4, generator=seeded(2)):
        pass
    assert any(len(s[0]) < 4 for s in seen)


@fast
@given(st.integers(0, 99), st.floats(0.05, 2.), st.booleans())
def test_fednew_keeps_the_weighted_sum_of_duals_zero(seed, rho, equal):
    q = random_quadratic(5, 3, generator=seeded(seed))
    if not equal:
        p = torch.rand(5, generator=seeded(seed), dtype=torch.float64) + 0.1
        q = Quadratic(q.H, q.centers, p/p.sum())
    duals = []

    class Spy(FedNew):
        def settle(self, state, theta, server, round):
            state = super().settle(state, theta, server, round)
            duals.append(round.mean(state["dual"]))
            return state
    path(Spy(0.1, rho), q, 8)
    assert torch.stack(duals).abs().max() < 1e-10


@fast
@given(st.integers(0, 99))
def test_fedns_with_square_orthogonal_sketches_is_newton(seed):
    problem = logistic(seed)
    got, want = path(FedNS(4, kind="orthogonal"), problem), path(Newton(), problem)
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind, size", [("gaussian", 3), ("sign", 3), ("orthogonal", 3)])
def test_sketches_have_the_identity_as_mean(kind, size):
    S = sketch(20_000, size, 5, kind, seeded())
    assert torch.allclose((S.mT @ S).mean(0), torch.eye(5).double(), atol=0.05)


@pytest.mark.parametrize("call, message", [
    (lambda: compress(symmetric(0), "half"), "kind='half': unknown compressor"),
    (lambda: sketch(1, 6, 5, "orthogonal"), "at most 5 rows"),
    (lambda: path(FedNS(1), random_quadratic(3, 4, generator=seeded())), "size=1: 3 sketches"),
    (lambda: spd_solve(-torch.eye(2)[None], torch.ones(1, 2), torch.tensor([9])), "client 9"),
    (lambda: spd_solve(torch.eye(2)*torch.nan, torch.ones(2)), "the sum over clients"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
