"""Federated training of nets: exact identities, invariants, bad input."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.clients import (
    NetMethod,
    federate_net,
    follow,
    local_steps,
    picture_task,
    plan,
    train,
    work,
)
from yokolab.federated.core import Diverged, dirichlet_split, fit
from yokolab.federated.fedpm import mix_layer
from yokolab.federated.fedpm_networks import (
    NetFedAdam,
    NetFedAvg,
    NetFedAvgM,
    NetFedPM,
    NetFedProx,
    NetLocalNewton,
    NetScaffold,
    mix_changes,
)
from yokolab.federated.networks import cnn, flatten, gradients, losses, mlp, views

few = settings(max_examples=15, deadline=None)
ALL = [NetFedAvg, NetFedProx, NetFedAvgM, NetFedAdam, NetScaffold, NetLocalNewton, NetFedPM]
name = lambda m: m.__name__


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(sizes=(23, 7, 40, 12), net=None, weights="size", **options):
    """Clients of unequal sizes with random samples, float64."""
    net = net or mlp(5, 6, 4, 3)
    m = sum(sizes)
    y = torch.randint(net.classes, (m,), generator=torch.Generator().manual_seed(1))
    split = torch.randperm(m, generator=torch.Generator().manual_seed(2)).split(list(sizes))
    return federate_net(net, randn(m, *net.inputs), y, split, weights, **options)


def start(p, seed=0): return flatten(p.net.init(seed, dtype=torch.float64))


def after(method, p, rounds=1, theta=None, **options):
    """Server parameters after some rounds."""
    return list(fit(method, p, rounds, start(p) if theta is None else theta, **options))[-1].theta


SMALL = cnn((1, 6, 6), 3, channels=(2, 3), hidden=(), kernel=3, padding=1, groups=1)


@pytest.mark.parametrize("weights", ["size", "uniform"])
@pytest.mark.parametrize("net", [None, SMALL], ids=["mlp", "cnn"])
def test_one_step_of_fedpm_is_the_global_step(net, weights):
    """K = 1: mean gradient, preconditioned by the mean covariance, solved dense with kron(A, I)."""
    p = problem(net=net, weights=weights)
    theta, lr, lam = start(p), 0.7, 0.05
    W, total = views(theta, p.shapes), {}
    for q, part in zip(p.weights, p.parts, strict=True):
        record, w = {}, torch.full((1, len(part)), 1/len(part), dtype=torch.float64)
        _, g = gradients(p.net, {k: v[None] for k, v in W.items()}, p.x[part][None], p.y[part][None],
                         w, record)
        for k, l in p.net.named().items():
            a = l.rows(record[k], w)[0] if l.preconditioned else None
            eye = torch.eye(W[k].shape[1], dtype=torch.float64)
            A = eye if a is None else a.T @ a + lam*eye
            G0, A0 = total.get(k, (0, 0)); total[k] = G0 + q*g[k][0], A0 + q*A
    want = []
    for k, (G, A) in total.items():
        P = torch.kron(A, torch.eye(len(G), dtype=torch.float64))
        step = torch.linalg.solve(P, G.T.flatten()).reshape(G.T.shape).T
        want.append((W[k] - lr*step).flatten())
    have = after(NetFedPM(lr=lr, epochs=1, batch=0, damping=lam), p, theta=theta)
    assert (have - torch.cat(want)).abs().max() < 1e-10
    simple = after(NetLocalNewton(lr=lr, epochs=1, batch=0, damping=lam), p, theta=theta)
    assert (simple - have).abs().max() > 1e-3                     # simple mixing drifts


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.floats(1e-3, 5), st.integers(0, 99))
def test_mixing_is_the_least_squares_merge(n, out, inp, lam, seed):
    W = randn(n, out, inp, seed=seed)
    X = [randn(m, inp, seed=seed + m) for m in range(2, 2 + n)]
    q = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    q, eye = q/q.sum(), torch.eye(inp, dtype=torch.float64)
    A = torch.stack([x.T @ x/len(x) + lam*eye for x in X])
    rows = [s*R for x, qi in zip(X, q, strict=True)
            for s, R in (((qi/len(x))**.5, x), ((qi*lam)**.5, eye))]
    rhs = [s*R @ w.T for x, qi, w in zip(X, q, W, strict=True)
           for s, R in (((qi/len(x))**.5, x), ((qi*lam)**.5, eye))]
    want = torch.linalg.lstsq(torch.cat(rows), torch.cat(rhs)).solution.T
    have = mix_changes(W, A, lambda v: torch.tensordot(q, v, 1))
    assert torch.allclose(have, want, atol=1e-9)
    assert torch.allclose(have, mix_layer(W, A, q), atol=1e-9)     # the same formula, written twice


@few
@given(st.integers(0, 99))
def test_mixing_properties(seed):
    D, Z = randn(4, 3, 5, seed=seed), randn(4, 9, 5, seed=seed + 1)
    A = Z.mT @ Z/9 + 0.1*torch.eye(5)
    mean = lambda v: v.mean(0)
    mixed, c = mix_changes(D, A, mean), randn(3, 5, seed=seed + 2)
    assert torch.allclose(mix_changes(c.expand(4, 3, 5), A, mean), c, atol=1e-10) # partition of unity
    assert torch.allclose(mix_changes(D + c, A, mean), mixed + c, atol=1e-9)     # equivariance
    assert torch.allclose(mix_changes(D, 7*A, mean), mixed, atol=1e-9)           # scale of all A
    order = [2, 0, 3, 1]
    assert torch.allclose(mix_changes(D[order], A[order], mean), mixed, atol=1e-9)
    same = A[:1].expand(4, 5, 5)
    assert torch.allclose(mix_changes(D, same, mean), D.mean(0), atol=1e-9)      # equal A: average


def test_dead_units_fall_back_to_the_mean():
    D, Z = randn(3, 4, 6), randn(3, 8, 6, seed=1)
    Z[:, :, 2] = 0                                                # dead at every client
    A = Z.mT @ Z/8 + 1e-3*torch.eye(6)
    mixed = mix_changes(D, A, lambda v: v.mean(0))
    assert mixed.isfinite().all() and torch.allclose(mixed[:, 2], D[:, :, 2].mean(0))


def test_a_dead_layer_trains_on():
    """All ReLUs of a layer dead at the start: FedPM's step and mix stay finite, thanks to the damping."""
    p = problem()
    theta = start(p)
    views(theta, p.shapes)["fc1"][:, -1] = -100.
    h = after(NetFedPM(lr=0.1, damping=1e-3), p, 2, theta)
    assert h.isfinite().all() and torch.equal(views(h, p.shapes)["fc1"], views(theta, p.shapes)["fc1"])


