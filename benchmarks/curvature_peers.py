"""K-FAC and Shampoo against public implementations: `python benchmarks/curvature_peers.py`.

Contenders, each taken if it can be imported and named as missing if not:

- asdl (package asdfghjkl): K-FAC (empirical, Monte-Carlo), Shampoo with coupled Newton roots;
- kfac (kfac-pytorch): K-FAC by inverses, and by eigendecompositions;
- distributed_shampoo (facebookresearch/optimizers): Shampoo with roots by eigendecomposition.

Results are compared before times are: from equal weights and one batch, with the definitions made
equal (see `MATCH`), the preconditioned gradients must agree. Then whole steps are timed in one
process, in turn: refreshed at every step, and at every tenth. The learning rate is zero, so that
all contenders see the same weights throughout.

MATCH, for n samples and T positions, A = sum a a'/n and B = sum b b'/(nT) with b of one sample's
loss. asdl has A/T and T B: the same pi-damped inverse. kfac-pytorch has A/T^3 and B/T^2 (its
scale of gradients given as 1/n) and adds the damping to both: T^5 times our inverse with damping
T^3 lambda and T^2 lambda. Layers have no bias (asdl does not append 1 to the inputs); batch
normalisations are unit-wise in asdl and plain in kfac-pytorch. Shampoo sees a kernel as a matrix
(d_out, c k k) everywhere; asdl and ours damp by a fraction of the largest eigenvalue,
distributed_shampoo by a constant.
"""

import argparse
import copy
import importlib
import json
import math
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from yokolab.curvature.optim import SecondOrder, method
from yokolab.curvature.shapes import KRON
from yokolab.curvature.solve import cheapest, root
from yokolab.lab import stats
from yokolab.lab.bench import interleave, machine, matmul_flops

LAM = 1e-2  # damping of K-FAC, and of the constant ridge of Shampoo
SAME = 1e-3  # directions that differ by less (relative norm) are equal in single precision
RIDGE = 1e-4  # damping of Shampoo as a fraction of the largest eigenvalue


def peer(name):
    "A peer's module, or the reason why it cannot be had"
    # asdl marks ranges for a profiler of NVIDIA even where there is no such device
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: 0
    try: return importlib.import_module(name), ""
    except Exception as e: return None, f"{type(e).__name__}: {e}"


# models ------------------------------------------------------------------------------------------
class Block(nn.Module):
    "Residual block with batch normalisation"

    def __init__(self, i, o, stride):
        super().__init__()
        self.a, self.b = (nn.Conv2d(c, o, 3, s, 1, bias=False) for c, s in ((i, stride), (o, 1)))
        self.na, self.nb = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        self.short = nn.Conv2d(i, o, 1, stride, bias=False) if i != o else nn.Identity()

    def forward(self, x): return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.short(x))


