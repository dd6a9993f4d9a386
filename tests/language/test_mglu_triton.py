"""Triton kernels: run by the interpreter, and compiled for a GPU that need not be here."""
import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

DECODE = """
import torch
from yokolab.language.mglu_triton import decode, decode_int8, quantize, ACTS
from yokolab.language.masking import ACTIVATIONS
from yokolab.language.packed import pack_bits, pack_bytes, sums_ref
g = torch.Generator().manual_seed(0)
def ref(x, W, M, act="silu"):
    z = sums_ref(x.double(), W.double(), pack_bits(M))
    return (ACTIVATIONS[act][0](z[1:])*(z[:1] - z[1:])).sum(0)
for n, T, d, h, act in ((1, 1, 5, 70, "silu"), (3, 1, 4, 33, "gelu"), (8, 1, 3, 31, "sigmoid"),
                        (4, 3, 17, 40, "relu"), (2, 16, 5, 64, "identity"), (1, 18, 16, 9, "silu")):
    M = torch.rand(n, d, h, generator=g) > 0.5
    x, W = torch.randn(T, 2*h, generator=g)[:, ::2], torch.randn(2*d, h, generator=g)[::2]
    c = dict(rows=16 if T > 1 else 2, words=1, split=1, warps=4)
    for masks in (pack_bits(M), pack_bytes(M)):
        for split in (1, 2, 3) if T == 1 else (1,):
            out = decode(x, W, masks, n, act, c | dict(split=split))
            torch.testing.assert_close(out.double(), ref(x, W, M, act), rtol=1e-4, atol=1e-4)
M = torch.rand(16, 3, 40, generator=g) > 0.5
x, W = torch.randn(1, 40, generator=g).half(), torch.randn(3, 40, generator=g).half()
out = decode(x, W, pack_bits(M), config=c).double()
torch.testing.assert_close(out, ref(x, W, M), rtol=1e-3, atol=1e-3)
for bad in (lambda: decode(x, W, pack_bits(M)[:2]), lambda: decode(x, W, pack_bytes(M[:8])),
            lambda: decode(x[:, :3], W, pack_bits(M)),
            lambda: decode(x, W, pack_bits(M), None, "tanh")):
    try: bad()
    except ValueError as e: assert "argument" in str(e)
    else: raise AssertionError
q, s = quantize(torch.randn(10, 70, generator=g))
x = torch.randn(2, 70, generator=g)
a, b = x @ (q[:5]*s[:5, None]).mT, x @ (q[5:]*s[5:, None]).mT
torch.testing.assert_close(decode_int8(x, q, s), a*a.sigmoid()*b, rtol=1e-4, atol=1e-4)
for bad in (x[:, :60], x[0]):
    try: decode_int8(bad, q, s)
    except ValueError as e: assert "argument x" in str(e)
    else: raise AssertionError("reads beyond the inputs")
"""

TUNE = """
import torch
from yokolab.language import mglu
from yokolab.language.mglu_triton import CONFIGS, INT8_CONFIGS, decode_int8, quantize
assert len(INT8_CONFIGS) == len(CONFIGS), "the same budget for both"
tried = []
def cold_times(copies, repeats):
    for name in copies[0]:
        for c in copies: c[name].run()
    tried.append(len(copies[0]))
    return {name: [float(name != "7")]*repeats for name in copies[0]}
mglu.cold_times = cold_times
best = mglu.tune(5, 70, (2,), 2, torch.float32, "cpu")
assert tried == [12, 12] and best == {2: CONFIGS[7], 0: INT8_CONFIGS[7]}
g = torch.Generator().manual_seed(0)
q, s = quantize(torch.randn(10, 700, generator=g))
x = torch.randn(1, 700, generator=g)
for c in INT8_CONFIGS: torch.testing.assert_close(decode_int8(x, q, s, c), decode_int8(x, q, s))
cases = mglu.gpu_cases(5, 70, (2,), (), 1, torch.float32, "cpu", best)
assert cases["SwiGLU, INT8"].run().shape == cases["SwiGLU"].run().shape
"""