def test_one_client_and_equal_clients():
    m = dict(lr=0.1, damping=0.1, epochs=2)
    alone = problem(sizes=(30,))
    assert torch.allclose(after(NetFedPM(**m), alone), after(NetLocalNewton(**m), alone), atol=1e-10)
    net = mlp(5, 6, 3)
    same = federate_net(net, randn(20, 5), torch.arange(20) % 3, [torch.arange(20)]*3)
    full = dict(m, batch=0)
    pm = after(NetFedPM(**full), same)
    assert torch.allclose(pm, after(NetLocalNewton(**full), same), atol=1e-10)
    one = federate_net(net, randn(20, 5), torch.arange(20) % 3, [torch.arange(20)])
    assert torch.allclose(pm, after(NetFedPM(**full), one), atol=1e-10)


def test_large_damping_turns_fedpm_into_fedavg():
    p = problem()
    pm = after(NetFedPM(lr=1e8, damping=1e9, epochs=2), p, 2)
    assert torch.allclose(pm, after(NetFedAvg(lr=0.1, epochs=2), p, 2), atol=1e-6)


@pytest.mark.parametrize("cls", ALL, ids=name)
def test_stack_loop_and_pairs_agree(cls):
    p = problem(net=SMALL)
    theta = start(p)
    whole = after(cls(lr=0.05, epochs=2, batch=8), p, 2, theta)
    for size in (1, 3):
        part = after(cls(lr=0.05, epochs=2, batch=8), replace(p, stack=size), 2, theta)
        assert (part - whole).abs().max() < 1e-11, size


