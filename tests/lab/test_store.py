"""Files, folders and digests: nothing half-written, nothing old under a new name."""
import json
import math
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.lab import digest as dig
from yokolab.lab.store import (
    LabError,
    RunFolder,
    read_claims,
    read_json,
    read_metrics,
    start,
    write_atomic,
    write_json,
)
from yokolab.lab.study import get_study


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    write_json(path, dict(x=1))
    def crash(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(os, broken, crash)
        with pytest.raises(KeyboardInterrupt): write_json(path, dict(x=2))
    assert read_json(path) == dict(x=1) and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError): write_json(path, dict(x=object()))
    assert read_json(path) == dict(x=1)


def test_readers_never_see_a_mixture(tmp_path):
    path, seen, end = tmp_path / "a", set(), threading.Event()
    write_atomic(path, "a" * 100_000)
    def read():
        while not end.is_set(): seen.add(path.read_text())
    t = threading.Thread(target=read)
    t.start()
    for c in "bcdefgh": write_atomic(path, c * 100_000)
    end.set(); t.join()
    assert all(len(s) == 100_000 and len(set(s)) == 1 for s in seen)


def test_metrics_of_a_killed_run(tmp_path):
    whole = [dict(name="x", value=v) for v in (1.0, math.inf, 3.0)]
    text = "".join(json.dumps(r) + "\n" for r in whole)
    path = tmp_path / "m.jsonl"
    for cut in range(len(text) + 1):
        path.write_text(text[:cut])
        rows = read_metrics(path)
        assert rows == whole[:len(rows)] and len(rows) >= text[:cut].count("\n")
    path.write_bytes(b'{"name": "\xff\xfe\n' + text.encode())
    with pytest.raises(LabError, match=r"line 1.*run the study again"): read_metrics(path)


def test_claims_come_back_as_they_were(tmp_path):
    write_json(tmp_path / "c.json", dict(topic="t", claims=[dict(
        id="C1", text="", source="", kind="trend", target="> 0", measured=1.0, interval=[0.5, 2],
        seeds=[0, 1])]))
    c = read_claims(tmp_path / "c.json")[0]
    assert c.interval == (0.5, 2) and c.seeds == (0, 1)


def test_who_asks_is_not_a_writer(tmp_path):
    f = RunFolder(tmp_path / "darts" / "1")
    assert not f.locked() and not f.path.parent.exists()               # asking leaves no trace
    with f.lock(shared=True), RunFolder(f.path).lock(shared=True, wait=False):
        assert not f.locked()
        with pytest.raises(BlockingIOError), f.lock(wait=False): pass
    with f.lock(): assert f.locked()


def attempt(folder, study, state=None):
    """An attempt that keeps a piece and ends in `state`."""
    start(folder, study, {}, "cpu", "inline")
    (folder.path / "keep").mkdir(exist_ok=True)
    (folder.path / "keep" / "a.pkl").touch()
    (folder.path / "log.txt").touch()
    if state: folder.set_state(state)


@pytest.mark.parametrize("state,stays", [(None, True), ("failed", True), ("done", False)])
def test_what_the_next_attempt_finds(project, state, stays):
    study, f = get_study("darts", project), RunFolder(project / "runs/darts/1")
    attempt(f, study, state)
    with f.lock(): start(f, study, {}, "cpu", "inline")
    assert (f.path / "keep" / "a.pkl").exists() == stays and not (f.path / "log.txt").exists()


def test_pieces_of_another_machine_are_not_taken(project):
    study, f = get_study("darts", project), RunFolder(project / "runs/darts/1")
    attempt(f, study)
    write_json(f.path / "env.json", read_json(f.path / "env.json") | dict(hardware="a 1-core Z80"))
    with f.lock(): start(f, study, {}, "cpu", "inline")
    assert not (f.path / "keep").exists()


