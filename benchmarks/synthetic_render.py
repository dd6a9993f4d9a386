"""Time to draw a picture, ours against the public Python renderers.

    python benchmarks/synthetic_render.py --visualatom render_VisualAtom.py --rcdb make_rcdb.py \
        --fractaldb fractal_renderer

The paths lead into checkouts of the public repositories (CVPR2023-FDSL-on-VisualAtom,
CVPR2022-Pretrained-ViT-PyTorch, FractalDB-Pretrained-ResNet-PyTorch); their scripts also need the
packages `noise` and `pillow`. Without a path only ours is timed. Both draw the same categories,
one after the other, on one thread; a ratio is the median over categories with a bootstrap
interval. Segments, points and written bytes are counted, so that a time can be held against the
work it did.
"""

import argparse
import contextlib
import glob
import importlib.util
import io
import os
import random
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch

from yokolab.lab import stats
from yokolab.synthetic.contours import GRADIENTS, RCDB, VisualAtom, positions, ring, wave
from yokolab.synthetic.contours_gpu import draw_batch, flattened, have_cupy
from yokolab.synthetic.fractals import FractalDB
from yokolab.synthetic.lines import _pixels


def scripted(ints, floats):
    """A stand-in for `random`: the category's numbers in order, true noise everywhere else."""
    out, whole, real = types.ModuleType("random"), iter(ints), iter(floats)
    out.seed = lambda seed: None
    either = lambda value, other: other() if value is None else value
    out.randint = lambda low, high: either(next(whole, None),
                                           lambda: random.randint(low, int(high)))
    out.expovariate = lambda rate: next(whole)
    out.uniform = lambda low, high: (random.uniform(low, high) if high == 10000 else
                                     either(next(real, None), lambda: random.uniform(low, high)))
    return out


def run_script(path, ints, floats, more=()):
    """Seconds a public script takes for one picture of one category, and the picture."""
    code = compile(Path(path).read_text(), str(path), "exec")
    with tempfile.TemporaryDirectory() as root:
        arguments, known = sys.argv, sys.modules["random"]
        sys.argv = ["script", "--save_root", root, "--numof_classes", "1", "--numof_instances", "1",
                    *more]
        sys.modules["random"] = scripted(ints, floats)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                start = time.perf_counter()
                exec(code, {"__name__": "__main__"})
                spent = time.perf_counter() - start
        finally: sys.argv, sys.modules["random"] = arguments, known
        assert glob.glob(f"{root}/**/*.png", recursive=True), "the script drew nothing"
    return spent


def public_atom(path, c):
    """Seconds of the public VisualAtom renderer."""
    ints = [c.vertices, c.orbits, c.radius, *c.waves]
    return run_script(path, ints, [c.noise, c.spacing, *c.ovals])


def public_rings(path, c):
    """Seconds of the public RCDB renderer."""
    return run_script(path, [c.vertices, c.orbits], [c.noise, c.spacing],
                      ("--numof_thread", "1"))


def public_fractal(folder, c, points, size):
    """Seconds of the public FractalDB renderer, patches in gray."""
    spec = importlib.util.spec_from_file_location("ifs_public", Path(folder)/"ifs_function.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as root:
        os.makedirs(f"{root}/c")
        start = time.perf_counter()
        g = module.ifs_function(0., 0., root, "c", "00")
        for m, p in zip(c.maps, c.weights, strict=True): g.set_param(*m, p)
        g.calculate(points)
        g.draw_patch(size, size, 6, 6, "gray", 0)
        return time.perf_counter() - start


def written(g, c, size):
    """Segments of a contour picture that are seen, and pixels they write."""
    at = (positions(g.contour(c, g.key(c, 0)))*(size/g.canvas/2**40)).to(torch.int64)
    x0, y0 = at.flatten(1)
    x1, y1 = at.roll(-1, 2).flatten(1)
    seen = ((torch.maximum(x0, x1) >= 0) & (torch.minimum(x0, x1) < size)
            & (torch.maximum(y0, y1) >= 0) & (torch.minimum(y0, y1) < size))
    pixels, _ = _pixels(*(v[seen] for v in (x0, y0, x1, y1)), x0[seen], size)
    return int(seen.sum()), len(pixels)


def ours(g, c, size, repeats=3):
    """Seconds of one picture, the median of a few (the loop is compiled beforehand)."""
    spent = []
    for i in range(repeats):
        start = time.perf_counter()
        g.render_batch([c], [i], size, threads=1)
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def on_gpu(batch=512, size=224, repeats=5):
    """Print pictures a second of a CUDA device, kernel and host work together, and kernel alone."""
    g = VisualAtom()
    some = g.categories(batch)
    g.render_batch(some, [0]*batch, size, device="cuda")
    spent = []
    for i in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        g.render_batch(some, [i + 1]*batch, size, device="cuda")
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    drawn = [g.contour(c, g.key(c, 0)) for c in some]
    arrays = flattened(drawn, lambda c: (*ring(c.vertices), wave(c.vertices, *c.waves), *c.start()),
                       g.canvas, size)
    grays = [g.grays(c, g.key(c, 0)) for c in some]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    draw_batch(arrays, grays, GRADIENTS, size, 0, torch.device("cuda"))
    end.record()
    torch.cuda.synchronize()
    print(f"{g.name} on {torch.cuda.get_device_name()}, {size} px: {batch/np.median(spent):,.0f} "
          f"pictures/s in all, {1e3*batch/begin.elapsed_time(end):,.0f} without the host's part")


def report(name, mine, theirs, work):
    """Print one generator's times."""
    line = f"{name:<12} ours {1e3*np.median(mine):8.3f} ms   {work}"
    if theirs:
        r = stats.ratio(theirs, mine)
        line += (f"\n{'':<12} public {1e3*np.median(theirs):6.1f} ms   "
                 f"{r.value:.0f} times [{r.lo:.0f}, {r.hi:.0f}]")
    print(line, flush=True)


def main():
    """Time the three generators."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("visualatom", "rcdb", "fractaldb"): p.add_argument(f"--{name}")
    p.add_argument("--categories", type=int, default=12)
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--points", type=int, default=100_000)
    a = p.parse_args()
    for g, path, call in ((VisualAtom(), a.visualatom, public_atom),
                          (RCDB(), a.rcdb, public_rings)):
        some, mine, theirs, work = g.categories(a.categories, seed=1), [], [], []
        g.render_batch(some[:1], [0], a.size)
        for c in some:
            mine.append(ours(g, c, a.size))
            if path: theirs.append(call(path, c))
            work.append((c.vertices*c.orbits, *written(g, c, a.size)))
        total, seen, bytes_ = np.mean(work, 0)
        report(g.name, mine, theirs,
               f"{total:,.0f} vertices, {seen:,.0f} segments seen, {bytes_:,.0f} bytes written; "
               f"{1e9*np.mean(mine)/total:.0f} ns a vertex")
    g, mine, theirs = FractalDB(points=a.points), [], []
    some = g.categories(min(a.categories, 5), seed=1)
    g.render_batch(some[:1], [0], a.size)
    for c in some:
        mine.append(ours(g, c, a.size))
        if a.fractaldb: theirs.append(public_fractal(a.fractaldb, c, a.points, a.size))
    report(g.name, mine, theirs, f"{a.points:,} points, {9*a.points:,} bytes written; "
           f"{1e9*np.mean(mine)/a.points:.0f} ns a point")
    if have_cupy(): on_gpu()


if __name__ == "__main__": main()