def test_local_training_is_sgd_with_momentum_and_decay():
    p, m = problem(), NetMethod(lr=0.1, epochs=2, batch=8, momentum=0.9, weight_decay=0.01, decay=0.5)
    theta, lr = start(p), 0.1*0.5**3
    local = train(p, m, theta, round=3)
    for i in range(4):
        W = {k: v.clone()[None] for k, v in views(theta, p.shapes).items()}
        M = {k: torch.zeros_like(v) for k, v in W.items()}
        b = plan(p, [i], m, 3)
        for idx, w in zip(b.index, b.weight, strict=True):
            leaf = {k: v.requires_grad_() for k, v in W.items()}
            g = torch.autograd.grad(losses(p.net, leaf, p.x[idx], p.y[idx], w).sum(), list(leaf.values()))
            for (k, v), d in zip(leaf.items(), g, strict=True):
                M[k] = 0.9*M[k] + d
                W[k] = (1 - lr*0.01)*v.detach() - lr*M[k]
        want = flatten({k: v[0] for k, v in W.items()})
        assert (local.theta[i] - want).abs().max() < 1e-12
    assert local.steps.tolist() == [local_steps(s, m) for s in p.sizes] == [6, 2, 10, 4]


def test_fedprox_pulls_back():
    p = problem()
    theta = start(p)
    move = {mu: (train(p, NetFedProx(lr=0.1, mu=mu, epochs=5), theta, 0).theta - theta).norm()
            for mu in (1e-9, 1., 5.)}
    plain = (train(p, NetFedAvg(lr=0.1, epochs=5), theta, 0).theta - theta).norm()
    assert abs(move[1e-9] - plain) < 1e-6 and move[5.] < move[1.] < plain
    # one step: the pull is zero at theta; two full steps: y2 = y1 - lr (g(y1) + mu (y1 - theta))
    two = train(p, NetFedProx(lr=0.1, mu=2., epochs=2, batch=0), theta, 0).theta
    one = train(p, NetFedAvg(lr=0.1, epochs=1, batch=0), theta, 0).theta
    i = p.parts[1]
    W1 = {k: v[None] for k, v in views(one[1], p.shapes).items()}
    w = torch.full((1, len(i)), 1/len(i), dtype=torch.float64)
    _, g = gradients(p.net, W1, p.x[i][None], p.y[i][None], w)
    want = one[1] - 0.1*(flatten({k: v[0] for k, v in g.items()}) + 2*(one[1] - theta))
    assert (two[1] - want).abs().max() < 1e-12


class Spy(NetScaffold):
    """SCAFFOLD that notes its control variates."""
    def settle(self, state, theta, server, round):
        self.seen.append((round.clients, state["c"], server["c"])); return state


@pytest.mark.parametrize("weights", ["size", "uniform"])
def test_scaffold_keeps_c_the_mean_of_c_i(weights):
    p, Spy.seen = problem(weights=weights), []
    C = torch.zeros(4, p.dim, dtype=torch.float64)
    after(Spy(lr=0.1, epochs=2), p, 4, absent={1: [0], 2: [1, 3]})  # also with drop-outs
    for ids, c_i, c in Spy.seen:
        C[ids] = c_i
        assert (p.weights @ C - c).abs().max() < 1e-12
    assert len(Spy.seen) == 4 and C.abs().max() > 1e-3


def test_scaffold_with_one_full_step_is_gradient_descent():
    p, full = problem(), dict(lr=0.1, epochs=1, batch=0)
    assert torch.allclose(after(NetScaffold(**full), p, 3), after(NetFedAvg(**full), p, 3), atol=1e-12)
    with pytest.raises(ValueError, match="momentum=0.5"): NetScaffold(momentum=0.5)


