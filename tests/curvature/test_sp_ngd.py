"SP-NGD: the refresh rule, the step against dense references, real processes against one, counts"
import copy
import tempfile
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature.mixup import RunningMixup, soft_cross_entropy, soft_labels
from yokolab.curvature.optim import method
from yokolab.curvature.shapes import BLOCK, DIAGONAL, EIGEN, UNIT
from yokolab.curvature.sp_ngd import SP_NGD, SPNGD, Refresh, StaleEngine, distance, rescale
from yokolab.curvature.sp_ngd_cost import resnet50, sizes, step_cost
from yokolab.curvature.sp_ngd_parallel import (
    ParallelSPNGD,
    all_gatherv,
    deal_units,
    from_wire,
    reduce_scatterv,
    to_wire,
    wire_size,
)
from yokolab.curvature.sp_ngd_training import LARS, Polynomial, random_erase

D = torch.float64


class Scale(nn.Module):
    "A parameter without known curvature"
    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.ones(3))

    def forward(self, x): return x * self.s


def net(norm=True):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4) if norm else nn.GroupNorm(2, 4)
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    head = nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3), Scale()
    return nn.Sequential(conv, bn, nn.Tanh(), nn.AvgPool2d(3), *head).double()


def data(n=32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 6, 6, generator=g, dtype=D), torch.randint(3, (n,), generator=g)


def flat(m): return torch.cat([p.detach().reshape(-1) for p in m.parameters()])


def train(kind, parts, norm=True, steps=9, accumulate=1, **options):
    "Each step sees the same share(s) of the batch; weights and counters"
    x, y = data()
    m = net(norm)
    opt = kind(m, lr=.02, damping=1e-2, norm_damping=2., accumulate=accumulate, **options)
    for _ in range(steps):
        opt.zero_grad()
        for i in parts: opt.backward(F.cross_entropy(m(x[i]), y[i]) / accumulate)
        opt.step()
    due = {f"{k.name}/{q}": r.next for (k, q), r in opt.engine.refresh.items()}
    return flat(m), opt.report().counters, due


# ------------------------------------------------------------------------------------ refresh

def test_constant_statistics_give_fibonacci_and_a_jump_halves():
    r, X = Refresh(), torch.randn(4, 4)
    assert [r.take(X, 10) for _ in range(6)] == [1, 2, 3, 5, 8, 13] and r.next == 23
    assert r.take(3 * X, 0) == 6 and r.take(9 * X, 0) == 3
    assert r.take(9 * X, 0) == 3          # near the last, far from the one before: kept
    assert r.take(9 * X, 0) == 6          # near both: sum of the last two intervals


@given(values=st.lists(st.floats(-9, 9), min_size=1, max_size=20),
       alpha=st.sampled_from([0., .1, .5]))