def test_a_folder_that_is_half_cleared_is_not_done(project, monkeypatch):
    study, f = get_study("darts", project), RunFolder(project / "runs/darts/1")
    attempt(f, study, "done")
    def crash(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr("shutil.rmtree", crash)
    with f.lock(), pytest.raises(KeyboardInterrupt): start(f, study, {}, "cpu", "inline")
    assert not f.done


SAME = [("x = 1\ny = 2", "x = 1  # one\n\n\n# two\ny = 2"),
        ("f(a, b=[1, 2])", "f(\n    a,\n    b=[1,\n       2],\n)"),
        ("def f(x): return x", "def f(x):\n    'Same.'\n    # %% ../../nbs/9.ipynb #ab\n"
                               "    return x"),
        ("s = 'a'", 's = "a"')]
OTHER = [("x = 1", "x = 1.0"), ("x = 1", "x = True"), ("s = '''\n# a\n'''", "s = '''\n# b\n'''"),
         ("s = '''a\n\nb'''", "s = '''a\nb'''"), ("s = 'a'", "s = b'a'"), ("f(x=1)", "f(y=1)"),
         ("x = a + b", "x = a - b"), ("x: int = 1", "x: float = 1"), ("f'{x:.1f}'", "f'{x:.2f}'"),
         ("def f(x, *, y): pass", "def f(x, y): pass"), ("x = None", "x = ..."),
         ("x = 1", "x = 1j"), ("x.a", "x.b"), ("x[1:]", "x[:1]"), ("del x", "x"), ("x = x", "x")]


@pytest.mark.parametrize("a,b", SAME)
def test_what_a_digest_does_not_see(a, b): assert dig._code(a) == dig._code(b)


@pytest.mark.parametrize("a,b", OTHER)
def test_what_a_digest_sees(a, b): assert dig._code(a) != dig._code(b)


def test_the_text_of_a_digest_is_the_same_in_every_python():
    assert dig._code("def f(a, *b, c=1):\n    'Doc.'\n    return f'{a!r:>{c}}' if b else -1") == (
        "Module(body=[FunctionDef(name=str:'f' args=arguments(args=[arg(arg=str:'a')] "
        "vararg=arg(arg=str:'b') kwonlyargs=[arg(arg=str:'c')] "
        "kw_defaults=[Constant(value=int:1)]) body=[Return(value=IfExp(test=Name(id=str:'b') "
        "body=JoinedStr(values=[FormattedValue(value=Name(id=str:'a') conversion=int:114 "
        "format_spec=JoinedStr(values=[Constant(value=str:'>') FormattedValue("
        "value=Name(id=str:'c') conversion=int:-1)]))]) orelse=UnaryOp(op=USub() "
        "operand=Constant(value=int:1))))])])")


@settings(max_examples=60, deadline=None)
@given(st.text("ab#'\"\n\\ ", max_size=12), st.text("ab#'\"\n\\ ", max_size=12))
def test_every_string_counts(a, b):
    code = lambda s: dig._code(f"x = {s!r}") + dig._code(f"x = '''\n{s.encode().hex()}\n'''")
    assert (code(a) == code(b)) == (a == b)


def test_the_verdict_and_short_names_count():
    found = dig.library_modules(["from yokolab.lab import begin, load, Estimate"])
    assert {"yokolab.lab.claims", "yokolab.lab.data", "yokolab.lab.stats"} <= set(found)
    assert not {"yokolab.lab.record", "yokolab.lab.runs", "yokolab.lab.plots"} & set(found)


def test_renaming_and_moving_a_study_keeps_its_digest(project):
    s = get_study("darts", project)
    before = dig.digest(s, s.resolve(), "cpu")
    new = s.path.with_name("25a_darts_study.ipynb")
    nb = json.loads(s.path.read_text())
    nb["cells"].insert(1, dict(cell_type="markdown", id="new", metadata={}, source="More words."))
    s.path.unlink()
    new.write_text(json.dumps(nb))
    s = get_study("darts", project)
    assert s.path == new and dig.digest(s, s.resolve(), "cpu") == before
