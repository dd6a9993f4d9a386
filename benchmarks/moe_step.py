"""Training step of the grouped mixture of experts: `python benchmarks/moe_step.py`.

Held against a masked loop over the experts and a dense layer of equal active FLOPs (inner width
k d_ff), in one process, interleaved, medians; the share of the time that is not products comes from
a profile, and every rate is laid beside the rate of a large matrix product.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from yokolab.lab import bench, stats
from yokolab.language.experts import MoE
from yokolab.language.grouped import costs, experts_ref, experts_swiglu


class Dense(torch.nn.Module):
    """SwiGLU of inner width k d_ff, torch's own products"""
    def __init__(self, d, f):
        super().__init__()
        self.w1, self.w3 = (torch.nn.Linear(d, f, bias=False) for _ in range(2))
        self.w2 = torch.nn.Linear(f, d, bias=False)

    def forward(self, x): return self.w2(F.silu(self.w1(x))*self.w3(x))


def step(layer, x, g, run=None):
    """One forward and backward pass with the auxiliary losses"""
    def go():
        for p in layer.parameters(): p.grad = None
        x.grad = None
        y = (run or layer)(x)
        loss = (y*g).sum()
        if hasattr(layer, "auxiliary"): loss = loss + layer.auxiliary()
        loss.backward()
    return go


def by(layer, kind):
    """The layer's forward with another way to compute the experts"""
    def run(x):
        weights, index = layer.choose(x)
        w = layer.w1, layer.w2, layer.w3
        if kind == "loop": return experts_ref(x, weights, index, *w)
        if kind == "apart":                     # kinder to the loop: a parameter per expert
            return experts_ref(x, weights, index, *(v.unbind() for v in w))
        return experts_swiglu(x, weights, index, *w, kind)
    return run


def products(fn, calls=5):
    """Share of a step's CPU time that torch spends in matrix products"""
    with torch.profiler.profile() as prof:
        for _ in range(calls): fn()
    rows = prof.key_averages()
    total = sum(r.self_cpu_time_total for r in rows)
    names = ("aten::mm", "aten::bmm", "aten::_grouped_mm", "aten::addmm", "aten::mm_out")
    return sum(r.self_cpu_time_total for r in rows if r.key in names)/total, rows


def measure(T, d, f, E, k, repeats=9, device="cpu", dtype="float32", profile=False):
    """Times of all ways at one size, with ratios: a dict"""
    torch.manual_seed(0)
    at = dict(device=device, dtype=getattr(torch, dtype))
    moe, dense = MoE(d, f, n_experts=E, top_k=k, **at), Dense(d, k*f).to(**at)
    x, g = torch.randn(T, d, **at, requires_grad=True), torch.randn(T, d, **at)
    fns = {"dense": step(dense, x, g), "grouped": step(moe, x, g),
           "masked loop": step(moe, x, g, by(moe, "loop")),
           "masked loop, experts apart": step(moe, x, g, by(moe, "apart")),
           "slices": step(moe, x, g, by(moe, "slices")),
           "padded": step(moe, x, g, by(moe, "padded"))}
    times = bench.interleave(fns, repeats=repeats)
    counts = torch.bincount(moe.last[1].flatten(), minlength=E).tolist()
    cost = costs(counts, 3*d*f)
    flops = 18*T*k*d*f + 6*T*d*E
    ceiling = bench.matmul_flops(dtype, 1024, device)
    out = dict(T=T, d=d, d_ff=f, E=E, k=k, load=max(counts)*E/sum(counts),
               kind=min(("grouped", "padded"), key=cost.get),
               **{f"{n}_ms": 1e3*float(np.median(t)) for n, t in times.items()},
               loop_ratio=stats.ratio(times["masked loop"], times["grouped"]),
               apart_ratio=stats.ratio(times["masked loop, experts apart"], times["grouped"]),
           dense_ratio=stats.ratio(times["grouped"], times["dense"]),
               ceiling=flops/float(np.median(times["grouped"]))/ceiling, ceiling_gflops=ceiling/1e9)
    if profile: out["products"], out["rows"] = products(fns["grouped"])
    return out


def main():
    """Measure the sizes and write a table"""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--sizes", nargs="*", default=["4096,32,64,64,2", "4096,64,128,64,2",
                   "4096,128,256,64,2", "8192,128,256,64,4"], help="T,d,d_ff,E,k")
    a.add_argument("--repeats", type=int, default=9)
    a.add_argument("--device", default="cpu")
    a.add_argument("--dtype", default="float32")
    a.add_argument("--profile", action="store_true", help="list the ten dearest operations")
    a = a.parse_args()
    print(f"{bench.hardware()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for size in a.sizes:
        r = measure(*map(int, size.split(",")), a.repeats, a.device, a.dtype, profile=True)
        rows = r.pop("rows")
        print("; ".join(f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}"
                        for n, v in r.items()))
        if a.profile: print(rows.table(sort_by="self_cpu_time_total", row_limit=12))


if __name__ == "__main__": main()
