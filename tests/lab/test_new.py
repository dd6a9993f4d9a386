"A new topic: every check of the project passes on it, and nothing is ever overwritten"

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from yokolab.lab.new import new_topic
from yokolab.lab.parameters import StudyError
from yokolab.lab.store import library_root
from yokolab.lab.study import read_study

HERE = library_root()


@pytest.fixture
def root(tmp_path):
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(HERE/name, tmp_path)
    shutil.copytree(HERE/"nbs"/"_template", tmp_path/"nbs"/"_template")
    return tmp_path


def tool(root, *command):
    "Run a command in the project with its own package first on the path"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1", PATH=path,
                            YOKOLAB_RUNS=str(root/"runs"))
    env.pop("YOKOLAB_ROOT", None)
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_new_topic_passes_every_check(root):
    for package in ("nbdev", "ruff", "hypothesis"): pytest.importorskip(package)
    shutil.copytree(HERE/"yokolab", root/"yokolab", ignore=shutil.ignore_patterns("__pycache__"))
    method, study, test = new_topic("80_optics", "gossip", 'Gossip "averaging" & more', root)
    before = {p: p.read_text() for p in (method, study)}
    tool(root, sys.executable, "-m", "ruff", "check", "nbs", "tests")
    tool(root, "nbdev-export")
    tool(root, "nbdev-clean")
    assert {p: p.read_text() for p in before} == before            # clean and export change nothing
    tool(root, "nbdev-test", "nbs/80_optics/10_gossip.ipynb", "--n-workers", "0")
    assert "no tests ran" not in tool(root, sys.executable, "-m", "pytest", str(test))
    out = tool(root, sys.executable, "-m", "yokolab", "run", "gossip", "--engine", "inline",
               "--profile", "smoke")
    assert "C1" in out and "confirmed" in out
    run, = (p.parent for p in (root/"runs"/"gossip").glob("*/claims.json"))
    claims = {c["id"]: c for c in json.loads((run/"claims.json").read_text())["claims"]}
    assert claims["C1"]["state"] == "confirmed"
    assert {p.suffix for p in (run/"figures").iterdir()} == {".svg", ".png", ".csv"}
    lines = (root/"yokolab"/"optics"/"gossip.py").read_text().splitlines()
    assert len(lines) < 300 and max(map(len, lines)) <= 100


def test_the_study_can_be_read(root):
    s = read_study(new_topic("20_federated", "gossip", "Gossip averaging", root)[1])
    assert (s.topic, s.area, s.title) == ("gossip", "20_federated", "Gossip averaging: the study")
    assert {"smoke", "cpu"} <= set(s.profiles) and all(c.profiles for c in s.claims.values())


def test_numbers_go_on_in_tens(root):
    names = [new_topic("federated", n, n.capitalize(), root)[0].name for n in ("alpha", "beta")]
    assert names == ["10_alpha.ipynb", "20_beta.ipynb"]


def test_a_new_area_keeps_the_rest_of_the_settings(root):
    before = (root/"settings.ini").read_text().splitlines()
    new_topic("15_optics", "lens", "Lenses", root, area_title="Optics of lenses")
    after = (root/"settings.ini").read_text().splitlines()
    added, = [l for l in after if l not in before]
    assert added == "15_optics = Optics of lenses | optics of lenses"
    assert [l for l in after if l != added] == before
    areas = [l for l in after if l[:2].isdigit()]
    assert areas == sorted(areas)


@pytest.mark.parametrize("area, name, title, words", [
    ("federated", "Gossip", "T", "lower-case letters"),
    ("federated", "a-b", "T", "name='a-b'"),
    ("federated", "import", "T", "name='import'"),
    ("federated", "2d", "T", "name='2d'"),
    ("federated", "gossip_study", "T", "_study"),
    ("federated", "gossip", "", "title=''"),
    ("federated", "gossip", "a\nb", "one line"),
    ("federatd", "gossip", "T", "did you mean '20_federated'"),
    ("30_federated", "gossip", "T", "the area is '20_federated'"),
    ("00_lab", "gossip", "T", "no topics"),
    ("../x", "gossip", "T", "area='../x'"),
])
def test_what_cannot_be_is_refused_and_nothing_is_written(root, area, name, title, words):
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with pytest.raises(StudyError) as e: new_topic(area, name, title, root)
    assert words in str(e.value)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("there", ["yokolab/federated/gossip.py", "tests/federated/test_gossip.py",
                                   "nbs/20_federated/00_gossip.ipynb",
                                   "nbs/50_vision/10_gossip_study.ipynb"])
def test_nothing_is_overwritten(root, there):
    (root/there).parent.mkdir(parents=True)
    (root/there).write_text("mine")
    with pytest.raises(StudyError, match="exists"): new_topic("federated", "gossip", "T", root)
    assert (root/there).read_text() == "mine"


def test_without_a_template_the_checkouts_is_used(root):
    shutil.rmtree(root/"nbs"/"_template")
    assert new_topic("federated", "gossip", "T", root)[0].is_file()


def test_the_template_is_clean():
    for name in ("method.ipynb", "study.ipynb"):
        nb = json.loads((HERE/"nbs"/"_template"/name).read_text())
        code = [c for c in nb["cells"] if c["cell_type"] == "code"]
        assert all(len(c["source"]) <= 26 for c in code)
        if name == "study.ipynb": assert not any(c["outputs"] for c in code)
