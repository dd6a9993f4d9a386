"""Every property of preconditioned mixing, its errors, and numbers of a pilot on real data."""
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.core import fit
from yokolab.federated.fedpm import FedPM, mix, mix_layer, mix_layer_ref, mix_layers, mix_ref
from yokolab.federated.local_newton import LocalNewton
from yokolab.federated.logistic import (
    Quadratic,
    classification,
    federate,
    heavy_tailed,
    minimise,
    random_quadratic,
)
from yokolab.federated.second_order import FedNL, Newton
from yokolab.federated.splits import contiguous_split, sorted_split

fast = settings(max_examples=12, deadline=None)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(0, 999))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(shape, seed):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def spd(n, d, seed):
    R = draw((n, d, 2*d), seed)
    return R @ R.mT/d + 0.05*torch.eye(d).double()


def shares(n, seed):
    p = torch.rand(n, generator=seeded(seed), dtype=torch.float64) + 0.1
    return p/p.sum()


def path(method, problem, rounds=6, **options):
    return torch.stack([r.theta for r in fit(method, problem, rounds, **options)])


def logistic(seed=0, lam=0.05, alike=False):
    X, y, _ = heavy_tailed(90, 4, tail=5., generator=seeded(seed))
    split = [torch.arange(90)]*3 if alike else sorted_split(y, 4, 0.3, seeded(seed))
    return federate(X, y, split, lam, "uniform" if alike else "size")


# the mix

@fast
@given(sizes)
def test_mix_is_its_formula(size):
    n, d, seed = size
    thetas, Ps, p = draw((n, d), seed), spd(n, d, seed + 1), shares(n, seed)
    assert torch.allclose(mix(thetas, Ps, p), mix_ref(thetas, Ps, p), rtol=1e-9, atol=1e-10)


@fast
@given(sizes, st.floats(0.1, 1.5))
def test_one_local_step_is_the_preconditioned_step_for_any_spd_matrices(size, eta):
    n, d, seed = size
    Ps, g, theta, p = spd(n, d, seed), draw((n, d), seed + 1), draw((d,), seed + 2), shares(n, seed)
    local = theta - eta*torch.cholesky_solve(g[..., None], torch.linalg.cholesky(Ps))[..., 0]
    wanted = theta - eta*torch.linalg.inv(torch.tensordot(p, Ps, 1)) @ (p @ g)
    assert (mix(local, Ps, p) - wanted).norm() < 1e-10*(1 + wanted.norm() + local.norm())


@fast
@given(sizes)
def test_partition_of_unity_shift_plain_mean_order_scale(size):
    n, d, seed = size
    thetas, Ps, p = draw((n, d), seed), spd(n, d, seed + 1), shares(n, seed)
    out, theta, shift = mix(thetas, Ps, p), draw((d,), seed + 2), draw((d,), seed + 3)
    order = torch.randperm(n, generator=seeded(seed))
    close = lambda a, b: torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    assert close(mix(theta.expand(n, d), Ps, p), theta)
    assert close(mix(thetas + shift, Ps, p), out + shift)
    assert close(mix(thetas, Ps[:1].expand(n, d, d), p), p @ thetas)
    assert close(mix(thetas[order], Ps[order], p[order]), out)
    assert close(mix(thetas, 1e5*Ps, p), out) and close(mix(thetas, Ps, 7*p), out)


def test_equal_parameters_come_back_to_the_last_bit():
    thetas = draw((7,), 1).expand(4, 7)
    assert torch.equal(mix(thetas, spd(4, 7, 2)), thetas[0])


def test_singular_preconditioners_are_fine_if_their_sum_is_not():
    half = torch.diag_embed(torch.tensor([[1., 0.], [0., 1.]], dtype=torch.float64))
    out = mix(torch.tensor([[1., 2.], [3., 4.]], dtype=torch.float64), half)
    assert torch.allclose(out, torch.tensor([1., 4.]).double())


def test_single_precision():
    thetas, Ps = draw((4, 6), 0), spd(4, 6, 1)
    out = mix(thetas.float(), Ps.float())
    assert out.dtype == torch.float32 and torch.allclose(out.double(), mix(thetas, Ps), atol=1e-4)


BAD = [
    (lambda t, P: (t[:0], P[:0]), "zero clients, nothing to mix; keep the server's parameters"),
    (lambda t, P: (t, P[:3]), r"shapes \(4, 3\), \(3, 3, 3\): pass \(N, d\) and \(N, d, d\)"),
    (lambda t, P: (t[0], P[0]), r"pass \(N, d\) and \(N, d, d\)"),
    (lambda t, P: (t.index_fill(0, torch.tensor([2]), torch.inf), P), "thetas: client 2 sent NaN"),
    (lambda t, P: (t, P.index_fill(0, torch.tensor([0, 3]), torch.nan)), "Ps: client 0, 3 sent NaN"),
    (lambda t, P: (t, P + torch.eye(4)[1][:, None, None]*torch.ones(3, 3).tril(-1)),
     "client 1 is not symmetric; pass"),
    (lambda t, P: (t, P - 9*torch.eye(4)[3][:, None, None]*torch.eye(3)),
     "client 3 is indefinite; use a Gauss-Newton or FOOF matrix, or add damping"),
    (lambda t, P: (t, 0*P), "weighted sum is singular or not finite; add damping"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m[:24] for _, m in BAD])
