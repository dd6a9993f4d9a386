"""What goes wrong in practice, done for real: each a clear message and exit code, and nothing finished is lost."""
import os
import signal
import subprocess
import sys
import time

import pytest

from yokolab.lab.runs import plan, results, run


def start(*args, **env):
    """The command line in the background."""
    return subprocess.Popen([sys.executable, "-m", "yokolab", *map(str, args)], text=True, start_new_session=True,
                            env=os.environ | dict(PYTHONPATH=os.getcwd()) | env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def wait_for(condition, seconds=60):
    """Poll until something is true."""
    t0 = time.monotonic()
    while not condition():
        assert time.monotonic() - t0 < seconds, "it never came"
        time.sleep(0.05)


@pytest.mark.parametrize("engine", ["inline", "papermill"])
def test_kill_9_in_the_middle_of_a_run(project, engine):
    if engine == "papermill": pytest.importorskip("papermill")
    finished = run("darts", seed=1)
    folder = plan("darts", pause=0.4).folder
    p = start("run", "darts", "-p", "pause=0.4", "--engine", engine)
    wait_for(lambda: (folder.path / "metrics.jsonl").exists())
    assert folder.state()["state"] == "running"
    os.kill(p.pid, signal.SIGKILL)
    p.communicate()
    assert folder.state()["state"] == "interrupted" and list(results("darts").digest) == [finished.digest]
    again = run("darts", pause=0.4, engine="inline")                   # waits for an orphaned kernel, then starts over
    assert again.state == "done" and list(again.metrics.step) == list(range(10))


def test_a_second_process_waits_for_the_first(project):
    folder = plan("darts", pause=0.2).folder
    p = start("run", "darts", "-p", "pause=0.2")
    wait_for(folder.locked)
    r = run("darts", pause=0.2)
    assert p.wait(30) == 0
    p.stderr.close()
    assert r.info["pid"] == p.pid                                      # its result, not a second computation


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 300 kB."""
    d = tmp_path / "disk"
    d.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(d)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield d
    subprocess.run(["umount", "-l", str(d)], check=True)


def test_full_disk(project, yokolab, small_disk):
    env = dict(YOKOLAB_RUNS=str(small_disk))
    assert yokolab("run", "darts", "-P", "smoke", env=env).returncode == 0
    (small_disk / "ballast").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096 - 8192))
    done = yokolab("run", "darts", env=env)
    assert done.returncode == 3 and "no space left" in done.stderr and "Free some space" in done.stderr
    assert "done" in yokolab("results", "darts", env=env).stdout        # the finished one is intact
    (small_disk / "ballast").unlink()
    assert yokolab("run", "darts", env=env).returncode == 0             # and the same command goes on


def test_unreadable_notebook(project, yokolab):
    path = next(project.glob("nbs/*/*_study.ipynb"))
    path.write_text(path.read_text()[:200])
    for args in (("list",), ("show", "darts"), ("run", "darts")):
        done = yokolab(*args)
        assert done.returncode == 2 and "10_darts_study.ipynb" in done.stderr and "restore it" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("file,text", [("claims.json", '{"topic": "darts", "cl'), ("state.json", ""),
                                       ("metrics.jsonl", '{"name": 1}\n{"na\n{"name": "x", "value": 1}\n')])
def test_corrupt_record(project, yokolab, file, text):
    r = run("darts")
    (r.folder / file).write_text(text)
    done = yokolab("results", "darts")
    assert done.returncode == 3 and file in done.stderr and "run the study again" in done.stderr


def test_missing_dataset(make_project, edit, yokolab):
    cells = edit(1, "n: int", "dataset: str = 'no_such_set'  # data\nn: int")
    cells = [(t, s.replace("lab.summary()", "lab.summary(), dataset")) for t, s in cells]
    make_project(cells)
    done = yokolab("run", "darts")
    assert done.returncode == 3 and "no_such_set" in done.stderr and "YOKOLAB_DATA" in done.stderr


@pytest.mark.parametrize("args,message", [
    (("run", "darts", "-p", "n=many"), "n='many'"), (("run", "darts", "-p", "m=3"), "there are: n, pause, seed"),
    (("run", "darts", "-p", "n"), "name=value"), (("run", "drats"), "did you mean 'darts'"),
    (("run", "darts", "-P", "gpu"), "profile 'gpu'"), (("run", "darts", "--engine", "papermil"), "did you mean 'papermill'"),
    (("sweep", "darts", "-p", "seed=4..1"), "empty range"), (("show", "dart"), "did you mean 'darts'"),
    (("claims", "--state", "confirmd"), "did you mean 'confirmed'"), (("results", "darts", "-o", "x.xls"), ".csv or .parquet")])
def test_usage_errors(project, yokolab, args, message):
    done = yokolab(*args)
    assert done.returncode == 2 and message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_failing_study(make_project, edit, yokolab):
    make_project(edit(6, "r, hits = ", "1 / (n - n)\nr, hits = "))
    done = yokolab("run", "darts")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "log.txt" in done.stderr
