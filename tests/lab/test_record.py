"""What a running study says: by hand, under an engine, with values of every kind."""
import json
import math
import os
import subprocess
import sys

import pytest

from yokolab.lab.context import ATTEMPT, CURRENT, ENV, Context, current
from yokolab.lab.parameters import StudyError
from yokolab.lab.record import begin
from yokolab.lab.runs import plan
from yokolab.lab.store import LabError, RunFolder, read_metrics, start


@pytest.fixture
def lab(project):
    """A `Lab` as the inline engine makes it, in a run of `darts`."""
    p = plan("darts")
    start(p.folder, p.study, p.params, p.profile, "inline")
    token = CURRENT.set(Context(p.study, p.folder, p.profile, p.params, show=lambda x: None))
    yield begin("darts")
    CURRENT.reset(token)


def by_hand(code, **env):
    """Python that runs `code` as a notebook would, in the project of $YOKOLAB_ROOT."""
    env = os.environ | dict(PYTHONPATH=os.getcwd()) | env
    code = "from yokolab.lab import begin\n" + code
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)


def test_by_hand_the_notebooks_own_values_count(project):
    done = by_hand("n, seed, pause = 7, 1, 0.0\nlab = begin('darts')\nprint(lab.params['n'])")
    assert done.stdout.strip() == "7", done.stderr
    wrong = by_hand("n = 'seven'\nbegin('darts')")
    assert "n='seven': not of type int" in wrong.stderr


def test_by_hand_a_profile_replaces_the_values(project):
    done = by_hand("n = 7\nlab = begin('darts')\nprint(n, lab.profile)", YOKOLAB_PROFILE="smoke")
    assert done.stdout.strip() == "10 smoke", done.stderr
    assert "did you mean 'smoke'" in by_hand("begin('darts')", YOKOLAB_PROFILE="smok").stderr


def test_by_hand_nothing_old_is_taken(project):
    code = ("lab = begin('darts')\nprint(lab.keep('x', lambda: {}))\n"
            "lab.claim('C1', 3.1); print(lab.claim('C1', 3.2))\nlab = begin('darts')\n"
            "print(lab.keep('x', lambda: 9), lab.summary()[0].measured)")
    for piece in (1, 2):                       # a second kernel, whose cell says something else
        done = by_hand(code.format(piece))
        assert done.stdout.split() == [str(piece), "confirmed", "9", "None"], done.stderr


def test_by_hand_two_kernels_do_not_share_a_folder(project):
    with RunFolder(project / "runs/darts/interactive").lock():
        done = by_hand("begin('darts')")
    assert done.returncode and "another kernel runs darts by hand" in done.stderr


def test_begin_once(lab):
    with pytest.raises(StudyError, match="called before in this run"): begin("darts")
    with pytest.raises(StudyError, match="in the study of 'darts'"): begin("drats")


def test_an_orphaned_kernel_is_told(project, monkeypatch):
    p = plan("darts")
    start(p.folder, p.study, p.params, p.profile, "papermill")
    (p.folder.path / "ticket.json").write_text(json.dumps(dict(attempt="the new one")))
    monkeypatch.setenv(ENV, str(p.folder.path))
    monkeypatch.setenv(ATTEMPT, "the old one")
    with pytest.raises(LabError, match="an attempt that has ended"): current("darts", {})


def test_metrics_of_every_type(lab):
    import numpy as np
    import torch
    values = [1, 2.5, True, np.float32(0.5), np.int64(3), np.array([4.0]), torch.tensor(0.25),
              torch.ones(1, requires_grad=True), math.nan, math.inf]
    for i, v in enumerate(values): lab.metric("x", v, step=np.int64(i), seed=np.int64(0), m="a")
    rows = read_metrics(lab.folder / "metrics.jsonl")
    assert [r["value"] for r in rows[:8]] == [1, 2.5, 1, 0.5, 3, 4, 0.25, 1]
    assert math.isnan(rows[8]["value"]) and rows[9]["value"] == math.inf
    assert [r["step"] for r in rows] == list(range(10)) and rows[0]["seed"] == 0


@pytest.mark.parametrize("value,more", [
    ("many", {}), (None, {}), ([1, 2], {}), (1.0, dict(step="first")), (1.0, dict(tag=object()))])
def test_what_is_no_metric_is_named(lab, value, more):
    with pytest.raises(StudyError, match="metric 'gap'"): lab.metric("gap", value, **more)
    assert not (lab.folder / "metrics.jsonl").exists()                 # and nothing is written


def test_tracks_nest(lab):
    bars = lambda: [(b["done"], b["total"]) for b in lab._bars]
    seen = []
    for _ in lab.track(range(2)):
        for _ in lab.track(range(2)): seen.append(bars())
        seen.append(bars())
    assert seen == [[(0, 2), (0, 2)], [(0, 2), (1, 2)], [(0, 2)],
                    [(1, 2), (0, 2)], [(1, 2), (1, 2)], [(1, 2)]]
    assert bars() == []
    assert list(lab.track((i for i in "ab"), total=2)) == ["a", "b"]
    for _ in lab.track(range(3)): break
    assert bars() == []


def test_a_claim_is_measured_once(lab):
    assert lab.claim("C1", 3.2) == "confirmed"
    with pytest.raises(StudyError, match="measured before in this run"): lab.claim("C1", 3.1)
    with pytest.raises(StudyError, match="did you mean 'C"): lab.claim("C3", 3.1)
    assert [c.measured for c in lab.summary()] == [3.2, None]


def test_figures_and_tables_are_checked(lab):
    import matplotlib.pyplot as plt
    import pandas as pd
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    lab.figure("up", fig, alt="A line rises.")
    frame = pd.DataFrame(dict(x=[1]))
    lab.table("2-costs", frame)
    assert json.loads((lab.folder / "figures.json").read_text())[1]["kind"] == "table"
    for f, message in ((lambda: lab.figure("up", fig, alt="Again."), "there is one of this name"),
                       (lambda: lab.table("up", frame), "there is one of this name"),
                       (lambda: lab.figure("a", fig), "alt is empty"),
                       (lambda: lab.figure("a b", fig, alt="x"), "letters, digits"),
                       (lambda: lab.table("../a", frame), "letters, digits"),
                       (lambda: lab.table("a", [1, 2]), "is not a DataFrame")):
        with pytest.raises(StudyError, match=message): f()
    with pytest.raises(TypeError, match="not a Matplotlib figure"): lab.figure("a", ax, alt="x")


def test_keep(lab):
    assert lab.keep("a 1", lambda: [1, 2]) == lab.keep("a 1", lambda: 1 / 0) == [1, 2]
    (lab.folder / "keep" / "a 1.pkl").write_bytes(b"half")
    assert lab.keep("a 1", lambda: 3) == 3                             # damaged: computed again
    for key in ("", "a/b", ".a", "../a", "x" * 201):
        with pytest.raises(StudyError, match="keep key"): lab.keep(key, int)
    with pytest.raises(StudyError, match="cannot be pickled"): lab.keep("f", lambda: lambda: 1)
