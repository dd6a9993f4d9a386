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
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 5])
def test_equal_to_serial(ranks, tmp_path):
    mp.spawn(_work, (ranks, str(tmp_path / "store")), nprocs=ranks)


def test_units_cover_all_points_in_order():
    from yokolab.hpc.partition import make_units
    h = np.random.default_rng(0).poisson(9, 512) * (np.arange(512) % 7 > 0)
    u = make_units(h, 50, 5)
    assert u.count.sum() == h.sum() and (np.diff(u.owner) >= 0).all() and u.owner.max() == 4
    share = np.bincount(u.owner, u.count); assert share.max() < 1.6 * share.min()