@settings(max_examples=40, deadline=None)
def test_refresh_follows_the_rule(values, alpha):
    r, gaps, xs = Refresh(alpha), [1, 1], []
    far = lambda a, b: (abs(a - b) / abs(b) if b else 0. if a == b else 1e99) >= alpha
    for v in values:
        if not xs: want = 1
        elif far(v, xs[-1]): want = max(1, gaps[-1] // 2)
        elif len(xs) > 1 and far(v, xs[-2]): want = gaps[-1]
        else: want = gaps[-1] + gaps[-2]
        assert r.take(torch.tensor([v], dtype=D), 0) == want
        gaps.append(want)
        xs.append(v)
        if alpha == 0: assert want == 1


def test_distance():
    z = torch.zeros(2)
    assert distance(z, z) == 0 and distance(z + 1, z) == float("inf")
    assert distance(torch.tensor([3., 4.]), torch.tensor([0., 4.])) == 0.75


# ----------------------------------------------------------------------- one step, by dense algebra

@pytest.mark.parametrize("soft", [False, True])
def test_step_equals_dense_reference(soft):
    x, y = data(6)
    m, r, kappa = net(), 1e-2, 2.
    target = soft_labels(y, 3, .1, D) if soft else y
    engine = StaleEngine(m, damping=lambda k: r * kappa if k.kind == "norm" else r)
    h = {}
    def keep(i): return lambda s, a, o: h.update({i: (a[0].detach(), o)})
    hooks = [m[i].register_forward_hook(keep(i))
             for i in (0, 1, 5, 7)]
    loss = F.cross_entropy(m(x), target)
    g = torch.autograd.grad(loss, [o for _, o in h.values()], retain_graph=True)
    g = dict(zip(h, g, strict=True))
    for k in hooks: k.remove()
    engine.backward(loss)
    before = {n: p.grad.clone() for n, p in m.named_parameters()}
    engine.precondition()
    n = 6
    for i in (0, 5, 7):
        a, b = h[i][0], g[i] * n
        if i == 0:
            a = F.unfold(a, 3, padding=1).transpose(1, 2).reshape(-1, 18)
            b, T = b.flatten(2).transpose(1, 2).reshape(-1, 4), 36
        else: a, T = torch.cat([a, torch.ones(n, 1, dtype=D)], 1), 1
        A, G = a.t() @ a / n, b.t() @ b / (n * T)
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** .5
        I, J = (torch.eye(len(M), dtype=D) for M in (A, G))
        A, G = A + pi * r**.5 * I, G + r**.5 / pi * J
        dW = before[f"{i}.weight"].reshape(len(G), -1)
        if i: dW = torch.cat([dW, before[f"{i}.bias"][:, None]], 1)
        want = torch.linalg.inv(G) @ dW @ torch.linalg.inv(A)
        have = m[i].weight.grad.reshape(len(G), -1)
        if i: have = torch.cat([have, m[i].bias.grad[:, None]], 1)
        torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-10)
    v, mu = h[1][0].var((0, 2, 3), unbiased=False), h[1][0].mean((0, 2, 3))
    hat = (h[1][0] - mu[:, None, None]) / (v + m[1].eps).sqrt()[:, None, None]
    J = torch.stack([(g[1] * n * hat).sum((2, 3)), (g[1] * n).sum((2, 3))], 2)
    U = torch.einsum("ncp,ncq->cpq", J, J) / n + r * kappa * torch.eye(2, dtype=D)
    want = torch.linalg.solve(U, torch.stack([before["1.weight"], before["1.bias"]], 1))
    torch.testing.assert_close(torch.stack([m[1].weight.grad, m[1].bias.grad], 1), want)
    assert torch.equal(m[8].s.grad, before["8.s"])


@given(a=st.floats(0, 9), b=st.floats(-3, 3), c=st.floats(0, 9), r=st.floats(1e-3, 1))
@settings(max_examples=30, deadline=None)
def test_unit_block_closed_form(a, b, c, r):
    b = max(min(b, (a * c) ** .5), -(a * c) ** .5)
    U = torch.tensor([[[a, b], [b, c]]], dtype=D)
    inv = UNIT.solve({"U": U}, None, r, None)["U"]["units"][0]
    M = torch.tensor([[a + r, b], [b, c + r]], dtype=D)
    torch.testing.assert_close(inv, torch.linalg.inv(M), rtol=1e-10, atol=1e-12)


def test_pi_split_is_invariant_to_the_factors_scale():
    G, out = torch.randn(4, 3, dtype=D), {}
    A, B = (S @ S.t() for S in (torch.randn(3, 3, dtype=D), torch.randn(4, 4, dtype=D)))
    engine = StaleEngine(nn.Linear(3, 4, bias=False).double(), damping=.3)
    (layer,) = engine.layers
    for t in (1., 50.):
        engine.stats, engine.solved = {layer: {"A": A * t, "B": B / t}}, {}
        engine._renew(layer)
        out[t] = engine.shape_of(layer).apply(G, engine.solved[layer])
    torch.testing.assert_close(out[1.], out[50.], rtol=1e-10, atol=1e-12)


def test_stale_factors_are_neither_measured_nor_inverted():
    x, y = data()
    m = net()
    engine = StaleEngine(m, damping=1e-2)
    seen = []
    for _ in range(12):
        hooks = sum(len(k._forward_hooks) for k in m.modules())
        due = sum(bool(engine.wanted(k)) for k in engine.layers)
        assert hooks == due
        m.zero_grad()
        engine.backward(F.cross_entropy(m(x), y))
        engine.precondition()
        seen.append(engine.counters["refreshed"])
    assert [b - a for a, b in pairwise([0, *seen])] == [7, 7, 0, 7, 0, 0, 7, 0, 0, 0, 0, 7]
    assert engine.counters["solved"] == engine.counters["refreshed"]
    assert engine.counters["statistics"] == 84