def test_server_momentum_and_adam():
    p, local = problem(), dict(lr=0.1, epochs=1)
    theta = start(p)
    assert torch.allclose(after(NetFedAvgM(beta=0., **local), p, 2), after(NetFedAvg(**local), p, 2))
    d = after(NetFedAvg(**local), p, 1, theta) - theta
    adam = NetFedAdam(server_lr=0.3, beta1=0.5, beta2=0.75, tau=0.1, **local)
    assert torch.allclose(after(adam, p, 1, theta), theta + 0.3*0.5*d/((0.25*d*d).sqrt() + 0.1))
    one = after(NetFedAvgM(beta=0.9, **local), p, 1, theta)
    d2 = after(NetFedAvg(**local), replace(p, seed=0), 1, one) - one   # round index 0: same batches
    two = list(fit(NetFedAvgM(beta=0.9, **local), p, 2, theta))[-1].theta
    assert (two - one - 0.9*(one - theta)).norm() < 2*d2.norm()        # momentum carried over


@pytest.mark.parametrize("cls", ALL, ids=name)
def test_a_round_without_some_clients_is_the_round_of_the_others(cls):
    p = problem()
    theta = start(p)
    here = torch.tensor([0, 2])
    m = cls(lr=0.05, epochs=1)
    have = after(m, p, 1, theta, absent={0: [1, 3]})
    assert torch.allclose(have, after(m, p.take(here), 1, theta), atol=1e-12)
    nobody = after(m, p, 1, theta, absent={0: [0, 1, 2, 3]})
    assert torch.equal(nobody, theta)


def test_weights_follow_the_sizes():
    sized, even = problem(), problem(weights="uniform")
    assert torch.allclose(sized.weights, torch.tensor([23., 7, 40, 12]).double()/82)
    thetas = train(sized, NetFedAvg(lr=0.1), start(sized), 0).theta
    assert torch.allclose(after(NetFedAvg(lr=0.1), sized), sized.weights @ thetas)
    assert torch.allclose(after(NetFedAvg(lr=0.1), even), thetas.mean(0))


@few
@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 20), st.integers(0, 9))
def test_batches_are_epochs(m, epochs, batch, limit):
    """Every epoch shows each sample once; counts of steps and sample gradients are right."""
    p = problem(sizes=(m, 5))
    method = NetMethod(epochs=epochs, batch=batch, limit=limit)
    b = plan(p, [0], method, 1)
    shown = b.index[b.weight > 0]
    assert len(b.index) == local_steps(m, method) and len(shown) == work(m, method)
    if not limit: assert torch.equal(shown.sort().values, p.parts[0].sort().values.repeat_interleave(epochs))
    assert torch.allclose(b.weight.sum(2), torch.ones(1, dtype=torch.float64))
    assert b.active == [1]*len(b.index)


def test_batches_depend_on_seed_round_and_client_only():
    p, m = problem(), NetMethod()
    a = plan(p, [2, 0], m, 4)
    alone = plan(p.take(torch.tensor([2])), [0], m, 4)
    assert torch.equal(a.index[:len(alone.index), 0], alone.index[:, 0])
    for other in (plan(p, [2], m, 5), plan(replace(p, seed=1), [2], m, 4)):
        assert not torch.equal(other.index, alone.index)


