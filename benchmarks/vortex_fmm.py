"""Fast sums against fmm3dpy, direct sums and the machine: `python benchmarks/vortex_fmm.py speed`.

Parts: `volume` (messages of 2, 4, 8 processes against a model), `speed` (charges with gradients
and Biot-Savart, all codes on the same points in turn),
`slope` (time against N), `even` (break-even with the compiled direct sum), `ceiling` (pair kernel
and M2L against a matrix product). Every row carries the error observed at sampled targets; before
timing, every code gets the loosest tolerance whose observed error (at the same size, at most
10^5) is still within the one asked for. Our time is that of a whole call: plan, tree, lists and
sum. Matrices of a tolerance are made once per process (`first`). The wheel of fmm3dpy has no
threads and no vector kernels; a libfmm3d built from its source with `make lib FAST_KER=ON` takes
part if `--library` or $FMM3D_LIBRARY names it.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time

import numpy as np


def rel(a, b): return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def library_call(lib, eps, x, q):
    "Potential and gradient by a shared library of FMM3D, (rhs, N) and (rhs, 3, N)."
    rhs, n = q.shape; pot, grad = np.zeros((rhs, n), order="F"), np.zeros((rhs, 3, n), order="F")
    i64 = lambda v: ctypes.byref(ctypes.c_int64(v)); err = ctypes.c_int64(0)
    at = lambda a: a.ctypes.data_as(ctypes.c_void_p)
    lib.lfmm3d_s_c_g_vec_(i64(rhs), ctypes.byref(ctypes.c_double(eps)), i64(n), at(x), at(q),
                          at(pot), at(grad), ctypes.byref(err))
    if err.value: raise RuntimeError(f"lfmm3d_s_c_g_vec: error {err.value}")
    return grad


def field(grad): # gradient (N, 3) of one density, or curl of three
    if len(grad) == 1: return grad[0].T
    g = grad
    return np.stack([g[2, 1] - g[1, 2], g[0, 2] - g[2, 0], g[1, 0] - g[0, 1]], 1)


def codes(library): # name -> function (x, q, eps) that returns the field up to a factor
    from yokolab.hpc.fmm import Plan, solve
    threads = int(os.environ["OMP_NUM_THREADS"])
    def ours(x, q, eps):
        kind = "biot" if q.shape[1] == 3 else "laplace"
        plan = Plan(x, kind=kind, eps=eps, threads=threads)
        return solve(plan, q, 2 if kind == "biot" else 1)[0][:, -3:]
    out = {"yokolab": ours}
    if library:
        lib = ctypes.CDLL(library)
        out["libfmm3d"] = lambda x, q, eps: field(library_call(
            lib, eps, np.asfortranarray(x.T), np.asfortranarray(q.T)))
    try:
        import fmm3dpy
    except ImportError: return out
    def wheel(x, q, eps):
        n, r = q.shape; s = np.asfortranarray(q.T)
        g = fmm3dpy.lfmm3d(eps=eps, sources=np.asfortranarray(x.T), charges=s if r > 1 else s[0],
                           nd=r, pg=2).grad
        return field(np.reshape(g, (r, 3, n)))
    out["fmm3dpy"] = wheel
    return out


def points(n, rhs):
    rng = np.random.default_rng(n); return rng.random((n, 3)), rng.standard_normal((n, rhs))


def observed(got, x, q, seed=0): # relative error at 400 targets, whatever constant the code uses
    from yokolab.hpc.near import direct
    pick = np.random.default_rng(seed).integers(0, len(x), 400); a = got[pick]
    ref = direct(np.hstack([x, q]).T, x[pick].T, 2 if q.shape[1] == 3 else 1)[:, -3:]
    scale = min((1, 4 * np.pi), key=lambda c: rel(c * a, ref)); return rel(scale * a, ref)


def tuned(fn, eps, rhs, n): # loosest request whose observed error is within eps at this size
    x, q = points(min(n, 100_000), rhs)
    for ask in (300 * eps, 100 * eps, 30 * eps, 10 * eps, 3 * eps):
        if ask < .2 and observed(fn(x, q, ask), x, q) <= eps: return ask
    return eps


def speed(a):
    "One process with its number of threads."
    fns = codes(a.library)
    for eps in a.eps:
        for rhs in (1, 3):
            use = {k: f for k, f in fns.items() if k not in a.skip}
            t = time.perf_counter(); use["yokolab"](*points(2000, rhs), eps)
            first = time.perf_counter() - t
            for n in a.sizes:
                ask = {k: tuned(f, eps, rhs, n) if a.tune else eps for k, f in use.items()}
                for k, f in use.items(): f(*points(2000, rhs), ask[k])
                x, q = points(n, rhs); times, err = {k: [] for k in use}, {}
                for r in range(a.repeats):
                    for k, f in use.items():
                        t = time.perf_counter(); got = f(x, q, ask[k])
                        times[k].append(time.perf_counter() - t)
                        if not r: err[k] = observed(got, x, q)
                base = np.array(times["yokolab"])
                for k, t in times.items():
                    row = dict(threads=int(os.environ["OMP_NUM_THREADS"]), N=n, eps=eps,
                               sum="charges" if rhs == 1 else "Biot-Savart", code=k, asked=ask[k],
                               observed=err[k], seconds=float(np.median(t)),
                               ratio=float(np.median(np.array(t) / base)))
                    if k == "yokolab": row["first"] = first
                    yield row


def slope(a):
    fns = codes(""); f = fns["yokolab"]; rows = []
    for eps in a.eps:
        for rhs in (1, 3):
            f(*points(3000, rhs), eps); t = []
            for n in a.sizes:
                x, q = points(n, rhs); best = []
                for _ in range(a.repeats):
                    s = time.perf_counter(); f(x, q, eps); best.append(time.perf_counter() - s)
                t.append(np.median(best))
            rows.append(dict(eps=eps, rhs=rhs, sizes=list(a.sizes), seconds=[float(v) for v in t],
                             slope=float(np.polyfit(np.log(a.sizes), np.log(t), 1)[0])))
    yield from rows


def even(a):
    from yokolab.hpc.near import direct
    threads = int(os.environ["OMP_NUM_THREADS"]); f = codes("")["yokolab"]
    for eps in a.eps:
        for rhs in (1, 3):
            sizes, gap = (500, 1000, 2000, 4000, 8000), []; f(*points(3000, rhs), eps)
            for n in sizes:
                x, q = points(n, rhs); src = np.hstack([x, q]).T; t = []
                for _ in range(max(5, a.repeats)):
                    s = time.perf_counter(); direct(src, x.T, 2 if rhs == 3 else 1, threads=threads)
                    m = time.perf_counter(); f(x, q, eps)
                    t.append((m - s) / (time.perf_counter() - m))
                gap.append(np.log(np.median(t)))
            yield dict(eps=eps, rhs=rhs, threads=threads, direct_over_fast=np.exp(gap).tolist(),
                       break_even=float(np.exp(np.interp(0, gap, np.log(sizes)))))


def ceiling(a):
    "Pair kernels and M2L on one thread, against the faster of a matrix product and pure FMA."
    from yokolab.hpc.fmm import Plan
    from yokolab.hpc.near import direct
    from yokolab.hpc.sweeps import upward
    best = lambda f: min(_seconds(f) for _ in range(a.repeats + 2))
    for dtype in (np.float64, np.float32):
        product, fma = _ceilings(dtype, best); top = max(product, fma)
        yield dict(what="ceiling", dtype=str(np.dtype(dtype)), matrix_product=product / 1e9,
                   fma_in_cache=fma / 1e9)
        for mode, flops in ((1, 27), (2, 34)): # additions and products of a pair, 1/root as one
            x, q = points(6000, 3 if mode == 2 else 1); s = np.hstack([x, q]).T.astype(dtype)
            t = best(lambda s=s, mode=mode: direct(s, s[:3], mode))
            yield dict(what="pairs", mode=mode, dtype=str(np.dtype(dtype)), gpairs=36e6 / t / 1e9,
                       gflops=36e6 * flops / t / 1e9, of_ceiling=36e6 * flops / t / top)
    top = max(_ceilings(np.float64, best))
    for eps in a.eps:
        x, q = points(100_000, 3); p = Plan(x, kind="biot", eps=eps, threads=1)
        work = 6 * sum(_count(p, f) * int(k)**4 for f, k in enumerate(p.orders.p))
        M = upward(p, np.concatenate([p.points, q[p.tree.src].T]))
        s = best(_m2l_sweep(p, M, np.zeros_like(M)))
        yield dict(what="M2L", eps=eps, P=p.orders.P, gflops=work / s / 1e9,
                   of_ceiling=work / s / top)


def _ceilings(dtype, best): # flops/s of a large product (numpy, torch) and of multiply-adds in L1
    import torch

    from yokolab.hpc import far
    A = np.random.default_rng(0).random((1500, 1500)).astype(dtype); B = torch.from_numpy(A)
    product = 2 * 1500**3 / min(best(lambda: A @ A), best(lambda: B @ B))
    K, n = 64, 6000; T = np.ones(K * far.WIDTH, dtype); rows = np.ones((12, K), dtype)
    at = lambda r: np.resize([rows[r + i].ctypes.data for i in range(6)], n + far.ROWS) # in L1
    src, trg = at(0), at(6); spare = np.zeros(2 * K, dtype)
    call = lambda: [far._apply(T, 0, K, 1, n, src, trg, spare) for _ in range(50)]
    return product, 50 * n * 2 * K * far.WIDTH / best(call)


def _m2l_sweep(p, M, L):
    from yokolab.hpc import far
    t, o, st = p.tree, p.orders, p.orders.stencil
    levels = zip(t.first[1:-1], t.first[2:], strict=True)
    calls = [(0, r - l, l, t.cells, t.coord, t.child, t.leaf, p.lists.near, st.table.ravel(),
              st.reach, st.far, o.direct, *o.m2l, M, L) for l, r in levels]
    return lambda: [far._m2l(*c) for c in calls]


def _seconds(f): t = time.perf_counter(); f(); return time.perf_counter() - t


def _count(plan, f): # M2L of one displacement: same-level cells whose parents are near
    t, o = plan.tree, plan.orders; d = o.stencil.far[f]; n = 0
    for l, r in list(zip(t.first[:-1], t.first[1:], strict=True))[1:]:
        c = t.coord[l:r]; key = lambda v: (v[:, 0] << 40) + (v[:, 1] << 20) + v[:, 2]
        k = key(c); at = np.searchsorted(k[np.argsort(k)], key(c + d)).clip(0, r - l - 1)
        at = np.argsort(k)[at]; ok = (c[at] == c + d).all(1)
        ok &= (((c + d) // 2 - c // 2)**2).sum(1) <= (o.stencil.near**2).sum(1).max()
        s = t.cells[l:r]; nt, ns = s[:, 3] - s[:, 2], s[at, 1] - s[at, 0]
        leaf = t.leaf[l:r]; n += int((ok & ~(leaf & leaf[at] & (nt * ns <= o.direct[f]))).sum())
    return n


def _rank(rank, ranks, n, eps, file, out): # one process of `volume`
    import torch.distributed as dist

    from yokolab.hpc.distributed import distributed_sum
    from yokolab.hpc.fmm import Plan, solve
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    x, q = points(n, 3); x[0], x[1] = 0, 1; part = slice(rank * n // ranks, (rank + 1) * n // ranks)
    got, traffic = distributed_sum(x[part], q[part], 2, eps)
    want = solve(Plan(x, kind="biot", eps=eps, threads=1), q, 2)[0] if rank == 0 else None
    with open(f"{out}.{rank}", "w") as f:
        gap = float(abs(got - want[part]).max() / abs(want).max()) if rank == 0 else 0.0
        f.write(json.dumps(dict(cells=traffic.cells, halo=traffic.halo, gap=gap)))
    dist.destroy_process_group()


def volume(a):
    "Bytes of the locally essential trees: a shell of one parent cell around each rank's region."
    import tempfile

    import torch.multiprocessing as mp

    from yokolab.hpc.far import padded
    from yokolab.hpc.orders import choose_orders
    for eps in a.eps:
        o = choose_orders(eps, rhs=3); bytes_of_cell = 24 * padded(o.P) + 56
        for n in a.sizes:
            leaf = int(np.ceil(np.log2(n / o.ncrit) / 3)); leaf += n / 8**leaf > .9 * o.ncrit
            for ranks in a.ranks:
                with tempfile.TemporaryDirectory() as d:
                    mp.spawn(_rank, (ranks, n, eps, d + "/store", d + "/out"), nprocs=ranks)
                    rows = [json.load(open(f"{d}/out.{r}")) for r in range(ranks)]
                side = np.array({2: (.5, 1, 1), 4: (.5, .5, 1), 8: (.5, .5, .5)}[ranks])
                shell = lambda w, side=side: np.prod(np.where(side < 1, side + w, 1)) - side.prod()
                halo = ranks * n * shell(2 / 2**leaf) * 56
                cells = ranks * bytes_of_cell * sum(
                    8**l * shell(2 / 2**l) for l in range(min(3, leaf), leaf + 1))
                yield dict(N=n, eps=eps, ranks=ranks, levels=int(leaf), gap=rows[0]["gap"],
                           halo=sum(r["halo"] for r in rows), halo_model=int(halo),
                           cells=sum(r["cells"] for r in rows), cells_model=int(cells))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("part", choices=["speed", "slope", "even", "ceiling", "volume"])
    p.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    p.add_argument("--eps", type=float, nargs="+", default=[1e-3, 1e-6, 1e-9])
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], choices=[2, 4, 8])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--skip", nargs="*", default=[], help="codes to leave out")
    p.add_argument("--no-tune", dest="tune", action="store_false", help="ask for eps as it is")
    p.add_argument("--library", default=os.environ.get("FMM3D_LIBRARY", ""))
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        for row in globals()[a.part](a): print(json.dumps(row), flush=True)
        return
    for threads in a.threads: # the number of threads is read when a library is loaded
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker"], env=env, check=True)


if __name__ == "__main__": main()
