"""Many runs in one process, and two engines that agree on what goes wrong."""
import json
import os
import re
import subprocess
import sys
import time

import pytest

from yokolab.lab import isolation
from yokolab.lab.promote import promote
from yokolab.lab.runs import RunFailed, plan, run
from yokolab.lab.store import LabError, RunFolder, library_root

SPOIL = ("import os, sys, random, warnings\nimport numpy as np\nimport torch\n"
         "lab.metric('here', os.path.samefile(os.getcwd(), os.environ['HOME_OF_TEST']))\n"
         "lab.metric('size', plt.rcParams['font.size'])\n"
         "lab.metric('double', torch.tensor(0.1).dtype == torch.float64)\n"
         "lab.metric('leak', 'LEAK' in os.environ)\nlab.metric('figures', len(plt.get_fignums()))\n"
         "lab.metric('draw', random.random())\n"
         "os.chdir('/'); os.environ['LEAK'] = '1'; sys.path.insert(0, '/')\n"
         "np.seterr(all='ignore')\n"
         "plt.rcParams['font.size'] = 30; plt.figure(); random.seed(0); np.random.seed(0)\n"
         "torch.manual_seed(0); torch.set_default_dtype(torch.float64)\n")


@pytest.fixture
def spoiled(make_project, edit, monkeypatch):
    """A project whose study changes whatever it can reach."""
    root = make_project(edit(6, "r, hits = ", SPOIL + "r, hits = "))
    monkeypatch.setenv("HOME_OF_TEST", str(root))
    return root


def test_a_run_sees_nothing_of_the_one_before(spoiled):
    before = os.getcwd(), dict(os.environ), list(sys.path)
    first, second = (run("darts", seed=s).metrics.set_index("name").value for s in (1, 2))
    assert (os.getcwd(), dict(os.environ), list(sys.path)) == before
    same = ["here", "size", "double", "leak", "figures"]
    assert list(first[same]) == list(second[same]) == [1, first["size"], 0, 0, 0]
    assert first["size"] != 30 and first["draw"] != second["draw"]


def test_both_engines_start_alike(spoiled):
    pytest.importorskip("papermill")
    read = lambda e: run("darts", engine=e, force=True).metrics.set_index("name").value
    names = ["here", "size", "double", "leak", "figures"]
    assert list(read("inline")[names]) == list(read("papermill")[names])


@pytest.mark.parametrize("engine", ["inline", "papermill"])
@pytest.mark.parametrize("line,name", [
    ("open('no such file')", "FileNotFoundError"), ("raise SystemExit(3)", "SystemExit"),
    ("import yokolab.lab.store as s; raise s.LabError('x')", "LabError")])
def test_errors_are_failures_of_the_study(make_project, edit, engine, line, name):
    if engine == "papermill": pytest.importorskip("papermill")
    make_project(edit(6, "r, hits = ", f"{line}\nr, hits = "))
    with pytest.raises(RunFailed, match=name) as e: run("darts", engine=engine)
    assert e.value.run.state == "failed" and name in e.value.run.log


def test_a_kernel_that_dies(make_project, edit):
    pytest.importorskip("papermill")
    make_project(edit(6, "r, hits = ", "import os\nos.kill(os.getpid(), 9)\nr, hits = "))
    with pytest.raises(RunFailed, match="the kernel died") as e: run("darts", engine="papermill")
    assert e.value.run.state == "failed"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """(source) -> write the module yokolab.later, in a library folder of its own."""
    import yokolab
    folder = tmp_path / "lib" / "yokolab"
    folder.mkdir(parents=True)
    monkeypatch.setattr(yokolab, "__path__", [*yokolab.__path__, str(folder)])
    real = library_root()
    monkeypatch.setattr("yokolab.lab.digest.library_root", lambda: folder.parent)
    monkeypatch.setattr(isolation, "_LOADED", dict(isolation._LOADED))
    (folder / "lab").symlink_to(real / "yokolab" / "lab")

    def write(source):
        (folder / "later.py").write_text(source)
        os.utime(folder / "later.py", ns=(time.time_ns(), time.time_ns()))
    yield write
    sys.modules.pop("yokolab.later", None)