def test_bytes_are_the_formula():
    p = problem()
    d, tri = p.dim, sum(n*(n + 1)//2 for _, n in p.shapes.values())
    for cls in ALL:
        r = list(fit(cls(epochs=1), p, 2, start(p)))[-1]
        up = d + (tri if cls is NetFedPM else d if cls is NetScaffold else 0)
        down = 2*d if cls is NetScaffold else d
        assert (r.up, r.down) == (2*4*8*up, 2*4*8*down), cls.__name__


def test_history_of_a_run():
    p = problem()
    m = NetFedPM(lr=0.1, epochs=2)
    h = follow(m, p, 3, p.x, p.y, absent={1: [2]})
    assert h["round"].tolist() == [0, 1, 2, 3] and (h["seconds"].diff() > 0).all()
    assert h["gradients"].tolist() == [0, 2*82, 2*82 + 2*42, 4*82 + 2*42]
    assert h["loss"][3] < h["loss"][0] and not h.error


@pytest.mark.parametrize("cls", [NetFedAvg, NetFedPM], ids=name)
def test_divergence_names_client_and_layer(cls):
    p = problem()
    h = follow(cls(lr=1e200), p, 2, p.x, p.y)
    assert "client" in h.error and "layer 'fc" in h.error and "lower lr" in h.error
    assert len(h.rows) == 1
    with pytest.raises(Diverged, match="not finite"): after(cls(lr=1e200), p, 2)


def test_mixing_names_the_bad_client():
    A = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    A[1] = -9*A[1]
    with pytest.raises(ValueError, match="layer 'fc2': client 1 .*not positive definite; raise the"):
        mix_changes(randn(3, 2, 3), A, lambda v: v.mean(0), "fc2")
    A[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="client 1 .*NaN"): mix_changes(randn(3, 2, 3), A, lambda v: v.mean(0))


def test_bad_input_is_refused():
    net, x, y = mlp(5, 3), randn(20, 5), torch.arange(20) % 3
    halves = list(torch.arange(20).split(10))
    bad = x.clone(); bad[13, 2] = np.inf
    for args, words in (((net, bad, y, halves), "client 1 holds NaN or infinity"),
                        ((net, x[:, :4], y, halves), r"samples of shape \(5,\)"),
                        ((net, x, y + 1, halves), r"client 0 has labels 1 to 3; the net has classes 0 to 2"),
                        ((net, x, y, [halves[0], torch.tensor([3, 20])]), "client 1 has sample 20 of 20"),
                        ((net, x, y, [halves[0], torch.tensor([], dtype=torch.long)]), "every client needs"),
                        ((net, x, y, []), "client")):
        with pytest.raises(ValueError, match=words): federate_net(*args)
    with pytest.raises(ValueError, match="stack=-1"): federate_net(net, x, y, halves, stack=-1)
    for bad in (dict(lr=0.), dict(epochs=0), dict(momentum=1.), dict(decay=0.), dict(batch=-1)):
        with pytest.raises(ValueError, match=f"argument {next(iter(bad))}="): NetFedAvg(**bad)
    with pytest.raises(ValueError, match="damping=0"): NetFedPM(damping=0.)


def test_norms_are_averaged():
    p = problem(net=SMALL)
    theta = start(p)
    m = NetFedPM(lr=0.1, epochs=2)
    local = train(p, m, theta, 0)
    have = views(after(m, p, 1, theta), p.shapes)
    for k in ("norm1", "norm2"):
        want = torch.tensordot(p.weights, views(local.theta, p.shapes)[k], 1)
        assert torch.allclose(have[k], want, atol=1e-12)
    assert set(local.A) == {"conv1", "conv2", "fc1"}


def test_fedpm_leads_on_the_digits():
    """The result that the study measures with care, as a check that training works at all."""
    pytest.importorskip("sklearn")
    x, y, x_test, y_test = picture_task("digits", flat=True)
    split = dirichlet_split(y, 10, 0.1, generator=torch.Generator().manual_seed(0))
    p = federate_net(mlp(64, 64, 32, 10), x, y, split)
    pm, simple = (follow(c(lr=0.1, inv_every=5), p, 3, x_test, y_test)["accuracy"][-1]
                  for c in (NetFedPM, NetLocalNewton))
    assert pm > 0.9 and pm > simple + 0.05


def test_bfloat16_forward_trains():
    p = problem(half=True)
    p = replace(p, x=p.x.float())
    theta = start(p).float()
    low, full = (after(NetFedPM(lr=0.1, epochs=1), q, 1, theta) for q in (p, replace(p, half=False)))
    assert low.dtype == torch.float32 and 0 < (low - full).norm() < 0.1*(full - theta).norm()