def mlp(width, n):
    "Four linear layers, and a batch"
    layers = [m for o in [width] * 3 + [10] for m in (nn.Linear(width, o, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(n, width), torch.randint(10, (n,))


def resnet(width, n):
    "Residual network of 8 layers on pictures of 32 x 32, and a batch"
    w = width
    net = nn.Sequential(nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
                        Block(w, w, 1), Block(w, 2 * w, 2), Block(2 * w, 4 * w, 2),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10, bias=False))
    return net, torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


# contenders: (model, x, y, every, lr) -> step, clock of solve and apply --------------------------
def timed(clock, part, owner, *names):
    "Let methods of an object add their time to a clock"
    for name in names:
        inner = getattr(owner, name)
        def outer(*args, inner=inner, **kw):
            begin = time.perf_counter()
            out = inner(*args, **kw)
            clock[part] += time.perf_counter() - begin
            return out
        setattr(owner, name, outer)


def sgd(model, x, y, every, lr):
    "Momentum SGD: the floor"
    opt = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    def step():
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return step, Counter()


def second(kind, damping=LAM, **options):
    "A method of this library"
    def build(model, x, y, every, lr):
        names = [k for k, p in model.named_parameters() if p.dim() == 1]
        ignore = names if kind.what == "batch" else ()
        opt = SecondOrder(model, kind, lr, damping=damping, every=every, ignore=ignore, **options)
        def step():
            opt.zero_grad()
            out = model(x)
            opt.backward(F.cross_entropy(out, y), out)
            opt.step()
        step.opt = opt
        return step, opt.engine.seconds
    return build


def asdl_kfac(fisher):
    "K-FAC of asdl"
    def build(model, x, y, every, lr):
        import asdl
        config = asdl.PreconditioningConfig(data_size=len(x), damping=LAM, ema_decay=1.0,
                                            preconditioner_upd_interval=every,
                                            curvature_upd_interval=every)
        maker, clock = asdl.KfacGradientMaker(model, config, fisher_type=fisher), Counter()
        return _asdl(maker, model, x, y, lr, clock)
    return build


def asdl_shampoo(model, x, y, every, lr):
    "Shampoo of asdl; kernels as matrices by its own merging of small dimensions"
    import asdl
    from asdl.precondition.shampoo import Preconditioner
    config = asdl.PreconditioningConfig(damping=RIDGE, preconditioner_upd_interval=every,
                                        curvature_upd_interval=every)
    maker = asdl.ShampooGradientMaker(model, config)
    maker.preconditioners = [Preconditioner(p, config, max(p.shape[0], p[0].numel()),
                                            best_effort_shape_interpretation=True)
                             for p in model.parameters() if p.dim() > 1]
    for p in maker.preconditioners:  # it compares this list with a torch.Size
        p._partitioner._shape = p._transformed_shape = torch.Size(p._transformed_shape)
    return _asdl(maker, model, x, y, lr, Counter())


def _asdl(maker, model, x, y, lr, clock):
    opt = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    timed(clock, "solve", maker, "update_preconditioner")
    timed(clock, "apply", maker, "precondition")
    def step():
        opt.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
        maker.forward_and_backward()
        opt.step()
    return step, clock


def kfac_pytorch(how):
    "K-FAC of kfac-pytorch; its clipping is set so high that it never acts"
    def build(model, x, y, every, lr):
        from kfac.preconditioner import KFACPreconditioner
        opt, clock = torch.optim.SGD(model.parameters(), lr, momentum=0.9), Counter()
        pre = KFACPreconditioner(model, factor_update_steps=every, inv_update_steps=every,
                                 damping=LAM, factor_decay=1e-12, kl_clip=1e30, lr=1.0,
                                 compute_method=how, grad_scaler=lambda: 1 / len(x))
        for _, layer in pre._layers.values():
            timed(clock, "solve", layer, "compute_a_inv", "compute_g_inv")
            timed(clock, "apply", layer, "preconditioned_grad", "update_grad")
        def step():
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            pre.step()
            opt.step()
        return step, clock
    return build


def meta_shampoo(model, x, y, every, lr):
    "Shampoo of facebookresearch/optimizers without grafting and averaging"
    import distributed_shampoo as ds
    from distributed_shampoo.shampoo_types import SingleDeviceDistributedConfig
    opt = ds.DistributedShampoo(
        [p for p in model.parameters() if p.dim() > 1], lr, betas=(0.0, 1.0), epsilon=LAM,
        max_preconditioner_dim=math.inf, precondition_frequency=every,
        start_preconditioning_step=every, use_bias_correction=False,
        distributed_config=SingleDeviceDistributedConfig(target_parameter_dimensionality=2))
    clock = Counter()
    for lists in opt._per_group_state_lists:
        for v in lists.values():
            if hasattr(v, "_amortized_computation"):
                timed(clock, "solve", v, "_amortized_computation")
                timed(clock, "apply", v, "precondition")
    def step():
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return step, clock


# equal definitions -------------------------------------------------------------------------------
def plain_scaled(positions):
    "K-FAC as kfac-pytorch defines it; positions: {(d_in, d_out): T}"
    def solve(stats, solver, damping, opt):
        T = positions[tuple(stats[k].shape[0] for k in "AB")]
        pick = lambda M, N: cheapest(solver, M, N.shape[0], opt.uses)
        inv = {k: pick(stats[k], stats[o])(stats[k], damping * T ** p)
               for k, o, p in (("A", "B", 3), ("B", "A", 2))}
        return {**inv, "T": {"scale": stats["A"].new_tensor(float(T) ** 5)}}
    def apply(G, inv):
        P = KRON.apply(G, inv)
        return P if float(inv["T"]["scale"]) == 1 else P.mul_(inv["T"]["scale"])
    return replace(KRON, solve=solve, apply=apply)


def positions_of(model, x):
    "{(d_in, d_out): positions} of linear layers and convolutions"
    out, handles = {}, []
    for m in model.modules():
        if not isinstance(m, (nn.Linear, nn.Conv2d)): continue
        def note(m, args, y): out[m.weight[0].numel(), m.weight.shape[0]] = y[0, 0].numel()
        handles.append(m.register_forward_hook(note))
    model(x)
    for h in handles: h.remove()
    return out


def pairs(model, x):
    "{peer's name: (module, its builder, ours, tolerance)}"
    emp = lambda **kw: method("K-FAC empirical", ema=1.0, **kw)
    same = plain_scaled(positions_of(model, x))
    kp = emp(shape=same, norm=None)
    return {
        "asdl K-FAC": ("asdl", asdl_kfac("fisher_emp"), second(emp())),
        "asdl K-FAC exact": ("asdl", asdl_kfac("fisher_exact"),
                             second(method("K-FAC exact", ema=1.0))),
        "asdl K-FAC mc": ("asdl", asdl_kfac("fisher_mc"), second(method("K-FAC", ema=1.0))),
        "kfac inverse": ("kfac", kfac_pytorch("inverse"), second(kp)),
        "kfac eigen": ("kfac", kfac_pytorch("eigen"), second(kp)),
        "asdl Shampoo": ("asdl", asdl_shampoo, second(method("Shampoo"), RIDGE)),
        "meta Shampoo": ("distributed_shampoo", meta_shampoo,
                         second(method("Shampoo", solve=root(4)), LAM)),
    }


RANDOM, DIFFERENT = ("asdl K-FAC mc",), ("kfac eigen",)  # no common result: times only


def directions(build, model, x, y):
    "Preconditioned gradients of weights with more than one dimension after one step"
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters() if p.dim() > 1]
    build(model, x, y, 1, 1.0)[0]()
    after = [p.detach() for p in model.parameters() if p.dim() > 1]
    return [a - b for a, b in zip(before, after, strict=True)]


def compare(todo, model, x, y):
    "{name: largest relative difference of a layer's preconditioned gradient}"
    out = {}
    for name, (_, theirs, ours) in todo.items():
        if name in RANDOM + DIFFERENT: continue
        a, b = (directions(f, model, x, y) for f in (theirs, ours))
        out[name] = max(float((u - v).norm() / u.norm()) for u, v in zip(a, b, strict=True))
    return out


# times -------------------------------------------------------------------------------------------
def cycle(step, every):
    "As many steps as one refresh serves"
    def run():
        for _ in range(every): step()
    return run


def race(todo, model, x, y, every, repeats):
    "Times of all contenders in turn: {name: seconds per step}, {name: share of solve and apply}"
    fns, clocks = {}, {}
    builders = {"SGD": sgd}
    for name, (_, theirs, ours) in todo.items():
        builders[name] = theirs
        builders[f"ours to {name}"] = ours
    for name, build in builders.items():
        step, clock = build(copy.deepcopy(model), x, y, every, 0.0)
        fns[name], clocks[name] = cycle(step, every), clock
    for f in fns.values(): f()
    for c in clocks.values(): c.clear()
    times = interleave(fns, repeats=repeats, warmup=0, min_time=0)
    calls = (repeats + 1) * every
    parts = {k: {p: c[p] / calls for p in ("solve", "apply")} for k, c in clocks.items()}
    return {k: t / every for k, t in times.items()}, parts


def report(label, todo, times, parts, show=lambda line: None):
    "Rows of one race"
    rows, floor = [], np.median(times["SGD"])
    for name in todo:
        r = stats.ratio(times[name], times[f"ours to {name}"])
        row = dict(case=label, peer=name, ratio=r.value, lo=r.lo, hi=r.hi, sgd=floor)
        for who, key in (("peer", name), ("ours", f"ours to {name}")):
            t, p = float(np.median(times[key])), parts[key]
            row |= {f"{who}_step": t, f"{who}_solve": p["solve"], f"{who}_apply": p["apply"],
                    f"{who}_statistics": t - floor - p["solve"] - p["apply"]}
        rows.append(row)
        ms = lambda w, part, row=row: 1e3 * row[f"{w}_{part}"]
        cells = "  ".join(f"{w} {ms(w, 'step'):7.1f} ms ({ms(w, 'statistics'):.0f} + "
                          f"{ms(w, 'solve'):.0f} + {ms(w, 'apply'):.0f})" for w in ("peer", "ours"))
        show(f"  {name:18s} {r.value:5.2f} [{r.lo:.2f}, {r.hi:.2f}]  {cells}")
    return rows


def main():
    "Compare, then time"
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--models", default="mlp,resnet", help="mlp, resnet")
    ap.add_argument("--peers", default="", help="only these, such as 'asdl K-FAC, kfac inverse'")
    ap.add_argument("--every", default="1,10", help="refresh intervals")
    ap.add_argument("--batch", type=int, default=256)
    ap.add_argument("--width", type=int, default=1024, help="of the perceptron")
    ap.add_argument("--channels", type=int, default=16, help="of the first residual block")
    ap.add_argument("--repeats", type=int, default=7)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--json", default="", help="write the rows to this file")
    args = ap.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    show = lambda line: print(line, flush=True)
    show(f"{machine()}; {args.threads} thread(s); products at "
         f"{matmul_flops() / 1e9:.0f} GFLOP/s in single precision")
    have = {}
    for name in ("asdl", "kfac", "distributed_shampoo"):
        have[name], why = peer(name)
        if why: show(f"missing: {name} ({why})")
    rows = []
    for case in args.models.split(","):
        torch.manual_seed(0)
        model, x, y = (mlp(args.width, args.batch) if case == "mlp"
                       else resnet(args.channels, args.batch))
        words = [w.strip() for w in args.peers.split(",") if w.strip()]
        todo = {k: v for k, v in pairs(model, x).items()
                if have[v[0]] is not None and (not words or k in words)}
        if not todo: sys.exit("no peer can be imported; see the list above")
        show(f"{case}, batch {args.batch}: largest relative difference of a layer's direction")
        equal = compare(todo, model, x, y)
        for k, v in equal.items(): show(f"  {k:18s} {v:.1e}{'' if v < SAME else '   NOT EQUAL'}")
        for every in map(int, args.every.split(",")):
            show(f"{case}, refresh every {every}: theirs over ours [95%], median step "
                 "(statistics + solve + apply)")
            for name, v in todo.items():  # pairs, so that theirs and ours are neighbours in time
                times, parts = race({name: v}, model, x, y, every, args.repeats)
                rows += report(f"{case}-{every}", (name,), times, parts, show)
                show(f"  {'SGD':18s} {1e3 * rows[-1]['sgd']:25.1f} ms, ours over SGD "
                     f"{stats.ratio(times[f'ours to {name}'], times['SGD'])}")
        for r in rows: r.setdefault("difference", equal.get(r["peer"]))
    if args.json:
        with open(args.json, "w") as f: json.dump(rows, f, indent=1)


if __name__ == "__main__": main()
