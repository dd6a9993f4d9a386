"""Federations of real processes: equal to one process, counted, and alive when ranks die."""
import pytest
import torch
import torch.distributed as dist

from yokolab.federated.clients import federate_net
from yokolab.federated.core import Diverged, fit
from yokolab.federated.fedpm import FedPM
from yokolab.federated.fedpm_networks import NetFedAvg, NetFedPM, NetScaffold
from yokolab.federated.first_order import SCAFFOLD
from yokolab.federated.logistic import federate
from yokolab.federated.networks import cnn, flatten
from yokolab.federated.processes import fit_processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def nets():
    """Six clients of a small convolutional net with norms, and the start."""
    net = cnn((1, 6, 6), 3, channels=(2, 3), hidden=(), kernel=3, padding=1, groups=1)
    y = torch.arange(90) % 3
    split = torch.randperm(90, generator=torch.Generator().manual_seed(2)).split([9, 21, 15, 12, 8, 25])
    p = federate_net(net, randn(90, 1, 6, 6), y, split)
    return p, flatten(net.init(0, dtype=torch.float64))


@pytest.fixture(scope="module")
def convex():
    """Six clients of a logistic regression, and the start."""
    X = randn(90, 5)
    y = (X[:, 0] + 0.3*randn(90, seed=1) > 0).long()
    return federate(X, y, list(torch.arange(90).split(15)), lam=1e-2), torch.zeros(5).double()


METHODS = {
    "flat FedPM": ("convex", FedPM(steps=1), "gather"),
    "flat FedPM, K=3": ("convex", FedPM(steps=3, eta=0.3), "gather"),
    "flat SCAFFOLD": ("convex", SCAFFOLD(steps=2), "sum"),
    "net FedPM": ("nets", NetFedPM(lr=0.1, epochs=2, batch=8), "gather"),
    "net FedPM, sum": ("nets", NetFedPM(lr=0.1, epochs=2, batch=8), "sum"),
    "net SCAFFOLD": ("nets", NetScaffold(lr=0.1, epochs=2, batch=8), "sum"),
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_processes_equal_one_process(name, world, request):
    """Also with drop-outs, and when a rank has no client that answers in a round."""
    kind, method, exchange = METHODS[name]
    p, theta = request.getfixturevalue(kind)
    absent = {0: [1, 5], 2: [0, 2, 4], 3: [0, 1, 2, 3, 4, 5]}      # rank 1 of 4 idle at once, ...
    want = list(fit(method, p, 5, theta, absent=absent))
    have = list(fit_processes(method, p, 5, theta, world, exchange, absent=absent))
    assert [r.round for r in have] == list(range(6))
    for a, b in zip(have, want, strict=True):
        assert (a.theta - b.theta).abs().max() < 1e-6                # what is asked
        assert (a.theta - b.theta).abs().max() < 1e-12*(1 + b.theta.abs().max())   # what is had
        assert torch.equal(a.answered, b.answered) and a.evaluations == b.evaluations
        assert (a.down, a.up) == (b.down, b.up)


def test_random_participation_is_the_same(nets):
    p, theta = nets
    m = NetFedAvg(lr=0.1, epochs=1)
    g = torch.Generator().manual_seed(7)
    want = list(fit(m, p, 4, theta, participation=0.5, dropout=0.3, generator=g))
    have = list(fit_processes(m, p, 4, theta, 2, participation=0.5, dropout=0.3, seed=7))
    assert len({tuple(r.answered.tolist()) for r in want[1:]}) > 1
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a.answered, b.answered) and (a.theta - b.theta).abs().max() < 1e-12