def test_no_threshold_equals_the_core():
    x, y = data()
    alone = train(SPNGD, [slice(None)], alpha=0., rescaling=False, momentum=0.)[0]
    from yokolab.curvature.engine import Preconditioner
    m = net()
    core = Preconditioner(m, SP_NGD, lambda k: 2e-2 if k.kind == "norm" else 1e-2)
    for _ in range(9):
        m.zero_grad()
        core.backward(F.cross_entropy(m(x), y))
        core.precondition()
        with torch.no_grad():
            for p in m.parameters(): p.sub_(.02 * p.grad)
    torch.testing.assert_close(alone, flat(m), rtol=1e-9, atol=1e-10)


def test_accumulated_micro_batches_equal_one_batch():
    one = train(SPNGD, [slice(None)], norm=False)
    four = train(SPNGD, [slice(k, k + 8) for k in range(0, 32, 8)], norm=False, accumulate=4)
    torch.testing.assert_close(one[0], four[0], rtol=1e-8, atol=1e-9)
    assert one[2] == four[2]


@pytest.mark.parametrize("change", [dict(what="mc"), dict(norm=BLOCK), dict(norm=DIAGONAL),
                                    dict(norm=None)])
def test_variants_train(change):
    g = torch.Generator().manual_seed(0)
    x, y = data()
    m = net()
    what = method("K-FAC", ema=1., **({"what": "empirical"} | change))
    opt = SPNGD(m, lr=.02, damping=1e-2, norm_damping=1., method=what, generator=g)
    first = float(F.cross_entropy(m(x), y).detach())
    for _ in range(25):
        opt.zero_grad()
        out = m(x)
        opt.backward(F.cross_entropy(out, y), out)
        opt.step()
    assert float(F.cross_entropy(m(x), y).detach()) < .7 * first
    assert ("1" in opt.report().plain) == (change.get("norm", 0) is None)


# ------------------------------------------------------------------------------ trouble

def test_bad_measurements_keep_the_last_good_inverse():
    x, y = data()
    m = net()
    engine = StaleEngine(m, damping=1e-2, alpha=0.)
    def step(x):
        m.zero_grad()
        engine.backward(F.cross_entropy(m(x), y))
        engine.precondition()
    step(x)
    old = {k: v["A"]["dense"].clone() for k, v in engine.solved.items() if "A" in v}
    step(x * float("nan"))
    assert engine.counters["measurements dropped"] == 7
    for k, v in old.items(): assert torch.equal(engine.solved[k]["A"]["dense"], v)
    step(x)
    assert engine.counters["refreshed"] == 14
    layer = engine.layers[0]
    engine.stats[layer]["A"] = -torch.eye(18, dtype=D)
    engine.fresh.add((layer, "A"))
    engine._renew(layer)
    assert engine.fallbacks["0"] == 1 and engine.counters["fallbacks"] == 1


def test_frozen_bias_and_batch_of_one():
    m = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    opt = SPNGD(m, damping=1e-2)
    def step(n):
        opt.zero_grad()
        opt.backward(F.cross_entropy(m(torch.randn(n, 3, dtype=D)), torch.arange(n) % 2))
        opt.step()
    step(1)
    m[0].bias.requires_grad_(False)
    kept = m[0].bias.clone()
    for _ in range(3): step(5)
    assert torch.equal(m[0].bias, kept) and opt.engine.counters["layers reset"] == 1
    assert torch.isfinite(flat(m)).all()


@pytest.mark.parametrize(("make", "word"), [
    (lambda m: SPNGD(m, damping=0.), "damping"), (lambda m: SPNGD(m, lr=-1.), "lr"),
    (lambda m: SPNGD(m, momentum=1.), "momentum"), (lambda m: SPNGD(m, alpha=-1.), "alpha"),
    (lambda m: SPNGD(m, method=method("K-FAC")), "method"),
    (lambda m: SPNGD(m, method=method("K-FAC", shape=EIGEN, ema=1.)), "method"),
    (lambda m: ParallelSPNGD(m, deal="fair"), "deal"), (lambda m: Polynomial(.1, end=0.), "end"),
    (lambda m: Polynomial(.1, coupling="x"), "coupling"),
    (lambda m: step_cost(resnet50(), 0), "workers"),
    (lambda m: step_cost(resnet50(), 1, refresh=2.), "refresh"),
    (lambda m: reduce_scatterv([]), "segments"),
    (lambda m: all_gatherv(torch.zeros(2), [3]), "sizes"),
    (lambda m: SPNGD(nn.Tanh(), params=[nn.Parameter(torch.ones(1))]), "model"),
])
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=f"argument {word}="): make(net())


