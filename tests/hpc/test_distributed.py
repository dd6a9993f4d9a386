"""Sums over several processes equal the serial one."""
import numpy as np
import pytest
import torch.multiprocessing as mp

pytest.importorskip("numba", reason="needs the extra hpc")


def _work(rank, ranks, file):
    import torch.distributed as dist

    from yokolab.hpc.distributed import distributed_sum
    from yokolab.hpc.fmm import Plan, solve
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    rng = np.random.default_rng(0); n = 4000
    x, g = rng.random((n, 3))**3, rng.standard_normal((n, 3))
    part = slice(rank * n // ranks, (rank + 1) * n // ranks)
    got, traffic = distributed_sum(x[part], g[part], 2, 1e-4, ncrit=32)
    want = solve(Plan(x, kind="biot", eps=1e-4, ncrit=32, threads=1), g, 2)[0][part]
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()
    assert ranks == 1 or (traffic.cells > 0 and traffic.halo < 56 * n)
    far = x[part] * .1 + 1e9 if rank else np.zeros((0, 3)) # far away, and a rank without points
    got = distributed_sum(far, g[part] if rank else far, 2, 1e-3, ncrit=32)[0]
    every = np.concatenate([x[r * n // ranks:(r + 1) * n // ranks] for r in range(1, ranks)])
    gs = g[n // ranks:]
    want = solve(Plan(every * .1 + 1e9, kind="biot", eps=1e-3, ncrit=32, threads=1), gs, 2)[0]
    if rank: assert np.abs(got - want[(rank * n // ranks) - n // ranks:][:len(got)]).max() <= (
        1e-12 * np.abs(want).max())
    bad = x[part] * (np.nan if rank == 1 else 1) # every rank raises, none waits
    with pytest.raises(ValueError, match="row 0" if rank == 1 else "another rank"):
        distributed_sum(bad, g[part], 2, 1e-3)
    assert distributed_sum(far[:0], far[:0], 3)[0].shape == (0, 12)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [5])
def test_equal_to_serial(ranks, tmp_path):
    mp.spawn(_work, (ranks, str(tmp_path / "store")), nprocs=ranks)


def test_units_cover_all_points_in_order():
    from yokolab.hpc.partition import make_units
    h = np.random.default_rng(0).poisson(9, 512) * (np.arange(512) % 7 > 0)
    u = make_units(h, 50, 5)
    assert u.count.sum() == h.sum() and (np.diff(u.owner) >= 0).all() and u.owner.max() == 4
    share = np.bincount(u.owner, u.count); assert share.max() < 1.6 * share.min()


@pytest.mark.slow
def test_traffic_follows_the_surface():
    import json
    import subprocess
    import sys
    from pathlib import Path
    script = Path(__file__).parents[2] / "benchmarks" / "vortex_fmm.py"
    done = subprocess.run(
        [sys.executable, script, "volume", "--sizes", "20000", "--eps", "1e-3", "--ranks", "8",
         "--worker"],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(l) for l in done.stdout.splitlines()]
    assert [r["ranks"] for r in rows] == [8]; r = rows[0]
    assert r["gap"] < 1e-12 and .8 < r["halo"] / r["halo_model"] < 1.3  # shells of a parent cell
    assert .8 < r["cells"] / r["cells_model"] < 1.3