@pytest.mark.parametrize("exchange", ["gather", "sum"])
def test_traffic_is_the_formula(nets, exchange):
    p, theta = nets
    r = list(fit_processes(NetFedPM(epochs=1), p, 3, theta, 2, exchange))[-1]
    layers = [p.shapes[k] for k in p.net.preconditioned()]
    if exchange == "gather": numbers = 3*(p.dim + sum(n*(n + 1)//2 for _, n in layers))   # 3 clients
    else: numbers = p.dim + sum(o*n + n*n for o, n in layers)
    assert r.traffic == 3*(4*(6 + 1) + 8*numbers)


@pytest.mark.parametrize("exchange", ["gather", "sum"])
@pytest.mark.parametrize("world, victim", [(2, 1), (4, 0), (4, 2)])
def test_a_killed_rank_takes_its_clients_only(nets, world, victim, exchange):
    p, theta = nets
    m, lost = NetFedPM(lr=0.1, epochs=1, batch=8), list(range(victim, 6, world))
    want = list(fit(m, p, 4, theta, absent=dict.fromkeys((2, 3), lost)))
    have = list(fit_processes(m, p, 4, theta, world, exchange, drill={2: (victim, "die")}, timeout=20.))
    left = tuple(r for r in range(world) if r != victim)
    assert have[-1].ranks == left and [r.round for r in have] == [0, 1, 2, 3, 4]
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a.answered, b.answered)
        assert (a.theta - b.theta).abs().max() < 1e-12


def test_states_survive_a_killed_rank(nets):
    """SCAFFOLD's control variates of the others go on as if the lost clients were absent."""
    p, theta = nets
    m = NetScaffold(lr=0.1, epochs=1, batch=8)
    want = list(fit(m, p, 4, theta, absent=dict.fromkeys((1, 2, 3), [1, 3, 5])))
    have = list(fit_processes(m, p, 4, theta, 2, "sum", drill={1: (1, "die")}))
    assert (have[-1].theta - want[-1].theta).abs().max() < 1e-12


def test_late_clients_do_not_answer_in_their_round(nets):
    p, theta = nets
    m = NetFedPM(lr=0.1, epochs=1, batch=8)
    want = list(fit(m, p, 3, theta, absent={1: [0, 2, 4]}))
    have = list(fit_processes(m, p, 3, theta, 2, deadline=2., drill={1: (0, 3.)}))
    assert have[2].answered.tolist() == [1, 3, 5] and have[-1].ranks == (0, 1)
    assert (have[-1].theta - want[-1].theta).abs().max() < 1e-12


def test_a_silent_rank_is_given_up(nets):
    """Neither dead nor answering within the timeout: the others go on."""
    p, theta = nets
    have = list(fit_processes(NetFedAvg(epochs=1), p, 3, theta, 2, timeout=1.5, drill={1: (1, 60.)}))
    assert have[-1].ranks == (0,) and have[-1].answered.tolist() == [0, 2, 4]


def test_an_error_in_a_rank_arrives(nets):
    p, theta = nets
    with pytest.raises(Diverged, match="layer '.*not finite"):
        list(fit_processes(NetFedAvg(lr=1e200, epochs=1), p, 3, theta, 2))


def test_when_all_die_it_is_said(nets):
    p, theta = nets
    with pytest.raises(RuntimeError, match="all 1 ranks died"):
        list(fit_processes(NetFedAvg(epochs=1), p, 3, theta, 1, drill={0: (0, "die")}))


def test_sum_is_refused_where_single_clients_are_needed(convex):
    p, theta = convex
    with pytest.raises(ValueError, match="pass exchange='gather'"):
        list(fit_processes(FedPM(), p, 2, theta, 2, "sum"))


@pytest.mark.parametrize("bad, words", [(dict(world=0), "argument world=0"), (dict(world=7), "the 6 clients"),
                                        (dict(exchange="mail"), "exchange='mail'")])
def test_bad_arguments(nets, bad, words):
    p, theta = nets
    with pytest.raises(ValueError, match=words): fit_processes(NetFedAvg(), p, 1, theta, **bad)


def test_stopping_early_leaves_no_process(nets):
    import multiprocessing
    p, theta = nets
    run = fit_processes(NetFedAvg(epochs=1), p, 50, theta, 2)
    next(run); next(run)
    assert len(multiprocessing.active_children()) == 2
    run.close()
    assert not multiprocessing.active_children()
