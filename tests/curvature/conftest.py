import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank, run, ranks, folder):
    "What one process does: join, run, leave its result"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank,
                            world_size=ranks)
    torch.save(run(rank, ranks), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request):
    "Results of `in_process(rank, ranks)` of the test's module in 2 and 4 real processes"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (request.module.in_process, request.param, folder), nprocs=request.param)
        yield [torch.load(Path(folder) / f"{r}.pt") for r in range(request.param)]


@pytest.fixture
def curvlinops():
    "The reference package; its import warns about torch's own deprecations"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