def test_bad_input_names_client_what_and_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        mix(*change(draw((4, 3), 0), spd(4, 3, 1)))


@pytest.mark.parametrize("weights", [-torch.ones(4), torch.zeros(4), torch.ones(3), torch.ones(4, 1)])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="argument weights"):
        mix(draw((4, 3), 0), spd(4, 3, 1), weights)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64: parameters are floating-point"):
        mix(torch.ones(2, 3).long(), torch.eye(3).long().expand(2, 3, 3))


# layers

layers = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 999))


@fast
@given(layers)
def test_layer_is_the_kronecker_form(size):
    n, out, d, seed = size
    W, A, p = draw((n, out, d), seed), spd(n, d, seed + 1), shares(n, seed)
    got = mix_layer(W, A, p)
    assert torch.allclose(got, mix_layer_ref(W, A, p), rtol=1e-8, atol=1e-9)
    S = torch.tensordot(p, A, 1)
    assert torch.allclose(got, torch.tensordot(p, W @ A, 1) @ torch.linalg.inv(S), rtol=1e-8, atol=1e-9)


@fast
@given(layers, st.floats(1e-2, 10.))
def test_layer_is_the_least_squares_merge(size, lam):
    n, out, d, seed = size
    m = torch.randint(1, 12, (n,), generator=seeded(seed)).tolist()
    W, X = draw((n, out, d), seed), [draw((k, d), seed + 10 + i) for i, k in enumerate(m)]
    A = torch.stack([x.mT @ x/len(x) + lam*torch.eye(d).double() for x in X])
    rows = [torch.cat([x/len(x)**0.5, lam**0.5*torch.eye(d).double()]) for x in X]
    want = torch.linalg.lstsq(torch.cat(rows), torch.cat([r @ w.mT for r, w in zip(rows, W)])).solution.mT
    assert torch.allclose(mix_layer(W, A), want, rtol=1e-8, atol=1e-9)


def test_dead_inputs_fall_back_to_the_mean():
    W, X = draw((3, 2, 5), 0), draw((3, 30, 5), 1)
    X[:, :, [1, 4]] = 0.
    A, live = X.mT @ X/30, [0, 2, 3]
    got = mix_layer(W, A)
    assert torch.allclose(got[:, [1, 4]], W[:, :, [1, 4]].mean(0), rtol=1e-12)
    assert torch.allclose(got[:, live], mix_layer(W[:, :, live], A[:, live][:, :, live]), rtol=1e-9)
    damped = mix_layer(W, A + 1e-9*torch.eye(5).double())
    assert torch.allclose(got, damped, rtol=1e-6)            # the limit of vanishing damping


def test_kernels_and_parameters_without_covariance():
    K, A = draw((3, 4, 2, 3, 3), 0), spd(3, 18, 1)
    p = torch.tensor([1., 2., 1.])
    out = mix_layers(dict(conv=K, bias=K[:, :, 0, 0, 0]), dict(conv=A), p)
    assert out["conv"].shape == (4, 2, 3, 3)
    assert torch.equal(out["conv"].flatten(1), mix_layer(K.flatten(2), A, p))
    assert torch.allclose(out["bias"], torch.tensor([.25, .5, .25]).double() @ K[:, :, 0, 0, 0])


@pytest.mark.parametrize("call, message", [
    (lambda W, A: mix_layer(W.mT, A), r"A is needed as \(3, 2, 2\).* do not transpose W"),
    (lambda W, A: mix_layer(W[:0], A[:0]), "zero clients"),
    (lambda W, A: mix_layer(W, -A), "argument A: the matrix of client 0, 1, 2 is indefinite"),
    (lambda W, A: mix_layers(dict(w=W), dict(v=A)), r"\['v'\] name no parameter"),
    (lambda W, A: mix_layers(dict(w=W*torch.nan), {}), "argument w: client 0, 1, 2 sent NaN"),
])
def test_bad_layers(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw((3, 2, 4), 0), spd(3, 4, 1))


@fast
@given(st.integers(0, 99))
def test_foof_step_tends_to_gradient_descent(seed):
    "lambda to infinity with eta/lambda fixed: the error falls like 1/lambda"
    G, A = draw((3, 5), seed), spd(1, 5, seed)[0]
    gap = [(lam*G @ torch.linalg.inv(A + lam*torch.eye(5).double()) - G).norm() for lam in (1e3, 1e4, 1e5)]
    assert gap[0] > 9*gap[1] > 81*gap[2] > 0


# the method

@fast
@given(st.integers(0, 99))
def test_one_step_is_newton_every_round(seed):
    problem = logistic(seed)
    got = path(FedPM(), problem, 8)
    assert (got - path(Newton(), problem, 8)).norm(dim=1).max() < 1e-10
    assert (got - path(FedNL(mu=1e-9), problem, 8)).norm(dim=1).max() < 1e-10


