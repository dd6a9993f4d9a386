"""Time of decoding with masked gated units: `python benchmarks/mglu_decode.py`.

On a CPU: one thread, weights beyond the cache, bfloat16, float32 and float16, against SwiGLU as
torch runs it and against the same kernel without masks. On a GPU (found by itself): both layers of
the published table, cold weights by rotating copies, CUDA graphs, byte masks and packed bits,
SwiGLU as two products, as one, and in 8 bits; achieved bandwidth and its ratio to the measured copy
bandwidth.
"""

import argparse

import numpy as np
import torch

from yokolab.lab import bench
from yokolab.language import mglu, mglu_cpu

LAYERS = ((8192, 2048), (14336, 4096))          # outputs, inputs


def show(title, times, nbytes, peak):
    """One table: median, range, rate, share of the peak, ratio to SwiGLU."""
    print(f"\n{title}\n{'case':22}{'median us':>11}{'min':>10}{'max':>10}{'GB/s':>9}{'of peak':>9}"
          f"{'x SwiGLU':>10}")
    base = np.array(times["SwiGLU"])
    for name, t in times.items():
        m, rate = np.median(t), nbytes[name]/np.median(t)
        print(f"{name:22}{1e6*m:11.1f}{1e6*min(t):10.1f}{1e6*max(t):10.1f}{rate/1e9:9.1f}"
              f"{rate/peak:9.2f}{np.median(base/np.array(t)):10.2f}")


def on_cpu(args):
    """The compiled kernel, one precision after the other, cases in turn."""
    torch.set_num_threads(1)
    copy, read = bench.copy_bandwidth(), mglu_cpu.read_rate()
    print(f"{bench.hardware()}, {mglu_cpu.cpu_level()}, one thread; copy {copy/1e9:.1f} GB/s, "
          f"read {read/1e9:.1f} GB/s ('of peak' is of the read rate)")
    for d, h in args.layers:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            cases = mglu.decode_cases(d, h, dtype, args.masks, args.naive, args.tokens)
            times = bench.interleave({k: c.run for k, c in cases.items()}, repeats=args.repeats)
            show(f"{d} x {h}, {str(dtype)[6:]}, {args.tokens} token(s)", times,
                 {k: c.nbytes for k, c in cases.items()}, read)
            inside = [f"{n}: {1e12*mglu_cpu.instruction_time(dtype, n):.1f}" for n in args.masks]
            print("instructions alone, ps per weight by masks:", ", ".join(inside))


def on_gpu(args):
    """The Triton kernels on cold weights."""
    peak = bench.copy_bandwidth(2**30, "cuda")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"{bench.hardware()}; copy {peak/1e12:.2f} TB/s, second-level cache {cache/2**20:.0f} MB")
    for d, h in args.layers:
        copies = max(2, -(-4*cache//(2*d*h)))
        configs = mglu.tune(d, h, args.masks, copies) if args.tokens == 1 else {}
        print(f"\nconfigurations: {configs}")
        for hot in (False, True):
            cases = [mglu.gpu_cases(d, h, args.masks, args.naive, args.tokens, configs=configs)
                     for _ in range(1 if hot else copies)]
            times = mglu.cold_times(cases, args.repeats)
            show(f"{d} x {h}, float16, {args.tokens} token(s), "
                 f"{'hot: one copy' if hot else f'cold: {copies} copies'}", times,
                 {k: c.nbytes for k, c in cases[0].items()}, peak)
            del cases
            torch.cuda.empty_cache()


def main():
    """Read the arguments and measure."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: tuple(int(v) for v in text.split(",") if v)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--masks", type=numbers, help="numbers of masks, 1,2,4,8")
    p.add_argument("--naive", type=numbers, help="numbers of masks of the naive unit")
    p.add_argument("--tokens", type=int, default=1)
    layers = lambda text: tuple(numbers(v.replace("x", ",")) for v in text.split())
    p.add_argument("--layers", type=layers, help="outputs x inputs, '14336x4096'")
    p.add_argument("--repeats", type=int)
    args = p.parse_args()
    gpu = args.device == "cuda"
    args.masks = args.masks or ((1, 2, 4, 8, 16) if gpu else (1, 2, 4, 8))
    args.naive = (((1, 2, 4, 8) if gpu else ()) if args.naive is None else args.naive)
    args.layers = args.layers or (LAYERS if gpu else LAYERS[1:])
    args.repeats = args.repeats or (200 if gpu else 9)
    (on_gpu if gpu else on_cpu)(args)


if __name__ == "__main__": main()
