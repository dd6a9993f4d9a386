"The optimizer interface: groups, schedulers, clipping, mixed precision, checkpoints"
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yokolab.curvature.optim import METHODS, SecondOrder, method


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 3))


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(1))


def step(m, opt, n=1):
    for _ in range(n):
        opt.zero_grad()
        out = m(X)
        loss = F.cross_entropy(out, Y)
        opt.backward(loss, out)
        opt.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_lowers_the_loss_and_is_deterministic(name):
    ends = []
    for _ in range(2):
        m = net()
        opt = SecondOrder(m, name, lr=.02, damping=1e-2, generator=torch.Generator().manual_seed(0))
        first = step(m, opt)
        ends.append(step(m, opt, 20))
    assert ends[0] < first and ends[0] == ends[1] and not opt.report().fallbacks


def test_momentum_and_decay_are_those_of_sgd():
    for wd in (0., .1):
        a, b = net(), net()
        one = SecondOrder(a, "K-FAC exact", lr=.05, momentum=.9, weight_decay=wd, every=10**6)
        one.engine.layers.clear()  # nothing is preconditioned
        two = torch.optim.SGD(b.parameters(), .05, momentum=.9, weight_decay=wd)
        for _ in range(4):
            step(a, one)
            two.zero_grad()
            F.cross_entropy(b(X), Y).backward()
            two.step()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    m = net()
    opt = SecondOrder(m, "FOOF", lr=.1, weight_decay=.5, decoupled=True, momentum=0)
    w = m[0].weight.detach().clone()
    opt.zero_grad()
    loss = F.cross_entropy(m(X), Y)
    opt.backward(loss)
    opt.step()
    torch.testing.assert_close(m[0].weight.detach(), w * .95 - .1 * m[0].weight.grad)


def test_groups_schedulers_and_clipping():
    m = net()
    groups = [dict(params=m[0].parameters(), damping=10., lr=.0),
              dict(params=[*m[2].parameters(), *m[3].parameters()])]
    opt = SecondOrder(m, "FOOF", lr=.1, params=groups, clip=1e-3, momentum=0)
    sched = torch.optim.lr_scheduler.StepLR(opt, 1, .1)
    before = [p.detach().clone() for p in m.parameters()]
    step(m, opt)
    sched.step()
    assert torch.equal(m[0].weight, before[0]) and opt.param_groups[1]["lr"] == pytest.approx(.01)
    moved = torch.cat([(p - q).reshape(-1)
                       for p, q in zip(m.parameters(), before, strict=True)]).norm()
    assert float(moved.detach()) <= .1 * 1e-3 * 1.001
    k = opt.engine.layers[0]
    eye = torch.eye(7)
    torch.testing.assert_close(opt.engine.solved[k]["A"]["dense"],
                               torch.linalg.inv(opt.engine.stats[k]["A"] + 10 * eye))
    opt2 = SecondOrder(net(), "FOOF", lr=.1, kl_clip=1e-9)
    step(opt2.engine.model, opt2)
    assert opt2.engine.inner > 0
    torch.nn.utils.clip_grad_norm_(m.parameters(), 1.)


