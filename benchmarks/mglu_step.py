"""Time of a training step of the masked gated unit: `python benchmarks/mglu_step.py`.

Complementary form against the listing of its source (2 n products per pass instead of 1 + n) and
against SwiGLU, in turn in one process; on a GPU also the fused Triton kernels, in bfloat16.
"""

import argparse

import numpy as np
import torch

from yokolab.lab import bench, stats
from yokolab.language import mglu


def main():
    """Read the arguments and measure."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--outputs", type=int)
    p.add_argument("--inputs", type=int)
    p.add_argument("--tokens", type=int)
    p.add_argument("--masks", default="1,2,4,8")
    p.add_argument("--repeats", type=int, default=9)
    args = p.parse_args()
    gpu = args.device == "cuda"
    d, h, tokens = args.outputs or (8192 if gpu else 1024), args.inputs or (2048 if gpu else 512), \
        args.tokens or (16384 if gpu else 512)
    if not gpu: torch.set_num_threads(1)
    dtype = torch.bfloat16 if gpu else torch.float32
    print(f"{bench.hardware()}: {d} x {h}, {tokens} tokens, {str(dtype)[6:]}")
    for n in map(int, args.masks.split(",")):
        steps = mglu.step_cases(d, h, tokens, n, dtype=dtype, device=args.device, fused=gpu)
        times = bench.interleave(steps, repeats=args.repeats, warmup=2)
        medians = (f"{k} {1e3*np.median(t):.2f} ms" for k, t in times.items())
        print(f"{n} mask(s): " + ", ".join(medians))
        print(f"   listing / complementary {stats.ratio(times['direct'], times['complement'])}, "
              f"products {mglu.step_products('direct', n)/mglu.step_products('complement', n):.2f}")


if __name__ == "__main__": main()
