"""The house rules for notebooks, modules, records and texts."""
import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from yokolab.lab.promote import all_claims, check_promoted, schema
from yokolab.lab.store import settings
from yokolab.lab.study import find_studies, get_study, read_cells

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
METHODS = [p for p in NOTEBOOKS if not p.stem.endswith("_study") and p.stem != "index"
           and p.parent.name != "_template"]
STUDIES = find_studies(ROOT)
MODULES = sorted(p for p in ROOT.glob("yokolab/**/*.py") if p.name != "_modidx.py")
RECORDS = sorted(ROOT.glob("figures/*/claims.json"))
name = lambda p: str(Path(p).relative_to(ROOT)) if isinstance(p, Path) else p


def tracked():
    """The files git knows, or all files of the tree outside a checkout."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.skip("not a git checkout")
    return [ROOT / f for f in done.stdout.splitlines() if (ROOT / f).is_file()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_form(path):
    cells = read_cells(path)
    assert len(cells) <= 90, f"{len(cells)} cells: split the notebook"
    assert path.stat().st_size <= 400_000, "store smaller outputs"
    assert re.match(r"# .+\n+> .+", cells[0].source), "the first cell is `# Title` and `> subtitle`"
    for c in cells:
        if re.search(r"^#\|\s*export", c.source, re.M):
            assert c.source.count("\n") <= 45, f"cell {c.index}: more than 45 exported lines"
        assert c.kind != "code" or c.source.strip(), f"cell {c.index} is empty"


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_method_notebook(path):
    code = [c.source for c in read_cells(path) if c.kind == "code"]
    text = [c.source for c in read_cells(path) if c.kind == "markdown"]
    assert any("#| default_exp" in s for s in code), "no `#| default_exp`"
    assert any(re.search(r"\bassert\b|\btest_\w+\(", s) for s in code) or len(code) < 4, "no assert"
    assert any(re.search("^## See also", s, re.M) for s in text), "no `## See also`"
    assert not any("nbdev_export" in s for s in code), "an export call"


@pytest.mark.parametrize("topic", STUDIES)
def test_study_notebook(topic):
    s = get_study(topic, ROOT)
    assert s.title and s.subtitle and s.claims and s.area in settings(ROOT).areas
    code = [c.source for c in s.cells if c.kind == "code"]
    assert not any("#| export" in c for c in code), "a study exports nothing"
    assert "lab.summary()" in code[-1], "the last cell shows the claims"
    assert any(c.kind == "markdown" and "Reading the result" in c.source for c in s.cells)
    raw = json.loads(s.path.read_text())["cells"]
    stored = [c for c in raw if c.get("outputs")]
    assert not stored, "a study stores no outputs: its page comes from a run"
    method = s.path.with_name(s.path.name.replace("_study", ""))
    assert method.is_file(), "no method notebook beside it"


def public(node):
    """Functions and classes that have no underscore, and the members of such classes."""
    for n in node.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_"):
            yield n
            if isinstance(n, ast.ClassDef): yield from public(n)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_form(path):
    text = path.read_text()
    assert text.count("\n") <= 300, "a module of more than 300 lines: split its notebook"
    tree = ast.parse(text)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert not any(getattr(n.func, "id", "") == "print" for n in calls), "a print"
    bare = [n.name for n in public(tree) if not ast.get_docstring(n)]
    assert not bare, f"without docstring: {bare}"


def test_imports_point_one_way():
    """lab knows no science; a topic imports cores, of any area, never another topic."""
    topics = {n for p in STUDIES.values() for n in [p.stem.removesuffix("_study")]}
    modules = {}
    for p in METHODS:
        text = "\n".join(c.source for c in read_cells(p))
        modules[re.search(r"#\|\s*default_exp\s+(\S+)", text)[1]] = p
    for exp, p in modules.items():
        text = "\n".join(c.source for c in read_cells(p) if "#| export" in c.source)
        for used in re.findall(r"from yokolab\.([\w.]+) import|import yokolab\.([\w.]+)", text):
            used = used[0] or used[1]
            area = used.split(".")[0]
            if exp.startswith("lab."): assert area == "lab", f"{exp} imports {used}"
            elif area != "lab":
                core = used in modules and modules[used].stem[:2] < "10"
                assert core or area == exp.split(".")[0], f"{exp} imports another area: {used}"
            if used in modules and modules[used].stem in topics and modules[used] != p:
                own = {re.sub(r"^\d+\w?_", "", modules[used].stem), re.sub(r"^\d+\w?_", "", p.stem)}
                a, b = sorted(own, key=len)
                assert b.startswith(a), f"{exp} imports the topic {used}"


@pytest.mark.parametrize("path", RECORDS, ids=name)
def test_records_follow_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    record = json.loads(path.read_text())
    jsonschema.validate(record, schema())
    for c in record["claims"]:
        if c["state"] in ("confirmed", "weak", "refuted"):
            assert c["measured"] is not None, c["id"]
            assert all(c[k] for k in ("hardware", "versions", "digest", "date")), c["id"]
        if c["state"] == "out of scale": assert c["reason"], c["id"]


def test_promoted_files_are_in_order():
    assert check_promoted(ROOT) == []
    for run in ROOT.glob("figures/*/run.json"):
        for f in json.loads(run.read_text())["figures"]:
            if f["kind"] == "figure": assert f["alt"], f"{run}: {f['name']} has no alternative text"


def test_every_claim_of_every_study_is_counted():
    for topic, claims in all_claims(ROOT).items():
        assert [c.id for c in claims] == list(get_study(topic, ROOT).claims)


def test_nothing_large_and_nothing_private_in_git():
    private = re.compile(r"/work/|/root/|/home/\w+/|/tmp/[a-z]|@[a-z-]*seed-")
    allowed = {"tests/test_contract.py"}
    texts = ".py .ipynb .md .json .toml .ini .yml .csv .txt .css .js".split()
    for p in tracked():
        assert p.stat().st_size <= 1_000_000, f"{p}: over 1 MB"
        if p.suffix in texts:
            m = private.search(p.read_text(encoding="utf-8"))
            assert not m or str(p.relative_to(ROOT)) in allowed, f"{p}: {m[0]}"
