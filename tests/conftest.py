"""Fixtures: a throw-away project with one small study."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def same_modules():
    """A run in this process may import modules anew; later tests keep the classes they know."""
    known = {k: m for k, m in sys.modules.items() if k.startswith("yokolab.")}
    yield
    sys.modules.update(known)


INI = """[lab]
title = t
subtitle = s
[areas]
10_play = Play | games
[profiles]
smoke = 20
cpu = 300
[runs]
folder = runs
promoted = figures
engine = inline
[site]
folder = _site
repository = https://example.org/repo
"""
DARTS = [
    ("md", "# Darts study\n> pi from random points"),
    ("parameters", "n: int = 2000  # points\nseed: int = 0  # random seed\n"
                   "pause: float = 0.0  # s a step"),
    ("profiles", "profiles = dict(smoke=dict(n=10), cpu=dict(), full=dict(n=20_000))"),
    ("claims", "claims = dict(\n    C1=dict(text='pi', source='school, p. 1', kind='number', "
               "target='in [3, 3.3]'),\n    C2=dict(text='big', source='school, p. 2', "
               "kind='trend', target='> 0', profiles='full'))"),
    ("", "import random\nimport time\nimport matplotlib.pyplot as plt\n"
         "from yokolab.lab import begin"),
    ("", "lab = begin('darts')"),
    ("", "r, hits = random.Random(seed), []\n"
         "for i in lab.track(range(10), 'rounds'):\n"
         "    hits.append(sum(r.random()**2 + r.random()**2 < 1 for _ in range(n // 10)))\n"
         "    lab.metric('pi', 40 * sum(hits) / (len(hits) * n), step=i)\n"
         "    time.sleep(pause)"),
    ("", "fig, ax = plt.subplots(figsize=(3, 2))\nax.plot(hits)\nax.set_xlabel('round')\n"
         "lab.figure('hits', fig, alt='Hits per round, a flat line.', caption='Hits per round.')"),
    ("", "lab.claim('C1', 4 * sum(hits) / n)\nlab.claim('C2', 1.0, ci=(0.5, 1.5), seeds=(seed,))"),
    ("", "lab.summary()"),
]


def write_notebook(path, cells):
    """A notebook file from (tag or 'md', source) pairs."""
    js = [dict(cell_type="markdown" if t == "md" else "code", id=f"c{i}", source=s,
               metadata=dict(tags=[t]) if t not in ("", "md") else {},
               **({} if t == "md" else dict(outputs=[], execution_count=None)))
          for i, (t, s) in enumerate(cells)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(dict(cells=js, metadata={}, nbformat=4, nbformat_minor=5)))
    return Path(path)


@pytest.fixture
def make_project(tmp_path, monkeypatch):
    """(cells) -> root of a project whose only study is `darts`."""
    monkeypatch.delenv("YOKOLAB_RUNS", raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def make(cells=DARTS):
        (tmp_path / "settings.ini").write_text(INI)
        write_notebook(tmp_path / "nbs/10_play/10_darts_study.ipynb", cells)
        monkeypatch.setenv("YOKOLAB_ROOT", str(tmp_path))
        return tmp_path
    return make


@pytest.fixture
def project(make_project):
    """A project with the study `darts`."""
    return make_project()


def changed(i, old, new, cells=DARTS):
    """The cells with one replacement in cell `i`."""
    assert old in cells[i][1]
    return [(t, s.replace(old, new)) if k == i else (t, s) for k, (t, s) in enumerate(cells)]


@pytest.fixture
def edit():
    """The function `changed`."""
    return changed


@pytest.fixture
def yokolab():
    """(args) -> completed process of the command line, with this checkout on the path."""
    def call(*args, env=None, timeout=120, **kw):
        e = os.environ | dict(PYTHONPATH=str(ROOT), COLUMNS="160", NO_COLOR="1") | (env or {})
        return subprocess.run([sys.executable, "-m", "yokolab", *map(str, args)], env=e, text=True,
                              capture_output=True, timeout=timeout, **kw)
    return call
