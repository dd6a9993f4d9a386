"""Rounds, drop-outs, bytes, histories."""
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.core import (
    STYLES,
    Diverged,
    Ledger,
    Method,
    fit,
    grid,
    nbytes,
    pack,
    trace,
    tune,
    unpack,
)
from yokolab.federated.first_order import PSGD, SCAFFOLD, FedAdam, FedAvg, FedAvgM, FedProx
from yokolab.federated.fedpm import FedPM
from yokolab.federated.local_newton import LTDA, FedSophia, LocalNewton
from yokolab.federated.logistic import federate, random_quadratic
from yokolab.federated.second_order import FedNew, FedNL, FedNS, Newton

fast = settings(max_examples=20, deadline=None)
EVERY = [PSGD(), FedAvg(), FedProx(), FedAvgM(), FedAdam(), SCAFFOLD(), Newton(), FedNL(),
         FedNL("rank", 2, option=2), FedNL("top", 4), FedNL("random", 4), FedNew(), FedNS(4),
         LocalNewton(2), LocalNewton(2, search=True), LTDA(2), FedSophia(2), FedPM(), FedPM(3, 0.5)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(clients=5, dim=4):
    "A logistic federation with clients of different sizes"
    g = seeded(7)
    X = torch.randn(12*clients, dim, generator=g, dtype=torch.float64)
    y = (torch.rand(12*clients, generator=g) < 0.5).long()
    split = torch.randperm(12*clients, generator=g).tensor_split(
        torch.linspace(8, 12*clients - 10, clients - 1).long())
    return federate(X, y, split, lam=0.1)


def run(method, problem, rounds, seed=0, **options):
    return list(fit(method, problem, rounds, generator=seeded(seed), **options))


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_every_method_runs_and_repeats_with_the_seed(method):
    problem = small()
    one, two = run(method, problem, 4), run(method, problem, 4)
    assert all(torch.equal(a.theta, b.theta) for a, b in zip(one, two))
    assert one[-1].theta.shape == (4,) and torch.isfinite(one[-1].theta).all()
    assert [r.round for r in one] == [0, 1, 2, 3, 4] and one[-1].evaluations == 4*method.steps
    assert method.name in STYLES


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_every_method_survives_drop_outs(method):
    "A round over the clients that answer; nothing happens when nobody does"
    problem = small()
    records = run(method, problem, 6, participation=0.6, dropout=0.3, absent={2: range(5)})
    assert torch.equal(records[3].theta, records[2].theta) and len(records[3].answered) == 0
    assert records[3].up == records[2].up and records[3].down > records[2].down
    assert all(len(r.answered) <= 3 for r in records[1:])
    assert torch.isfinite(records[-1].theta).all()


@pytest.mark.parametrize("method", [m for m in EVERY if not isinstance(m, (FedNS, FedSophia))
                                    and not (isinstance(m, FedNL) and m.kind == "random")], ids=repr)
def test_a_round_does_not_depend_on_the_order_of_clients(method):
    problem = small()
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = type(problem)(problem.x[order], problem.s[order], problem.weights[order], problem.lam)
    a, b = run(method, problem, 5)[-1].theta, run(method, turned, 5)[-1].theta
    assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [PSGD(), FedAvg(), Newton(), LocalNewton(), FedPM(2), FedAvgM()],
                         ids=repr)
def test_a_round_without_a_client_is_the_round_of_the_others(method):
    "For methods without client states: weights renormalised over those that answer"
    problem = small()
    rest = torch.tensor([0, 1, 3, 4])
    part = problem.take(rest)
    part = type(part)(part.x, part.s, part.weights/part.weights.sum(), part.lam)
    gone = run(method, problem, 3, absent=dict.fromkeys(range(3), (2,)))
    assert torch.allclose(gone[-1].theta, run(method, part, 3)[-1].theta, rtol=1e-12)
    assert gone[-1].answered.tolist() == rest.tolist()


class Spy(SCAFFOLD):
    "SCAFFOLD that keeps what it saw"
    log = []

    def client(self, problem, message, state, round):
        upload, new = super().client(problem, message, state, round)
        self.log.append((round.clients, message["c"], state["c"], new["c"]))
        return upload, new


def test_states_of_absent_clients_stay():
    Spy.log.clear()
    problem = small()
    run(Spy(), problem, 8, dropout=0.4)
    own = torch.zeros(5, 4, dtype=torch.float64)
    for clients, server, before, after in Spy.log:
        assert torch.equal(before, own[clients])                    # untouched since last seen
        assert torch.allclose(server, problem.weights @ own, atol=1e-14)  # c = sum p_i c_i
        own[clients] = after
    assert len({len(c) for c, *_ in Spy.log}) > 1


