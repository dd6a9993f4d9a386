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
    return subprocess.Popen([sys.executable, "-m", "dask", *args], env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def cluster():
    """Address of a `dask scheduler` and its two `dask worker` processes."""
    s = dask("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard")
    address = next(m[1] for line in s.stdout if (m := re.search(r"Scheduler at:\s+(tcp://\S+)", line)))
    workers = [dask("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(2)]
    yield address, workers
    for p in (*workers, s):
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        p.stdout.close()


def test_a_killed_worker_loses_nothing(project, yokolab, cluster):
    address, workers = cluster
    args = [sys.executable, "-m", "yokolab", "sweep", "darts", "-p", "seed=0..5", "-p", "pause=0.15",
            "--scheduler", address]
    env = os.environ | dict(PYTHONPATH=os.getcwd(), COLUMNS="160")
    sweep = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    t0 = time.monotonic()
    while len(results("darts")) < 1 and time.monotonic() - t0 < 60: time.sleep(0.1)
    os.killpg(workers[0].pid, signal.SIGKILL)
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out
    f = results("darts")
    assert sorted(f.seed) == list(range(6)) and set(f.C1) == {"confirmed"} and "6/6 done" in out


def test_local_sweep_one_failure_does_not_stop_the_others(make_project, edit, yokolab):
    make_project(edit(6, "r, hits = ", "1 / (seed - 2)\nr, hits = "))
    done = yokolab("sweep", "darts", "-p", "seed=0..4", "-j", 2)
    assert done.returncode == 1 and "4/5 done, 1 failed" in done.stdout and "ZeroDivisionError" in done.stdout
    assert sorted(results("darts").seed) == [0, 1, 3, 4]
    again = yokolab("sweep", "darts", "-p", "seed=0..1", "-j", 2)
    assert again.returncode == 0 and "2/2 done" in again.stdout


def test_interrupt_and_repeat(project, yokolab):
    args = [sys.executable, "-m", "yokolab", "sweep", "darts", "-p", "seed=0..5", "-p", "pause=0.1", "-j", "2"]
    env = os.environ | dict(PYTHONPATH=os.getcwd())
    p = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    t0 = time.monotonic()
    while len(results("darts")) < 1 and time.monotonic() - t0 < 60: time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=60)
    assert p.returncode == 130
    first = {f.parent.name: f.stat().st_mtime_ns for f in (project / "runs/darts").glob("*/notebook.ipynb")}
    finished = set(results("darts").digest)
    assert 1 <= len(finished) < 6
    assert yokolab("sweep", "darts", "-p", "seed=0..5", "-p", "pause=0.1", "-j", 2).returncode == 0
    assert len(results("darts")) == 6
    for d in finished: assert (project / f"runs/darts/{d}/notebook.ipynb").stat().st_mtime_ns == first[d]


def test_two_sweeps_at_once(project):
    args = [sys.executable, "-m", "yokolab", "sweep", "darts", "-p", "seed=0..3", "-p", "pause=0.05", "-j", "2"]
    env = os.environ | dict(PYTHONPATH=os.getcwd())
    both = [subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)]
    assert [p.communicate(timeout=120) and p.returncode for p in both] == [0, 0]
    f = results("darts")
    assert sorted(f.seed) == [0, 1, 2, 3]
    for d in f.digest:                                                 # ten rounds each: nobody wrote twice
        assert len((project / f"runs/darts/{d}/metrics.jsonl").read_text().splitlines()) == 10


def test_kill_9_in_the_middle_of_a_sweep(project, yokolab):
    args = [sys.executable, "-m", "yokolab", "sweep", "darts", "-p", "seed=0..5", "-p", "pause=0.1", "-j", "2"]
    env = os.environ | dict(PYTHONPATH=os.getcwd())
    p = subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    t0 = time.monotonic()
    while len(results("darts")) < 1 and time.monotonic() - t0 < 60: time.sleep(0.1)
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
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False) as c, Client(c) as client:
        s = sweep("darts", client=client, seed=range(2), profile="smoke")
    assert sorted(s.frame().seed) == [0, 1]
