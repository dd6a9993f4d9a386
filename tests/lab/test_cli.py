"""The command line as a user meets it."""
import subprocess
import sys

import pytest


def test_run_prints_claims_and_paths(project, yokolab):
    done = yokolab("run", "darts")
    assert done.returncode == 0, done.stderr
    assert all(s in done.stdout for s in ("✓ confirmed", "runs/darts/", "hits.svg"))
    assert "found finished" in yokolab("run", "darts").stdout


def test_show_list_claims_figures(project, yokolab):
    out = yokolab("show", "darts").stdout
    shown = ("Darts study", "points", "int", "smoke", "under 20 s", "C1", "unmeasured")
    assert all(s in out for s in shown)
    assert "2?" in yokolab("list").stdout.replace(" ", "")
    assert yokolab("run", "darts").returncode == 0
    out = yokolab("figures", "darts").stdout
    assert "confirmed" in out and "claims.json" in out
    assert "1✓" in yokolab("list").stdout
    assert "C2" not in yokolab("claims", "--state", "confirmed").stdout
    assert yokolab("claims", "--check").returncode == 0


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_results_to_a_file(project, yokolab, tmp_path, suffix):
    import pandas as pd
    yokolab("run", "darts", "-P", "smoke")
    path = tmp_path / f"out.{suffix}"
    assert yokolab("results", "darts", "-o", path).returncode == 0
    f = pd.read_csv(path) if suffix == "csv" else pd.read_parquet(path)
    assert list(f.n) == [10]


def test_imports_stay_light():
    code = ("import sys, yokolab.lab, yokolab.lab.cli, yokolab.lab.runs\n"
            "heavy = {'torch', 'matplotlib', 'pandas', 'scipy', 'papermill', 'distributed',\n"
            "         'fastcore', 'IPython'}\n"
            "print(sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_library_needs_no_extras():
    """What pyproject.toml does not require is imported late; compiled kernels name their extra."""
    code = ("import importlib, pkgutil, sys\n"
            "block = {'fastcore', 'nbdev', 'IPython', 'papermill', 'nbclient', 'distributed',\n"
            "         'dask', 'sklearn', 'datasets', 'sphinx', 'jupyter_client', 'numba',\n"
            "         'triton', 'cupy', 'statsmodels', 'skimage', 'PIL'}\n"
            "class No:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] in block: raise ImportError(name)\n"
            "sys.meta_path.insert(0, No())\n"
            "import yokolab\n"
            "for m in pkgutil.walk_packages(yokolab.__path__, 'yokolab.'):\n"
            "    if m.name.endswith(('__main__', '_modidx')): continue\n"
            "    try: importlib.import_module(m.name)\n"
            "    except ImportError as e:\n"
            "        if '.hpc.' not in m.name or 'yokolab[' not in str(e): raise\n"
            "print('ok')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]