def test_checkpoint_resumes_the_refreshes():
    x, y = data()
    def go(m, opt, n):
        for _ in range(n):
            opt.zero_grad()
            opt.backward(F.cross_entropy(m(x), y))
            opt.step()
    a = net()
    oa = SPNGD(a, lr=.02, damping=1e-2)
    go(a, oa, 5)
    b = copy.deepcopy(a)
    ob = SPNGD(b, lr=.02, damping=1e-2)
    with tempfile.TemporaryDirectory() as d:
        torch.save(oa.state_dict(), f"{d}/c.pt")
        ob.load_state_dict(torch.load(f"{d}/c.pt"))
    go(a, oa, 8)
    go(b, ob, 8)
    assert torch.equal(flat(a), flat(b)) and oa.report().counters == ob.report().counters
    with pytest.raises(ValueError, match="state_dict"):
        SPNGD(nn.Linear(2, 2)).load_state_dict(oa.state_dict())


# ----------------------------------------------------------------------- schedule and augmentation

@given(lr=st.floats(1e-3, 1), start=st.floats(0, 5), span=st.floats(1, 90), p=st.floats(.5, 11))
@settings(max_examples=30, deadline=None)
def test_polynomial(lr, start, span, p):
    s = Polynomial(lr, .9, start, start + span, p)
    rates = [s.rate(start + span * k / 20) for k in range(-5, 25)]
    assert s.rate(start) == lr and abs(s.rate(start + span)) < 1e-9
    assert all(a >= b for a, b in pairwise(rates))
    assert s.at(start)["momentum"] == pytest.approx(.9)
    e = start + span / 2
    assert s.at(e)["momentum"] == pytest.approx(.9 * s.rate(e) / lr)
    other = Polynomial(lr, .9, start, start + span, p, coupling="step")
    assert other.at(e, e - 1e-9)["momentum"] == pytest.approx(.9, rel=1e-4)
    assert other.at(start, start - .1)["momentum"] == .9       # constant rate: both agree


def test_rate_is_inside_the_velocity():
    m = Scale()
    m.l = nn.Linear(1, 1)
    opt = SPNGD(m, momentum=.5, rescaling=False)
    for lr in (.1, .01):
        opt.param_groups[0]["lr"] = lr
        m.s.grad = torch.ones(3)
        opt.step()
    torch.testing.assert_close(m.s.detach(), torch.full((3,), 1 - .1 - (.05 + .01)))


def test_rescaling_keeps_the_function_before_batch_norm_only():
    x, _ = data()
    m = net()
    with torch.no_grad():
        m[0].weight.mul_(50)
        m[5].weight.mul_(50)
    conv, fc = m[:2](x), m[:6](x)
    assert rescale(m[0].weight) < 1 and float(m[0].weight.detach().norm()) == pytest.approx(8**.5)
    torch.testing.assert_close(m[:2](x), conv, rtol=1e-3, atol=1e-3)
    rescale(m[5].weight)
    assert not torch.allclose(m[:6](x), fc, rtol=.1)
    w = torch.full((2, 2), 1e-3)
    assert rescale(w) == 1 and rescale(w, both=True) > 1
    assert float(w.norm()) == pytest.approx(2, rel=1e-3)


def test_erasing():
    x = torch.ones(600, 2, 24, 32)
    out = random_erase(x, generator=torch.Generator().manual_seed(0))
    hole = 1 - out
    part = hole[:, 0].mean((1, 2))
    assert torch.equal(out[:, 0], out[:, 1]) and float(x.min()) == 1
    assert .42 < float((part > 0).float().mean()) < .58 and float(part.max()) <= .27
    hit = hole[part > 0, 0]
    for h in hit[:50]:          # one full rectangle each
        assert float(h.sum()) == float(h.amax(0).sum() * h.amax(1).sum())
    assert torch.equal(random_erase(x, p=0.), x)
    wide = 1 - random_erase(torch.ones(60, 1, 100, 200), 1., (.1, .2), (.4, .6),
                            torch.Generator().manual_seed(1))[:, 0]
    for h in wide:                # the ratio of the sides is counted in pixels, either way round
        sides = sorted((float(h.amax(1).sum()), float(h.amax(0).sum())))
        assert .38 < sides[0] / sides[1] < .62 and .09 < float(h.mean()) < .21