def test_changed_science_is_imported_again(make_project, edit, library):
    library("VALUE = 1\n")
    make_project(edit(6, "r, hits = ", "from yokolab.later import VALUE\n"
                                       "lab.metric('value', VALUE)\nr, hits = "))
    value = lambda r: r.metrics.set_index("name").value["value"]
    first = run("darts")
    library("VALUE = 20  # of another length\n")
    second = run("darts")
    assert (value(first), value(second)) == (1, 20) and first.digest != second.digest


def test_a_changed_lab_is_refused(project, monkeypatch):
    monkeypatch.setitem(isolation._LOADED, "yokolab.lab.claims", (0, 0))
    with pytest.raises(LabError, match=r"yokolab\.lab\.claims has changed on disk.*restart"):
        run("darts")


def test_code_that_changes_while_one_waits(make_project, edit, library):
    from yokolab.lab.runs import execute
    library("VALUE = 1\n")
    make_project(edit(6, "r, hits = ", "from yokolab.later import VALUE\nr, hits = "))
    p = plan("darts")
    library("VALUE = 2\n")
    with pytest.raises(LabError, match="has changed since this run was planned"): execute(p)


def test_force_computes_again(make_project, edit):
    keeps = "lab.metric('t', lab.keep('t', time.monotonic_ns))\n"
    make_project(edit(6, "r, hits = ", keeps + "r, hits = "))
    first, second = (run("darts", force=True).metrics.value[0] for _ in range(2))
    assert first != second


def test_promotion_waits_for_nobody_and_loses_nothing(project, monkeypatch):
    r = run("darts")
    p = promote("darts")
    old = {f.name: f.read_bytes() for f in p.files}
    with RunFolder(r.folder).lock(), pytest.raises(LabError, match="is being computed again"):
        promote("darts")
    monkeypatch.setattr("yokolab.lab.promote.MAX_FILE", 10)
    with pytest.raises(LabError, match="the limit is 10"): promote("darts")
    assert {f.name: f.read_bytes() for f in p.folder.iterdir()} == old
    assert [d.name for d in p.folder.parent.iterdir()] == ["darts"]


def test_records_are_strict_json(make_project, edit):
    cells = edit(1, "pause: float = 0.0", "limit: float = 1e999")
    cells[6] = ("", cells[6][1].replace("time.sleep(pause)", "limit"))
    make_project(cells)
    run("darts")
    def refuse(x): raise AssertionError(x)
    for f in promote("darts").files:
        if f.suffix in (".json", ".ipynb"): json.loads(f.read_text(), parse_constant=refuse)


def test_the_bar_survives_cells_that_print(make_project, edit, yokolab):
    pty = pytest.importorskip("pty")
    make_project(edit(6, "    time.sleep(pause)", "    print('hit')\n    time.sleep(pause)"))
    ours, theirs = pty.openpty()
    env = os.environ | dict(PYTHONPATH=os.getcwd(), TERM="xterm", COLUMNS="120")
    p = subprocess.Popen([sys.executable, "-m", "yokolab", "run", "darts", "-p", "pause=0.2"],
                         env=env, stdout=theirs, stderr=theirs, stdin=theirs, close_fds=True)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536): shown += chunk
    except OSError: pass                                     # the other end is closed
    finally:
        os.close(ours)
    frames = set(re.findall(rb"rounds (\d+)/10", shown))
    assert p.wait(60) == 0 and len(frames) >= 3, frames      # not only when a cell has ended
    nb = (plan("darts", pause=0.2).folder.path / "notebook.ipynb").read_text()
    assert "\\u001b" not in nb and "rounds 1" not in nb