STEP = """
import torch
from yokolab.language.mglu_triton_step import mglu_fused
from yokolab.language.masking import mglu_ref
g = torch.Generator().manual_seed(0)
def grads(f, *inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return out.detach(), *(t.grad for t in leaves)
for act, n, T, d, h in (("silu", 3, 18, 19, 21), ("gelu", 1, 5, 33, 16), ("sigmoid", 2, 17, 3, 40)):
    x, W, S = (torch.randn(*s, generator=g) for s in ((T, h), (d, h), (n, d, h)))
    x, S = torch.stack([x, x], 1)[:, 0], S.transpose(1, 2).contiguous().transpose(1, 2)
    ours = grads(lambda *a: mglu_fused(*a, act, (16, 16, 16)), x, W, S)
    for a, b in zip(ours, grads(lambda *a: mglu_ref(*a, act), x, W, S), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
for bad in (lambda: mglu_fused(x, W, S, "tanh"), lambda: mglu_fused(x, W, S, block=(8, 16, 16)),
            lambda: mglu_fused(x, W, S[0])):
    try: bad()
    except ValueError as e: assert "argument" in str(e)
    else: raise AssertionError
"""

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from yokolab.language import mglu_triton as m, mglu_triton_step as s
ir = []
def build(f, types, **const):
    sign = {n: types.get(n, "constexpr") for n in f.arg_names}
    const = {(f.arg_names.index(k),): v for k, v in const.items()}
    done = triton.compile(ASTSource(fn=f, signature=sign, constexprs=const),
                          target=GPUTarget("cuda", 90, 32))
    ir.append(done.asm["ttir"])
    return done.asm["ptx"]
size = dict.fromkeys(("M", "N", "NW", "T", "D", "H"), "i32")
half = size | dict(W="*fp16", X="*fp16", Q="*i32", Z="*fp32", O="*fp32")
ptx = build(m._decode, half, NM=4, NP=4, BITS=True, ACT=0, SPLIT=1, BM=2, BW=16)
assert "fma.rn.f32" in ptx
types = {k: v for k, v in half.items() if k != "Z"}
assert "mma" in build(m._tokens, types, NM=2, NP=2, BITS=True, ACT=0, PREC="tf32", BM=16, BW=4)
types = size | dict(W="*bf16", S="*fp32", E="*bf16", GX="*bf16")
assert "mma" in build(s._inputs, types, NM=2, PREC="tf32", BT=64, BD=64, BH=32)
types = size | dict(X="*bf16", W="*bf16", S="*fp32", E="*bf16", GX="*bf16", GW="*bf16", GS="*fp32")
for f in s._inputs, s._weights:          # entries of all masks can number more than 2**31
    build(f, types, NM=3, PREC="tf32", BT=16, BD=16, BH=16)
    narrow = re.findall(r"arith[.]muli [^:]*%H\\b[^:]*: i32", ir[-1])
    assert "%H: i32" in ir[-1] and not narrow, narrow
"""


def run(code, **env):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_decoding_under_the_interpreter(): run(DECODE, TRITON_INTERPRET="1")


def test_method_and_competitor_are_tuned_alike(): run(TUNE, TRITON_INTERPRET="1")


def test_training_step_under_the_interpreter(): run(STEP, TRITON_INTERPRET="1")


@pytest.mark.skipif(importlib.util.find_spec("triton.backends.nvidia") is None
                    if importlib.util.find_spec("triton") else True, reason="no backend")
def test_kernels_compile_for_a_gpu(tmp_path):
    run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_importable_without_triton():
    run("import sys; sys.modules['triton'] = None\n"
        "from yokolab.language import mglu_triton as m, mglu_triton_step\n"
        "try: m.decode(None, None, None)\n"
        "except ImportError as e: assert 'yokolab[gpu]' in str(e)\n"
        "else: raise AssertionError")