def test_mixed_labels_give_the_fisher_of_the_soft_loss():
    x, y = data(8)
    mixed, g = RunningMixup(1.), torch.Generator().manual_seed(0)
    mixed(x, soft_labels(y, 3, dtype=D), g)
    b = mixed(x.flip(0), soft_labels(y, 3, dtype=D), g)
    m = nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=False)).double()
    engine = StaleEngine(m, damping=1.)
    out = m(b.x)
    engine.backward(soft_cross_entropy(out, b.y))
    engine.precondition()
    e = (out.softmax(1) - b.y).detach()
    torch.testing.assert_close(engine.stats[engine.layers[0]]["B"], e.t() @ e / 8)


def test_lars():
    p, v = nn.Parameter(torch.tensor([[3., 4.]])), nn.Parameter(torch.ones(2))
    p.grad, v.grad = torch.tensor([[0., 2.]]), torch.ones(2)
    LARS([p, v], lr=.5, trust=.1, weight_decay=.1).step()
    want = torch.tensor([[3., 4.]]) - .5 * .1 * 5 / (2 + .5) * torch.tensor([[.3, 2.4]])
    torch.testing.assert_close(p.detach(), want)
    torch.testing.assert_close(v.detach(), torch.full((2,), 1 - .5 * .1))     # the trust, no decay


# ---------------------------------------------------------------------------------- processes

CASES = {
    "whole batch": dict(norm=False), "batch norm": dict(norm=True),
    "round": dict(norm=True, deal="round"),
    "balanced": dict(norm=False, deal="balanced"), "fresh": dict(norm=True, alpha=0.),
    "bfloat16": dict(norm=False, wire=torch.bfloat16, alpha=0.),
    "float16": dict(norm=False, wire=torch.float16, alpha=0.),
}


