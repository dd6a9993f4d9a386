"Schedules, fall-backs and what must never happen silently"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yokolab.curvature.core import gradient
from yokolab.curvature.engine import Preconditioner
from yokolab.curvature.optim import METHODS, SecondOrder, method
from yokolab.curvature.shapes import EIGEN, INPUT, KRON, Method, turned
from yokolab.curvature.solve import cholesky, damped

D = torch.float64
KFAC = Method("exact", "exact", KRON, cholesky)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
                         nn.Linear(32, 4)).double()


def data(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=g, dtype=D), torch.randint(4, (n,), generator=g)


def run(m, pre, x, y, scale=1.0):
    m.zero_grad()
    out = m(x)
    loss = F.cross_entropy(out, y)
    pre.backward(loss * scale, out)
    pre.precondition()
    return torch.cat([p.grad.reshape(-1) for p in m.parameters()])


@pytest.mark.parametrize("name", list(METHODS))
def test_large_damping_gives_the_gradient(name):
    "lambda P g -> g (two factors: the product of their dampings is lambda)"
    m, (x, y) = net(), data()
    lam = 1e9
    what = method(name, ema=0 if "Shampoo" in name else 1)
    if "Shampoo" in name:
        from yokolab.curvature.shapes import Options
        from yokolab.curvature.solve import newton_root, root
        kind = newton_root if "Newton" in name else root
        what = method(name, solve=kind(4), options=Options(vector=kind(2)))
    pre = Preconditioner(m, what, damping=lam, generator=torch.Generator().manual_seed(0))
    m.zero_grad()
    F.cross_entropy(m(x), y).backward()
    g = {n: p.grad.clone() for n, p in m.named_parameters()}
    m2 = net()
    pre = Preconditioner(m2, what, damping=lam, generator=torch.Generator().manual_seed(0))
    run(m2, pre, x, y)
    power = .5 if "Shampoo" in name else 1
    for n, p in m2.named_parameters():
        plain = name == "FOOF" and n.startswith("1.")
        torch.testing.assert_close(p.grad * (1 if plain else lam ** power), g[n], atol=1e-4,
                                   rtol=1e-3)


def test_statistics_are_due_by_the_schedule_and_hooks_vanish():
    m, (x, y) = net(), data()
    pre = Preconditioner(m, KFAC, every=3, solve_every=6, warmup=1)
    hooks, solved, measured = [], [], []
    for _ in range(13):
        hooks.append(sum(len(k._forward_hooks) for k in m.modules()))
        run(m, pre, x, y)
        solved.append(pre.counters["solved"])
        measured.append(pre.counters["measured"])
    assert [h > 0 for h in hooks] == [i % 3 == 0 for i in range(13)]
    assert measured[-1] == 5 * 3 and solved == [3] * 6 + [6] * 6 + [9]


def test_accumulated_micro_batches_equal_one_batch():
    x, y = data(8)
    grads = []
    for parts in (1, 2):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.LayerNorm(8),
                          nn.Linear(8, 4)).double()
        for what in ("exact", "empirical"):
            pre = Preconditioner(m, Method("m", what, KRON, cholesky), accumulate=parts)
            m.zero_grad()
            for u, v in zip(x.chunk(parts), y.chunk(parts), strict=True):
                out = m(u)
                pre.backward(F.cross_entropy(out, v) / parts, out)
            pre.precondition()
            grads.append(torch.cat([p.grad.reshape(-1) for p in m.parameters()]))
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[3])


def test_what_is_not_finite_is_dropped_and_counted():
    m, (x, y) = net(), data()
    m[1].eval()
    pre = Preconditioner(m, KFAC)
    first = run(m, pre, x, y)
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    run(m, pre, bad, y)
    assert pre.counters["measurements dropped"] == 3 and pre.counters["solved"] == 3
    torch.testing.assert_close(run(m, pre, x, y), first)


def test_singular_factors_keep_the_last_good_inverse():
    m, (x, y) = net(), data()
    pre = Preconditioner(m, KFAC)
    run(m, pre, x, y)
    old = pre.solved[pre.layers[2]]["A"]["dense"].clone()
    m[4].weight.grad = None
    with torch.no_grad():
        m[4].weight.fill_(0.); m[4].bias.fill_(0.)  # errors of earlier layers vanish
    m.zero_grad()
    run(m, pre, x, y)
    assert pre.report().fallbacks == {"0": 1} and pre.counters["fallbacks"] == 1
    assert not torch.equal(pre.solved[pre.layers[2]]["A"]["dense"], old)
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


