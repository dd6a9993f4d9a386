"""Fixtures of the site's tests: a small generated project, and the site built from it."""
import importlib.util
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def site_project(tmp_path_factory):
    """Root of a generated project: three topics in one area, two of them with a promoted run."""
    pytest.importorskip("nbdev")
    spec = importlib.util.spec_from_file_location("site_64", ROOT / "benchmarks" / "site_64.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.project(tmp_path_factory.mktemp("site") / "minilab", notebooks=6)


@pytest.fixture(scope="session")
def site(site_project):
    """The built site: its `path` and the project's `root`; the one in $YOKOLAB_SITE if set."""
    if given := os.environ.get("YOKOLAB_SITE"):
        return SimpleNamespace(path=Path(given).resolve(), root=ROOT, generated=False)
    for package in ("sphinx", "myst_nb", "pydata_sphinx_theme", "sphinxcontrib.katex"):
        pytest.importorskip(package, reason=f"{package} is not here: pip install 'yokolab[docs]'")
    from yokolab.lab.site import build_site
    built = build_site(site_project)
    return SimpleNamespace(path=built.path, root=site_project, generated=True, built=built)


@pytest.fixture
def site_copy(site_project, site, tmp_path):
    """A copy of the generated project, to be broken."""
    if not site.generated: pytest.skip("YOKOLAB_SITE is set: nothing is built here")
    skip = shutil.ignore_patterns("_site", "_stage")
    return Path(shutil.copytree(site_project, tmp_path / "minilab", ignore=skip))