def test_mixed_precision_skips_what_overflowed():
    m = net()
    opt = SecondOrder(m, "K-FAC empirical", lr=.05)
    plain, popt = net(), None
    popt = SecondOrder(plain, "K-FAC empirical", lr=.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.)
    for bad in (False, True, False):
        opt.zero_grad()
        loss = F.cross_entropy(m(X), Y) * (float("inf") if bad else 1)
        opt.backward(loss, scaler=scaler)
        scaler.step(opt)
        scaler.update()
        if not bad: step(plain, popt)
    assert opt.engine.steps == 2 and not opt.engine.counters["measurements dropped"]
    for p, q in zip(m.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        opt.zero_grad()
        loss = F.cross_entropy(m(X), Y)
    opt.backward(loss)
    opt.step()
    assert all(t.dtype == torch.float32 for s in opt.engine.stats.values() for t in s.values())


@pytest.mark.parametrize("name",
                         [n for n in METHODS if n not in ("NGD", "SMW-NG", "SENG", "Swift K-FAC")])
def test_checkpoints_resume_exactly(name):
    m = net()
    opt = SecondOrder(m, name, every=2, lr=.02, generator=torch.Generator().manual_seed(0))
    step(m, opt, 3)
    file = io.BytesIO()
    torch.save({"model": m.state_dict(), "opt": opt.state_dict(),
                "rng": opt.engine.generator.get_state()}, file)
    step(m, opt, 3)
    file.seek(0)
    saved = torch.load(file)
    m2 = net(seed=5)
    m2.load_state_dict(saved["model"])
    opt2 = SecondOrder(m2, name, every=2, lr=.02, generator=torch.Generator().manual_seed(9))
    opt2.load_state_dict(saved["opt"])
    opt2.engine.generator.set_state(saved["rng"])
    step(m2, opt2, 3)
    for p, q in zip(m.parameters(), m2.parameters(), strict=True): assert torch.equal(p, q)


@pytest.mark.parametrize("options", [dict(graft="adam"), dict(graft="adagrad"), dict(kl_clip=1e-4)])
def test_checkpoints_keep_lengths_and_clipping(options):
    make = lambda m: SecondOrder(m, "K-FAC empirical", lr=.1, every=2, **options)
    m = net()
    opt = make(m)
    step(m, opt, 3)
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(m.state_dict())
    step(m, opt, 3)
    m2 = net(seed=5)
    m2.load_state_dict(weights)
    opt2 = make(m2)
    opt2.load_state_dict(state)
    step(m2, opt2, 3)
    for p, q in zip(m.parameters(), m2.parameters(), strict=True): assert torch.equal(p, q)


def test_rows_are_measured_again_after_a_checkpoint():
    m = net()
    opt = SecondOrder(m, "SMW-NG", lr=.02)
    step(m, opt, 2)
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(m.state_dict())
    step(m, opt)
    m2 = net()
    m2.load_state_dict(weights)
    opt2 = SecondOrder(m2, "SMW-NG", lr=.02)
    opt2.load_state_dict(state)
    step(m2, opt2)
    for p, q in zip(m.parameters(), m2.parameters(), strict=True): torch.testing.assert_close(p, q)


def test_checkpoint_of_another_model_or_method_is_refused():
    state = SecondOrder(net(), "K-FAC").state_dict()
    shapes = r"argument state_dict='0'.*\(5, 6\) here and \(8, 6\) in the checkpoint"
    with pytest.raises(ValueError, match=shapes):
        SecondOrder(net(width=5), "K-FAC").load_state_dict(state)
    with pytest.raises(ValueError, match="another method than FOOF"):
        SecondOrder(net(), "FOOF").load_state_dict(state)
    sgd = torch.optim.SGD(net().parameters(), .1).state_dict()
    with pytest.raises(ValueError, match="holds no curvature"):
        SecondOrder(net(), "K-FAC").load_state_dict(sgd)


def test_arguments():
    for bad in (dict(lr=-1), dict(momentum=1.), dict(damping=0.), dict(weight_decay=-1),
                dict(damping=-1e-3)):
        with pytest.raises(ValueError, match=f"argument {next(iter(bad))}="):
            SecondOrder(net(), "K-FAC", **bad)
    with pytest.raises(ValueError, match="argument name='KFAC': is no method here; use one of"):
        method("KFAC")


def test_closure():
    m = net()
    opt = SecondOrder(m, "FOOF", lr=.05)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(m(X), Y)
        loss.backward()
        return loss
    first = float(opt.step(closure).detach())
    for _ in range(5): last = float(opt.step(closure).detach())
    assert last < first and opt.engine.counters["measured"] == 12
