"""The library is what the notebooks export: nothing missing, nothing edited by hand, no orphan."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbdev")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy of the tree after clean and export, the library exported from nothing."""
    d = tmp_path_factory.mktemp("fresh")
    for f in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT / f, d / f)
    shutil.copytree(ROOT / "nbs", d / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (d / "yokolab").mkdir()
    shutil.copy(ROOT / "yokolab" / "__init__.py", d / "yokolab")
    bin = Path(sys.executable).parent
    for cmd in ("nbdev-clean", "nbdev-export"):
        done = subprocess.run([str(bin / cmd)], cwd=d, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    return d


def files(root, pattern):
    """Text by relative path."""
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.glob(pattern))
            if ".ipynb_checkpoints" not in p.parts}


def test_notebooks_are_clean(fresh):
    here, there = files(ROOT, "nbs/**/*.ipynb"), files(fresh, "nbs/**/*.ipynb")
    dirty = [p for p in here if here[p] != there[p]]
    assert not dirty, f"run `make clean` and commit: {dirty}"


def test_library_is_what_the_notebooks_export(fresh):
    here, there = files(ROOT, "yokolab/**/*.py"), files(fresh, "yokolab/**/*.py")
    assert not set(here) - set(there), f"orphans without a notebook: {sorted(set(here) - set(there))}"
    stale = [p for p in there if here.get(p) != there[p]]
    assert not stale, f"run `make export` and commit: {stale}"