def test_a_layer_that_never_could_be_solved_keeps_its_gradient():
    m, (x, y) = net(), data()
    with torch.no_grad(): m[4].weight.zero_()
    pre = Preconditioner(m, KFAC)
    m.zero_grad()
    F.cross_entropy(m(x), y).backward()
    pre.recorder.open.clear()
    g = m[0].weight.grad.clone()
    run(m, pre, x, y)
    assert torch.equal(m[0].weight.grad, g) and pre.counters["plain"] >= 1


def test_batch_of_one_unused_layer_and_frozen_parameter():
    m, (x, y) = net(), data(1)
    m.eval()
    unused = nn.Linear(3, 3).double()
    m.add_module("unused", nn.Identity())
    m.unused.extra = unused
    pre = Preconditioner(m, KFAC)
    loss = run(m, pre, x, y) if unused.weight.grad is not None else _loose(m, pre, x, y)
    assert torch.isfinite(loss).all()
    assert unused.weight.grad is None
    m[4].bias.requires_grad_(False)
    m[4].bias.grad = None
    _loose(m, pre, x, y)
    assert pre.counters["layers reset"] == 1
    A = pre.stats[next(k for k in pre.layers if k.name == "4")]["A"]
    assert A.shape == (32, 32)
    m[4].weight.requires_grad_(False)
    m[4].weight.grad = None
    _loose(m, pre, x, y)
    m.requires_grad_(False)
    m[0].weight.requires_grad_(True)
    _loose(m, pre, x, y)
    assert torch.isfinite(m[0].weight.grad).all()


def _loose(m, pre, x, y):
    m.zero_grad()
    out = m(x)
    pre.backward(F.cross_entropy(out, y), out)
    pre.precondition()
    return torch.cat([p.grad.reshape(-1) for p in m.parameters() if p.grad is not None])


def test_half_precision_layers_have_single_precision_statistics():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 8).to(torch.bfloat16), nn.Tanh())
    head = nn.Linear(8, 3)
    x, y = torch.randn(16, 6, dtype=torch.bfloat16), torch.randint(3, (16,))
    model = nn.ModuleDict({"body": m, "head": head})
    pre = Preconditioner(model, KFAC)
    out = head(m(x).float())
    pre.backward(F.cross_entropy(out, y), out)
    pre.precondition()
    assert {t.dtype for s in pre.stats.values() for t in s.values()} == {torch.float32}
    assert m[0].weight.grad.dtype == torch.bfloat16 and torch.isfinite(m[0].weight.grad).all()


def test_grafting_keeps_each_layers_norm():
    m, (x, y) = net(), data()
    pre = Preconditioner(m, KFAC, graft="sgd")
    m.zero_grad()
    F.cross_entropy(m(x), y).backward()
    pre.recorder.open.clear()
    norms = {k.name: float(gradient(k).norm()) for k in pre.layers}
    run(m, pre, x, y)
    for k in pre.layers: assert float(gradient(k).norm()) == pytest.approx(norms[k.name])


def test_memory_is_the_formula():
    m = nn.Sequential(nn.Linear(30, 40, bias=False), nn.Tanh(), nn.Linear(40, 20, bias=False))
    for name, formula in (("K-FAC", 2 * (30**2 + 40**2 + 40**2 + 20**2)),
                          ("FOOF", 2 * (30**2 + 40**2)),
                          ("Shampoo", 2 * (30**2 + 40**2 + 40**2 + 20**2)),
                          ("E-KFAC", 2 * (30**2 + 40**2 + 40**2 + 20**2) + 2 * 2000)):
        pre = Preconditioner(m, method(name))
        m.zero_grad()
        out = m(torch.randn(64, 30))
        pre.backward(F.cross_entropy(out, torch.randint(20, (64,))), out)
        pre.precondition()
        assert pre.report().numbers <= 1.1 * formula, name


