"""Runs: content addresses, both engines, records, promotion."""
import json

import jsonschema
import pytest

from yokolab.lab.promote import candidates, check_promoted, promote, schema
from yokolab.lab.runs import RunFailed, plan, results, run
from yokolab.lab.store import LabError, read_claims
from yokolab.lab.study import get_study


def test_engines_agree(project):
    pytest.importorskip("papermill")
    a = run("darts", engine="inline")
    b = run("darts", engine="papermill", force=True)
    assert a.folder == b.folder and b.info["engine"] == "papermill"
    again = run("darts", engine="inline", force=True)
    assert [c.measured for c in b.claims] == [c.measured for c in again.claims]
    nb = json.loads(b.notebook.read_text())
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in nb["cells"])
    assert 'class="claims"' in json.dumps(nb["cells"][-1]["outputs"]).replace("\\", "")


def test_inline_figures_are_identical_to_papermill_figures(project):
    pytest.importorskip("papermill")
    read = lambda r: {k: p.read_bytes() for k, p in r.figures.items()}
    a = read(run("darts", engine="inline"))
    assert a == read(run("darts", engine="papermill", force=True))


def test_same_question_is_not_computed_twice(project):
    a = run("darts")
    t = a.notebook.stat().st_mtime_ns
    assert run("darts").notebook.stat().st_mtime_ns == t
    assert run("darts", n=2000).folder == a.folder
    assert run("darts", n=1000).folder != a.folder


def test_digest_follows_code_not_prose(project, edit, make_project):
    before = plan("darts").digest
    make_project(edit(0, "pi from", "π from"))
    assert plan("darts").digest == before
    make_project(edit(9, "lab.summary()", "lab.summary() or None"))
    assert plan("darts").digest != before


def test_metrics_claims_figures(project):
    r = run("darts")
    assert list(r.metrics.step) == list(range(10)) and set(r.metrics.name) == {"pi"}
    assert [c.state for c in r.claims] == ["confirmed", "out of scale"]
    assert r.figures["hits"].read_text().startswith("<?xml")
    assert "confirmed" in r._repr_html_()


def test_results_frame(project):
    for s in range(3): run("darts", seed=s)
    f = results("darts")
    assert sorted(f.seed) == [0, 1, 2] and {"pi", "C1", "profile", "seconds"} <= set(f.columns)


@pytest.mark.parametrize("engine", ["inline", "papermill"])
def test_a_failing_study_keeps_its_log_and_never_counts(make_project, edit, engine):
    if engine == "papermill": pytest.importorskip("papermill")
    make_project(edit(6, "r, hits = ", "1 / (n - n)\nr, hits = "))
    with pytest.raises(RunFailed, match=r"cell \d+: ZeroDivisionError") as e: run("darts", engine=engine)
    assert "ZeroDivisionError" in e.value.run.log and e.value.run.state == "failed"
    assert results("darts").empty
    with pytest.raises(LabError, match="no finished run"): promote("darts")


def test_a_study_without_begin_is_refused(make_project, edit):
    cells = [(t, s) for t, s in edit(5, "begin('darts')", "None") if "lab." not in s]
    cells = [(t, s.replace("\npause: float = 0.0  # s a step", "")) for t, s in cells] + [("", "n, seed")]
    make_project(cells)
    with pytest.raises(RunFailed, match=r"no cell called begin\('darts'\)"): run("darts")


def test_begin_of_another_topic(make_project, edit):
    make_project(edit(5, "begin('darts')", "begin('dart')"))
    with pytest.raises(RunFailed, match=r"begin\('dart'\) in the study of 'darts'"): run("darts")


def test_keep_resumes(make_project, edit):
    cells = edit(6, "r, hits = random.Random(seed), []",
                 "r, hits = random.Random(seed), []\nfirst = lab.keep('first', lambda: time.monotonic_ns())\n"
                 "lab.metric('first', first)\nif not (lab.folder / 'keep' / 'ok').exists():\n"
                 "    (lab.folder / 'keep' / 'ok').touch()\n    raise KeyboardInterrupt")
    make_project(cells)
    with pytest.raises(KeyboardInterrupt): run("darts")
    r = plan("darts").folder
    assert r.state()["state"] == "interrupted"
    kept = [json.loads(l)["value"] for l in (r.path / "metrics.jsonl").read_text().splitlines()][0]
    assert run("darts").metrics.value[0] == kept


def test_promotion_takes_the_strongest_profile_claim_by_claim(project):
    run("darts", profile="smoke")
    with pytest.raises(LabError, match="no finished run"): promote("darts")
    run("darts")
    assert [c.state for c in promote("darts").claims] == ["confirmed", "out of scale"]
    run("darts", profile="full")
    run("darts", seed=5)                                               # a run with other values is no evidence
    p = promote("darts")
    assert [(c.state, c.profile) for c in p.claims] == [("confirmed", "full"), ("confirmed", "full")]
    assert len(candidates(get_study("darts", project), project / "runs")) == 2
    record = json.loads((p.folder / "claims.json").read_text())
    jsonschema.validate(record, schema())
    assert read_claims(p.folder / "claims.json") == p.claims and check_promoted() == []
    names = {f.name for f in p.files}
    assert {"claims.json", "run.json", "study.ipynb", "hits.svg", "hits.png"} <= names
    text = (p.folder / "study.ipynb").read_text() + (p.folder / "run.json").read_text()
    assert str(project) not in text and "image/png" not in text


def test_a_moved_target_is_noticed(project, make_project, edit):
    run("darts"); promote("darts")
    make_project(edit(3, "in [3, 3.3]", "in [2, 4]"))
    assert any("target" in b for b in check_promoted())
