"""The Triton kernel under its interpreter, in a process of its own."""
import importlib.util
import os
import subprocess
import sys

import pytest

CODE = """
import torch
from yokolab.hpc.gpu import direct_gpu
g = torch.Generator().manual_seed(0)
x, s = torch.rand(90, 3, generator=g), torch.rand(90, 3, generator=g); y = torch.cat([x[:20],
    torch.rand(30, 3, generator=g)])
d = y[:, None] - x[None]; r = d.norm(dim=-1); f = torch.where(r > 0, r, torch.inf)**-3
ref = torch.einsum("ijk,ij->ik", torch.linalg.cross(s[None].expand_as(d), d), f)
assert (direct_gpu(x, s, y) - ref).norm() < 1e-5 * ref.norm()
try: direct_gpu(x, s[:, :2])
except ValueError as e: assert "strengths" in str(e)
else: raise AssertionError
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_pair_sum_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