def share(rank, ranks): return slice(rank * 32 // ranks, (rank + 1) * 32 // ranks)


def unused(rank):
    "A layer that only rank 0 uses, and one that nobody uses"
    m = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    opt = ParallelSPNGD(m, momentum=.5)
    for _ in range(3):
        opt.zero_grad()
        x = torch.randn(5, 3)
        out = m[0](x) + (m[1](x) if rank == 0 else 0)
        opt.backward(F.cross_entropy(out, torch.arange(5) % 3))
        opt.step()
    return flat(m), sum(len(v) for v in opt.engine.stats.values())


def in_process(rank, ranks):
    out = {k: train(ParallelSPNGD, [share(rank, ranks)], **v) for k, v in CASES.items()}
    with pytest.raises(ValueError, match="ParallelSPNGD"): SPNGD(net())
    with pytest.raises(ValueError, match="wrapped"):
        ParallelSPNGD(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    v = [torch.arange(r + 1.) + rank for r in range(ranks)]
    out["scatter"] = reduce_scatterv(v)
    out["gather"] = all_gatherv(torch.full((rank,), float(rank)), list(range(ranks)))
    torch.manual_seed(0)
    out["unused"] = unused(rank)
    return out


@pytest.mark.parametrize("case", ["whole batch", "batch norm", "round", "balanced", "fresh"])
def test_ranks_equal_one_process(processes, case):
    P, options = len(processes), {k: v for k, v in CASES[case].items() if k != "deal"}
    parts = [share(r, P) for r in range(P)]
    if case == "whole batch": alone = train(SPNGD, [slice(None)], **options)
    else: alone = train(SPNGD, parts, accumulate=P, **options)
    for out in processes:
        torch.testing.assert_close(out[case][0], alone[0], atol=1e-6, rtol=1e-6)
        assert torch.equal(out[case][0], processes[0][case][0]) and out[case][2] == alone[2]
    for c in ("refreshed", "solved", "statistics", "multiply-adds, inverses"):
        assert sum(out[case][1].get(c, 0) for out in processes) == alone[1][c]


def test_counted_cost_is_that_of_the_runs(processes):
    P, steps = len(processes), 9
    for case in ("fresh", "round"):
        kinds = sizes(net(), data()[0])
        deal = CASES[case].get("deal", "split")
        phi = sum(o[case][1].get("refreshed", 0) for o in processes) / sum(
            o[case][1].get("statistics", 0) for o in processes)
        cost = step_cost(kinds, P, 32 // P, phi, deal, width=8)
        for r, out in enumerate(processes):
            c = out[case][1]
            assert c["bytes, gradients"] == steps * cost.gradients[r]
            assert c["bytes, weights"] == steps * cost.weights[r]
            if case == "fresh":
                assert c["bytes, statistics"] == steps * cost.packed[r]
                assert c.get("multiply-adds, inverses", 0) == steps * cost.inverses[r]
                assert c["multiply-adds, statistics"] == steps * cost.statistics
            else:
                every = step_cost(kinds, P, 8, 1., deal, 8).packed[r]
                assert c["bytes, statistics"] < steps * every


@pytest.mark.parametrize(("case", "tol"), [("bfloat16", 5e-3), ("float16", 1e-3)])
def test_half_precision_on_the_network(processes, case, tol):
    alone = train(SPNGD, [slice(None)], norm=False, alpha=0.)[0]
    for out in processes:
        torch.testing.assert_close(out[case][0], alone, atol=tol, rtol=tol)
        assert out[case][1]["bytes, statistics"] * 4 == out["fresh"][1]["bytes, statistics"]


def test_exchanges_and_unused_layers(processes):
    P = len(processes)
    for r, out in enumerate(processes):
        total, sent = out["scatter"]
        assert torch.equal(total, P * torch.arange(r + 1.) + P * (P - 1) / 2)
        assert sent == 4 * (P * (P + 1) // 2 - r - 1)
        got, sent = out["gather"]
        assert all(torch.equal(v, torch.full((k,), float(k))) for k, v in enumerate(got))
        assert sent == 4 * (P - 1) * r
        assert torch.equal(out["unused"][0], processes[0]["unused"][0])
    assert sum(out["unused"][1] for out in processes) == 4          # A and B of two layers
    torch.manual_seed(0)
    start = flat(nn.ModuleList(nn.Linear(3, 3) for _ in range(3)))
    moved = (processes[0]["unused"][0] != start).view(3, 12).any(1)
    assert moved.tolist() == [True, True, False]


@given(n=st.integers(1, 40), ranks=st.integers(1, 50),
       deal=st.sampled_from(["split", "round", "balanced"]))
@settings(max_examples=30, deadline=None)
def test_every_unit_has_one_owner(n, ranks, deal):
    own = deal_units([float(k) for k in range(n)], ranks, deal)
    assert len(own) == n and all(0 <= r < ranks for r in own)
    if deal != "balanced": assert max(map(own.count, range(ranks))) == -(-n // ranks)
    if deal == "split": assert own == sorted(own)


@given(d=st.integers(1, 12), key=st.sampled_from("ABFUD"))
@settings(max_examples=30, deadline=None)
def test_triangles_are_exact(d, key):
    X = torch.randn(d, 2, 2) if key == "U" else torch.randn(d, d)
    if key != "D": X = X + X.mT
    v = to_wire(key, X)
    assert torch.equal(from_wire(key, v, tuple(X.shape)), X)
    want = {"U": 3 * d, "D": d * d}.get(key, d * (d + 1) // 2)
    assert v.numel() == wire_size(key, tuple(X.shape)) == want


def test_resnet50_counts():
    R = resnet50()
    norms, rest = ([k for k in R if (k.kind == "norm") == t] for t in (True, False))
    assert (len(R), len(norms)) == (107, 53)
    assert round(sum(k.dense for k in rest) / 1e6, 1) == 153.9
    assert round(sum(sum(k.packed()) for k in rest) / 1e6, 1) == 77.0
    assert round(sum(k.dense for k in norms) / 1e6, 1) == 112.8
    assert round(sum(sum(k.packed()) for k in norms) / 1e6, 3) == .080


def test_overhead_falls_until_each_layer_has_a_worker():
    cost = [step_cost(resnet50(), P).overhead for P in (1, 2, 8, 32, 107, 1024)]
    assert all(a > b for a, b in pairwise(cost[:-1])) and cost[-1] == cost[-2]
    a, b = step_cost(resnet50(), 64), step_cost(resnet50(), 64, refresh=.1)
    assert b.packed.sum() == pytest.approx(.1 * a.packed.sum())
    assert a.sgd_bytes == b.sgd_bytes < b.bytes
