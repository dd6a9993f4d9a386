"""Time of Newton fractal maps against a straightforward NumPy version and against the divisions.

`python benchmarks/newton_render.py --size 512 --repeats 7` prints, for several numbers of roots,
the median times (interleaved repeats), their ratio with an interval, the counted divisions (one for
each point, root and step taken, two for each point and step), and the ratio of the time to that
of dividing as many numbers in a loop that does nothing else.
"""
import argparse

import numpy as np
import torch

from yokolab.lab import bench, stats
from yokolab.synthetic.compiled import compiled
from yokolab.synthetic.newton_fractals_map import FAR, Relaxed, iterate, iterate_torch, window


def straightforward(z, p, steps=40, radius=1e-3):
    """Every point takes all steps, in complex NumPy."""
    r, m = np.array(p.roots), np.array(p.multiplicities)
    label, count = np.full(z.shape, -1), np.full(z.shape, steps)
    for t in range(steps + 1):
        w = z[..., None] - r
        near = np.abs(w)
        new = (label < 0) & (near.min(-1) < radius)
        label[new], count[new] = near.argmin(-1)[new], t
        with np.errstate(all="ignore"):
            z = np.where(label < 0, z - p.relaxation/(m/w).sum(-1), z)
        z = np.where(np.isfinite(z), z, FAR)
    return label, count


def divide(x, y, rounds):
    for _ in range(rounds):
        for k in range(len(x)): y[k] = x[k]/y[k]


def case(d, size, repeats, seed=0):
    """One number of roots: times, counts and ratios as one row."""
    g = np.random.default_rng(seed)
    roots = tuple(map(complex, g.normal(size=d) + 1j*g.normal(size=d)))
    p = Relaxed(roots, 1.2 + 0.3j)
    z = window(size)
    bulk = z.to(torch.complex64)
    o = iterate(bulk, p)
    taken = float((o.count.double() + 1).sum())
    divisions = taken*(d + 2)
    x, y = np.full(256, 1.5, np.float32), np.full(256, 1.2, np.float32)
    loop, rounds = compiled(divide), max(1, round(divisions/256))
    times = bench.interleave({
        "numpy": lambda: straightforward(z.numpy(), p), "compiled": lambda: iterate(bulk, p),
        "double": lambda: iterate(z, p), "torch": lambda: iterate_torch(bulk[None], [p]),
        "divisions": lambda: loop(x, y, rounds)}, repeats=repeats, warmup=1)
    mid = {k: float(np.median(v)) for k, v in times.items()}
    gain = stats.ratio(times["numpy"], times["compiled"])
    same = float((o.label == torch.from_numpy(straightforward(z.numpy(), p)[0])).double().mean())
    return dict(roots=d, steps=taken/size**2 - 1, agree=same, **{k: v*1e3 for k, v in mid.items()},
                gain=gain.value, gain_low=gain.lo, gain_high=gain.hi, divided=divisions,
                over_divisions=mid["compiled"]/mid["divisions"])


def main():
    """Print the table."""
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--size", type=int, default=512, help="pixels a side")
    a.add_argument("--repeats", type=int, default=7, help="interleaved repeats")
    a.add_argument("--roots", default="3,5,8", help="numbers of roots")
    a = a.parse_args()
    print(f"{bench.hardware()}\n{a.size} x {a.size}, T = 40, one thread, ms")
    print("roots steps  agree    numpy compiled  double    torch  gain [95 %]           "
          " divisions  time over divisions")
    for d in map(int, a.roots.split(",")):
        r = case(d, a.size, a.repeats)
        print(f"{d:5d} {r['steps']:5.1f} {r['agree']:.4f} {r['numpy']:8.1f} {r['compiled']:8.2f} "
              f"{r['double']:7.2f} {r['torch']:8.1f} {r['gain']:6.1f} [{r['gain_low']:.1f}, "
              f"{r['gain_high']:.1f}] {r['divided']:12.3g} {r['over_divisions']:6.2f}")


if __name__ == "__main__": main()
