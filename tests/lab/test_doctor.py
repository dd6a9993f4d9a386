"The doctor reports; it never fails"

import builtins
import sys
import types

import pytest

from yokolab.lab import doctor


@pytest.fixture
def rows(monkeypatch):
    def find(name):
        row = next(r for r in (*doctor._core(), *doctor._more()) if r[0] == name)
        return doctor._check(*row)
    return find


def test_every_row_is_found_or_comes_with_a_remedy():
    found = doctor.checks()
    assert len(found) == len({c.name for c in found}) > 12
    for c in found:
        assert c.found and "\n" not in c.found and bool(c.fix) != c.ok
    assert found._repr_html_().count("<tr>") == len(found)


def test_nothing_installed_nothing_breaks(monkeypatch, tmp_path):
    real = builtins.__import__

    def bare(name, *args, **kw):
        if name.split(".")[0] in {"torch", "triton", "cupy", "pyarrow", "numpy", "sklearn"}:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", bare)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "import_module", bare)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("YOKOLAB_DATA", raising=False)
    missing = {c.name: c for c in doctor.checks() if not c.ok}
    assert {"torch", "GPU", "triton kernels", "cupy arrays", "papermill engine", "sweeps",
                     "JupyterLab", "bundled data", "your data", "Hugging Face hub", "site", "nbdev",
                     "Node (formulas)", "Chromium (tests)"} <= set(missing)
    assert missing["sweeps"].fix == 'pip install "yokolab[run]"'


def test_a_broken_package_is_a_finding(rows, monkeypatch):
    def broken(name): raise OSError("libcudart.so.13: cannot open shared object file\nmore")
    monkeypatch.setattr(doctor, "import_module", broken)
    c = rows("cupy arrays")
    assert not c.ok and c.found == "libcudart.so.13: cannot open shared object file" and c.fix


def test_a_gpu_is_described(rows, monkeypatch):
    fake = types.ModuleType("torch")
    fake.cuda = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2,
        get_device_properties=lambda i: types.SimpleNamespace(name="H200", total_memory=141*2**30))
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert rows("GPU").found == "2 x H200, 141 GB"


def test_a_full_disk_and_a_folder_that_is_not_ours(rows, monkeypatch, tmp_path):
    monkeypatch.setenv("YOKOLAB_RUNS", str(tmp_path/"new"/"runs"))
    assert rows("runs folder").ok and not (tmp_path/"new").exists()
    usage = types.SimpleNamespace(free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda p: usage)
    assert "0.00 GB free" in rows("runs folder").found

    def denied(**kw): raise PermissionError("not yours")
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", denied)
    c = rows("runs folder")
    assert not c.ok and "not yours" in c.found and "YOKOLAB_RUNS" in c.fix


def test_data_are_counted(rows, monkeypatch, tmp_path):
    monkeypatch.setenv("YOKOLAB_DATA", str(tmp_path))
    assert not rows("your data").ok
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"train.parquet").write_bytes(b"")
    assert "mine" in rows("your data").found


def test_a_program_that_hangs_or_fails_is_still_found(rows, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")

    def hangs(*a, **kw): raise doctor.subprocess.TimeoutExpired("node", 20)
    monkeypatch.setattr(doctor.subprocess, "run", hangs)
    assert rows("Node (formulas)").found == "/bin/node"


def test_an_old_python_is_told(rows, monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    c = rows("Python")
    assert not c.ok and "3.9.1" in c.found and "3.11" in c.fix