@fast
@given(st.integers(0, 99), st.floats(0.01, 2.), st.floats(0.3, 1.))
def test_damping_steps_and_mixes_alike(seed, damping, eta):
    problem = logistic(seed)
    theta = torch.zeros(4).double()
    for got in path(FedPM(1, eta, damping), problem):
        assert torch.allclose(got, theta, rtol=1e-9, atol=1e-11)
        H = torch.tensordot(problem.weights, problem.hess(theta), 1) + damping*torch.eye(4).double()
        theta = theta - eta*torch.linalg.inv(H) @ (problem.weights @ problem.grad(theta))


@fast
@given(st.integers(0, 99), st.integers(1, 5), st.floats(0.1, 1.))
def test_quadratics_shrink_by_a_known_factor(seed, steps, eta):
    q, p = random_quadratic(5, 4, generator=seeded(seed)), shares(5, seed)
    q = Quadratic(q.H, q.centers, p)
    errors = path(FedPM(steps, eta), q, theta=draw((4,), seed)) - q.star()
    assert torch.allclose(errors[1:], (1 - eta)**steps*errors[:-1], rtol=1e-8, atol=1e-10)
    assert (path(FedPM(steps), q, 1)[-1] - q.star()).norm() < 1e-10


@fast
@given(st.integers(0, 99), st.integers(1, 3))
def test_identical_clients(seed, steps):
    problem = logistic(seed, alike=True)
    assert torch.allclose(path(FedPM(steps, 0.7), problem), path(LocalNewton(steps, 0.7), problem), atol=1e-10)


@fast
@given(st.integers(0, 99))
def test_invariant_under_a_change_of_variables(seed):
    problem, B = logistic(seed, lam=0.), draw((4, 4), seed) + 3*torch.eye(4).double()
    turned = type(problem)(problem.x @ B, problem.s, problem.weights, 0.)
    got = path(FedPM(1, 0.4), turned, 3) @ B.mT
    assert torch.allclose(got, path(FedPM(1, 0.4), problem, 3), rtol=1e-6, atol=1e-8)


def test_several_steps_have_a_floor_and_a_last_phase_removes_it():
    problem = logistic(3)
    star = minimise(problem)
    away = lambda m, rounds=25: (path(m, problem, rounds)[-1] - star).norm()
    assert away(FedPM(3)) > 1e-4 and away(FedPM(3, last=15)) < 1e-12
    slow = [away(FedPM(2, eta), 400) for eta in (0.5, 0.1, 0.02)]
    assert slow[0] > 2*slow[1] > 4*slow[2]                  # the floor goes with eta
    assert FedPM(3, 0.5, decay=0.5).plan(2) == (3, 0.125) and FedPM(3, 0.5, last=2).plan(2) == (1, 1.)


def test_drop_outs_mix_those_that_answer():
    problem = logistic()
    rest = torch.tensor([0, 2, 3])
    part = problem.take(rest)
    alone = type(part)(part.x, part.s, part.weights/part.weights.sum(), part.lam)
    got = path(FedPM(), problem, 5, absent=dict.fromkeys(range(5), (1,)))
    assert torch.allclose(got, path(Newton(), alone, 5), rtol=1e-9, atol=1e-11)
    once = path(FedPM(), problem, 12, absent={1: (0,), 3: (2, 3), 4: range(4)})
    assert torch.equal(once[5], once[4]) and (once[-1] - minimise(problem)).norm() < 1e-12


def test_a_client_without_curvature_is_named():
    X = torch.cat([torch.randn(20, 3, generator=seeded()).double(), torch.zeros(10, 3).double()])
    problem = federate(X, torch.arange(30) % 2, torch.arange(30).tensor_split([10, 20]), 0.)
    with pytest.raises(ValueError, match="the matrix of client 2 is not positive definite"):
        path(FedPM(), problem, 1)
    with pytest.raises(ValueError, match="client 2"):      # numbered as in the federation
        path(FedPM(), problem, 1, absent={0: (0,)})
    assert torch.isfinite(path(FedPM(damping=1e-3), problem, 3)).all()


# real data

@pytest.mark.data
@pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("YOKOLAB_DATA", ""), "a9a")),
                    reason="needs a9a in YOKOLAB_DATA")
def test_a9a_distances():
    "80 clients of 407 samples in file order, lambda 1e-3, theta = 0: known distances to the minimiser"
    X, y = classification("a9a")
    problem = federate(X, y, contiguous_split(80*407, 80), 1e-3)
    star = minimise(problem)
    got = (path(FedPM(), problem, 8) - star).norm(dim=1)
    known = torch.tensor([3.99, 2.24, 1.27, 0.53, 0.11, 5.1e-3, 1.1e-5, 5.5e-11]).double()
    assert torch.allclose(got[:8], known, rtol=0.03) and got[8] < 1e-13
    assert (path(LocalNewton(), problem, 8)[-1] - star).norm().item() == pytest.approx(0.31, rel=0.02)
