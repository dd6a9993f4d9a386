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


def test_batched_m2l_equals_the_compiled_one():
    import numpy as np
    import torch
    pytest.importorskip("numba", reason="needs the extra hpc")
    from yokolab.hpc.batched import m2l_batched, m2l_matrices, m2l_pairs
    from yokolab.hpc.fmm import Plan
    from yokolab.hpc.sweeps import downward, upward
    rng = np.random.default_rng(3); x = rng.random((3000, 3))
    p = Plan(x, kind="biot", eps=1e-3, ncrit=20, threads=1)
    M = upward(p, np.concatenate([p.points, rng.standard_normal((3, 3000))]))
    got = m2l_batched(m2l_matrices(p, dtype=torch.float64), torch.from_numpy(M)).numpy()
    a, b = p.tree.first[2:4]  # the first level with expansions gets nothing from its parents
    want = downward(p, p.points, M)[a:b] if not len(p.lists.p2l[1]) else None
    assert len(m2l_pairs(p, 0)[0]) and want is not None
    assert np.linalg.norm(got[a:b] - want) < 1e-12 * np.linalg.norm(want) > 0
