"""Sweeps: grids, a local cluster, a real scheduler with two workers of which one is killed."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from yokolab.lab.runs import results

pytest.importorskip("distributed")


def dask(*args):
    """A dask command as a process of its own."""
    env = os.environ | dict(PYTHONPATH=os.getcwd(), PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable, "-m", "dask", *args], env=env, text=True,
                            start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def start_sweep(*args, quiet=False):
    """A sweep of `darts` in the background, in a session of its own."""
    out = subprocess.DEVNULL if quiet else subprocess.PIPE
    env = os.environ | dict(PYTHONPATH=os.getcwd(), COLUMNS="160")
    ready = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    main = "from yokolab.lab.cli import main; main()" # a parent may have SIGINT ignored
    command = [sys.executable, "-c", ready + main, "sweep", "darts"]
    for a in args: command += ["-p", a] if "=" in a else a.split()
    return subprocess.Popen(command, env=env, stdout=out, text=True, start_new_session=True,
                            stderr=subprocess.DEVNULL if quiet else subprocess.STDOUT)


def wait_for_a_run(seconds=60):
    """Until one run is finished."""
    t0 = time.monotonic()
    while len(results("darts")) < 1 and time.monotonic() - t0 < seconds: time.sleep(0.1)


@pytest.fixture
def cluster():
    """Address of a `dask scheduler` and its two `dask worker` processes."""
    s = dask("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard")
    lines = (re.search(r"Scheduler at:\s+(tcp://\S+)", line) for line in s.stdout)
    address = next(m[1] for m in lines if m)
    worker = ("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
    workers = [dask(*worker) for _ in range(2)]
    yield address, workers
    for p in (*workers, s):
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        p.stdout.close()


def test_a_killed_worker_loses_nothing(project, yokolab, cluster):
    address, workers = cluster
    sweep = start_sweep("seed=0..5", "pause=0.15", f"--scheduler {address}")
    wait_for_a_run()
    os.killpg(workers[0].pid, signal.SIGKILL)
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out
    f = results("darts")
    assert sorted(f.seed) == list(range(6)) and set(f.C1) == {"confirmed"} and "6/6 done" in out


def test_local_sweep_one_failure_does_not_stop_the_others(make_project, edit, yokolab):
    make_project(edit(6, "r, hits = ", "1 / (seed - 2)\nr, hits = "))
    done = yokolab("sweep", "darts", "-p", "seed=0..4", "-j", 2)
    assert done.returncode == 1
    assert "4/5 done, 1 failed" in done.stdout and "ZeroDivisionError" in done.stdout
    assert sorted(results("darts").seed) == [0, 1, 3, 4]
    again = yokolab("sweep", "darts", "-p", "seed=0..1", "-j", 2)
    assert again.returncode == 0 and "2/2 done" in again.stdout


def test_interrupt_and_repeat(project, yokolab):
    p = start_sweep("seed=0..5", "pause=0.1", "-j 2")
    wait_for_a_run()
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=60)
    assert p.returncode == 130
    written = lambda d: (project / f"runs/darts/{d}/notebook.ipynb").stat().st_mtime_ns
    finished = set(results("darts").digest)
    assert 1 <= len(finished) < 6
    first = {d: written(d) for d in finished}
    assert yokolab("sweep", "darts", "-p", "seed=0..5", "-p", "pause=0.1", "-j", 2).returncode == 0
    assert len(results("darts")) == 6 and first == {d: written(d) for d in finished}


def test_two_sweeps_at_once(project):
    both = [start_sweep("seed=0..3", "pause=0.05", "-j 2") for _ in range(2)]
    assert [p.communicate(timeout=120) and p.returncode for p in both] == [0, 0]
    f = results("darts")
    assert sorted(f.seed) == [0, 1, 2, 3]
    for d in f.digest:                                       # ten rounds: nobody wrote twice
        assert len((project / f"runs/darts/{d}/metrics.jsonl").read_text().splitlines()) == 10


def test_kill_9_in_the_middle_of_a_sweep(project, yokolab):
    p = start_sweep("seed=0..5", "pause=0.1", "-j 2", quiet=True)
    wait_for_a_run()
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    finished = len(results("darts"))
    states = yokolab("results", "darts", "--all").stdout
    assert 1 <= finished < 6 and "interrupted" in states
    assert yokolab("sweep", "darts", "-p", "seed=0..5", "-p", "pause=0.1", "-j", 2).returncode == 0
    f = results("darts")
    assert len(f) == 6 and set(f.C1) == {"confirmed"}


def test_no_scheduler(project, yokolab):
    done = yokolab("sweep", "darts", "--scheduler", "tcp://127.0.0.1:9")
    assert done.returncode == 3 and "dask scheduler" in done.stderr


def test_python_sweep(project):
    from distributed import Client, LocalCluster

    from yokolab.lab import sweep
    here = dict(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False)
    before = dict(os.environ)
    with LocalCluster(**here) as cluster, Client(cluster) as client:
        s = sweep("darts", client=client, seed=range(2), profile="smoke")
    assert sorted(s.frame().seed) == [0, 1] and "YOKOLAB_RUNS" not in set(os.environ) - set(before)


def test_a_worker_with_other_code_refuses(project):
    from yokolab.lab.sweeps import _task
    args = ("cpu", "inline", str(project), str(project / "runs"))
    o = _task("darts", dict(seed=1), "0" * 20, *args)
    assert o.state == "failed" and "another checkout" in o.error and results("darts").empty


def test_values_that_are_equal_are_one_run(project):
    from distributed import Client, LocalCluster

    from yokolab.lab import sweep
    here = dict(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False)
    with LocalCluster(**here) as cluster, Client(cluster) as client:
        s = sweep("darts", client=client, pause=[0, 0.0], profile="smoke")
    assert len(s.outcomes) == len(s.frame()) == 1