@fast
@given(st.integers(1, 6), st.integers(0, 99))
def test_pack_is_the_lower_triangle(dim, seed):
    P = torch.randn(3, dim, dim, generator=seeded(seed))
    P = P + P.mT
    assert pack(P).shape == (3, dim*(dim + 1)//2)
    assert torch.equal(unpack(pack(P)), P)


D, N = 4, 5
SENT = [(PSGD(), D, D), (FedAvg(), D, D), (FedProx(), D, D), (FedAvgM(), D, D), (FedAdam(), D, D),
        (SCAFFOLD(), 2*D, 2*D), (Newton(), D, D*(D + 1)/2 + D), (FedNL(), D, D*(D + 1)/2 + D),
        (FedNL("rank", 2), D, 2*(D + 1) + D), (FedNL("top", 3), D, 1.5*3 + D),
        (FedNL("random", 3, option=2), D, 1.5*3 + D + 1), (FedNew(), 2*D, D), (FedNS(3), D, 4*D),
        (LocalNewton(3), D, D), (LTDA(), D, D), (FedSophia(), D, D),
        (FedPM(), D, D*(D + 1)/2 + D), (FedPM(4), D, D*(D + 1)/2 + D)]


@pytest.mark.parametrize("method, down, up", SENT, ids=[repr(m) for m, *_ in SENT])
def test_bytes_are_those_of_the_tensors_sent(method, down, up):
    start, *rounds = run(method, small(), 3, absent={1: (0, 3)})
    assert start.up == (N*D*(D + 1)/2*8 if isinstance(method, FedNL) else 0) and start.down == 0
    ups = [b.up - a.up for a, b in zip([start, *rounds], rounds)]
    downs = [b.down - a.down for a, b in zip([start, *rounds], rounds)]
    assert ups == [N*up*8, (N - 2)*up*8, N*up*8]
    assert downs == [N*down*8]*3                       # absent clients were sent the message too


def test_ledger_counts_nested_messages():
    message = {"a": torch.zeros(3, 2), "b": [torch.zeros(4).double(), (torch.zeros(1).int(),)]}
    assert nbytes(message) == 24 + 32 + 4
    ledger = Ledger()
    for _ in range(2):
        ledger.open()
        ledger.send(message, 3)
        ledger.receive(message)
    assert ledger.down == [180, 180] and ledger.total == (360, 120)
    with pytest.raises(TypeError, match="only tensors travel"):
        nbytes({"a": 3.0})


@dataclass(frozen=True)
class Boom(FedAvg):
    "One client sends NaN in the third round"
    name = "FedAvg"

    def client(self, problem, message, state, round):
        upload, state = super().client(problem, message, state, round)
        if round.index == 2: upload["theta"][round.clients == 3] = math.nan
        return upload, state


def test_divergence_names_client_and_round():
    with pytest.raises(Diverged, match="client 3 sent values that are not finite in round 3"):
        run(Boom(), small(), 5)
    history = trace(Boom(), small(), 5, {"norm": torch.linalg.norm})
    assert len(history.rows) == 3 and "client 3" in history.error
    clean = trace(FedAvg(), small(), 2, {"norm": torch.linalg.norm})
    assert clean.error == "" and list(clean.frame()["round"]) == [0, 1, 2]
    assert clean["norm"].dtype == torch.float64 and clean["norm"][0] == 0


def test_tune_takes_the_best_finite():
    trials = grid(FedAvg, steps=(1, 2), eta=(0.1, 0.2, 0.3))
    assert len(trials) == 6
    best, table = tune(trials, lambda m: math.nan if m.steps == 1 else abs(m.eta - 0.2))
    assert best == FedAvg(2, 0.2) and len(table) == 6
    with pytest.raises(ValueError, match="nothing to tune"):
        tune([], lambda m: 0.)


@pytest.mark.parametrize("call, message", [
    (lambda: FedAvg(steps=0), "steps=0: a client takes at least one local step"),
    (lambda: PSGD(eta=-1.), "eta=-1.0: a finite number, 0 or above"),
    (lambda: FedPM(damping=math.nan), "damping=nan"),
    (lambda: fit(PSGD(), small(), 1, torch.zeros(3)), r"theta of shape \(3,\): the problem has 4"),
    (lambda: fit(PSGD(), small(), 1, participation=0.), "participation=0.0"),
    (lambda: fit(PSGD(), small(), 1, dropout=1.2), "dropout=1.2"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_participation_asks_that_share():
    records = run(PSGD(), random_quadratic(20, 3, generator=seeded()), 30, participation=0.25)
    assert {len(r.answered) for r in records[1:]} == {5}
    assert torch.cat([r.answered for r in records[1:]]).unique().numel() > 15


def test_methods_refuse_to_be_abstract():
    with pytest.raises(NotImplementedError):
        run(Method(), small(), 1)