def test_weight_sharing_over_tokens_uses_tokens_as_loss_terms():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    x, y = torch.randint(7, (3, 5)), torch.randint(7, (3, 5))
    pre = Preconditioner(m, Method("m", "empirical", KRON, cholesky))
    out = m(x).flatten(0, 1)
    pre.backward(F.cross_entropy(out, y.flatten()), out)
    emb, lin = (pre.pending[k] for k in pre.layers)
    assert lin["A"][1] == lin["B"][1] == 15
    p = out.detach().softmax(1)
    b = p - F.one_hot(y.flatten(), 7)
    torch.testing.assert_close(lin["B"][0], b.t() @ b)
    torch.testing.assert_close(emb["A"][0].sum() / emb["A"][1], torch.tensor(1., dtype=D))


def test_sampling_many_labels_approaches_the_exact_fisher():
    m, (x, y) = net(), data()
    m.eval()
    B = []
    for what, n in (("exact", 1), ("mc", 3000)):
        pre = Preconditioner(m, Method("m", what, KRON, cholesky), samples=n,
                             generator=torch.Generator().manual_seed(0))
        out = m(x)
        pre.backward(F.cross_entropy(out, y), out)
        B.append(pre.pending[pre.layers[-1]]["B"][0])
    torch.testing.assert_close(B[0], B[1], atol=.1, rtol=.05)


def test_swift_kfac_equals_kfac():
    x, y = data()
    grads = []
    for name in ("K-FAC", "Swift K-FAC"):
        m = net()
        pre = Preconditioner(m, method(name, ema=1.0), generator=torch.Generator().manual_seed(0))
        grads.append(run(m, pre, x, y))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


def test_reported_layers_and_arguments():
    m = net()
    m.append(nn.PReLU().double())
    assert "5" in Preconditioner(m, KFAC).report().plain
    assert "1" in Preconditioner(m, method("FOOF")).report().plain
    assert "<table>" in Preconditioner(m, KFAC).report()._repr_html_()
    for bad in (dict(damping=0), dict(damping=-1.), dict(every=0), dict(graft="adam"),
                dict(accumulate=0), dict(loss="x")):
        with pytest.raises(ValueError, match=f"argument {next(iter(bad))}="):
            Preconditioner(m, KFAC, **bad)
    with pytest.raises(ValueError, match="has no layer"): Preconditioner(nn.ReLU(), KFAC)
    with pytest.raises(ValueError, match="argument output=None"):
        Preconditioner(m, KFAC).backward(torch.zeros((), requires_grad=True))


def test_in_place_damping_never_reaches_the_statistics():
    m, (x, y) = net(), data()
    pre = Preconditioner(m, Method("i", "inputs", INPUT, cholesky, norm=None), damping=10.)
    for _ in range(3):
        run(m, pre, x, y)
        k = pre.layers[-1]
        torch.testing.assert_close(pre.solved[k]["A"]["dense"],
                                   torch.linalg.inv(damped(pre.stats[k]["A"], 10.)))


def test_optimizer_uses_the_engine():
    m = net()
    assert SecondOrder(m, "K-FAC").report().layers == {"0": "kron", "1": "unit", "4": "kron"}


def test_eigenbasis_average_follows_the_basis():
    "The running scale is the diagonal of the averaged matrix in the basis of now, not of then"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    pre = Preconditioner(m, Method("E", "exact", EIGEN, ema=.75), 1e-2)
    k, want = pre.layers[0], None
    for t in range(3):
        x = torch.randn(30, 4, dtype=D) * torch.tensor([1., .5, .2, .1], dtype=D).roll(t)
        m.zero_grad()
        out = m(x)
        pre.backward(F.cross_entropy(out, torch.arange(30) % 3), out)
        old, held = pre.solved.get(k), list(pre.held[k])
        pre.precondition()
        new = pre.solved[k]
        s, n = EIGEN.refine(held, new)
        U = torch.kron(new["B"]["basis"], new["A"]["basis"])
        if old is not None:
            V = torch.kron(old["B"]["basis"], old["A"]["basis"])
            before = V @ want.reshape(-1).diag() @ V.t()
            carried = (U.t() @ before @ U).diag().view_as(want)
            torch.testing.assert_close(turned(old, new), carried)
            assert (carried - want).norm() > .1 * want.norm()          # the basis did turn
            want = .25 * carried + .75 * s / n
        else: want = s / n
        torch.testing.assert_close(new["S"]["value"], want)
