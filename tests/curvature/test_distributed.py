"Two and four real processes (gloo) against one"

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature.blocks import pack
from yokolab.curvature.distributed import owners, solve_cost, world
from yokolab.curvature.optim import SecondOrder, method

D = torch.float64
NAMES = ("K-FAC exact", "K-FAC empirical", "E-KFAC", "FOOF", "Shampoo", "Diagonal NGD")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 7), nn.Tanh(),
                         nn.Linear(7, 3)).double()


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(16, 6, generator=g, dtype=D), torch.randint(3, (16,), generator=g)


def train(name, rank, ranks, steps=4, generic=None):
    x, y = data()
    x, y = x[rank::ranks], y[rank::ranks]
    m = net()
    model = nn.parallel.DistributedDataParallel(m) if ranks > 1 else m
    what = method(name, what="exact") if name == "E-KFAC" else method(name)
    if name == "Diagonal NGD": what = method(name, what="empirical")
    opt = SecondOrder(model, what, lr=.05, every=2, damping=1e-2)
    for _ in range(steps):
        opt.zero_grad()
        out = model(x)
        opt.backward(F.cross_entropy(out, y), out)
        opt.step()
    return torch.cat([p.detach().reshape(-1) for p in m.parameters()]), opt.report().counters


def partly(rank, ranks):
    "A layer that only rank 0 has used is left out by all"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x, use): return self.a(x) + (self.b(x) if use else 0)
    torch.manual_seed(0)
    m = Net()
    opt = SecondOrder(m, "K-FAC empirical")
    out = m(torch.randn(5, 4), rank == 0)
    opt.backward(out.square().mean())
    opt.step()
    return opt.report().counters


def in_process(rank, ranks):
    out = {name: train(name, rank, ranks) for name in NAMES}
    out["partly"] = partly(rank, ranks)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_ranks_equal_one_process(processes, name):
    alone, counters = train(name, 0, 1)
    for out in processes:
        torch.testing.assert_close(out[name][0], alone, atol=1e-6, rtol=1e-6)
        assert out[name][1]["solved"] == counters["solved"]


def test_bytes_are_those_of_packed_triangles(processes):
    sides = [(7, 8), (9, 7), (8, 3)]
    tri = lambda d: d * (d + 1) // 2
    reduced = sum(tri(a) + tri(b) for a, b in sides) + 8 * 4 + 7
    sent = [out["K-FAC exact"][1] for out in processes]
    for c in sent: assert c["bytes reduced"] == 2 * 8 * reduced
    shared = sum(tri(a) + tri(b) for a, b in sides) + 8 * 4
    assert sum(c.get("bytes shared", 0) for c in sent) == 2 * 8 * shared


def test_a_layer_used_on_one_rank_only_is_left_out(processes):
    for out in processes:
        assert out["partly"]["measured on some ranks only"] == 1 and out["partly"]["measured"] == 1


@given(costs=st.lists(st.floats(0, 1e9), max_size=30), ranks=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_every_layer_has_one_owner_and_loads_are_balanced(costs, ranks):
    own = owners(costs, ranks)
    assert len(own) == len(costs) and all(0 <= r < ranks for r in own)
    load = [sum(c for c, o in zip(costs, own, strict=True) if o == r) for r in range(ranks)]
    if costs: assert max(load) <= sum(costs) / ranks + max(costs) * 1.0001 + 1e-6


def test_costs_and_one_process():
    assert world() == (0, 1)
    assert solve_cost({"A": torch.zeros(4, 4), "D": torch.zeros(5)}) == 69
    assert pack(torch.zeros(5, 5)).numel() == 15
