"""The site of a small generated project: its pages, numbers, links, and what is refused."""
import json
import os
import re
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

from yokolab.lab.catalog import catalog
from yokolab.lab.claims import STATES
from yokolab.lab.formulas import can_draw, draw_pages
from yokolab.lab.site import SiteError, build_site, check_links, sync
from yokolab.lab.store import LabError


def html(site, page):
    """The text of a page."""
    return (site.path / page).read_text(encoding="utf-8")


def records(root):
    """Every promoted claim, straight from the files: [(topic, claim)]."""
    return [(p.parent.name, c) for p in sorted(Path(root).glob("figures/*/claims.json"))
            for c in json.loads(p.read_text())["claims"]]


def own(site):
    """Skip what only the generated project has."""
    if not site.generated: pytest.skip("YOKOLAB_SITE is set: not the generated site")


def test_every_page_is_there(site):
    cat = catalog(site.root)
    want = {"index", "topics", "claims", "changelog", "api/index", "guides/index", "guides/run",
            "guides/sweep", "guides/topic", "guides/claims", "search", "genindex"}
    for a in cat.areas:
        want |= {p.doc for p in cat.pages[a.folder]}
        if cat.pages[a.folder]: want.add(f"{a.slug}/index")
    have = {p.relative_to(site.path).with_suffix("").as_posix() for p in site.path.rglob("*.html")}
    assert want <= have, want - have


def test_every_link_has_a_target(site):
    assert check_links(site.path) == []


def test_links_between_notebooks_are_links_between_pages(site):
    own(site)
    page = html(site, "curvature/topic1.html")
    assert 'href="topic1_study.html"' in page
    assert 'href="https://example.org/minilab/blob/main/settings.ini"' in page
    place = "nb-minilab-curvature-topic1-topic1-step" # a symbol leads to where it is explained
    link = re.search(rf'<a class="reference internal" href="#{place}">(.*?)</a>', page)
    assert re.sub(r"<[^>]+>", "", link[1]) == "topic1_step" and f'<section id="{place}">' in page


def test_counts_on_the_landing_page_are_those_of_the_records(site):
    found = Counter(c["state"] for _, c in records(site.root))
    text = html(site, "index.html")
    if not found: assert "No run has been promoted yet" in text; return
    assert f"<strong>{sum(found.values())} claim" in text
    block = re.search(r'<div class="yl-verdicts">.*?</div>', text, re.S)[0]
    shown = re.findall(r'title="(\d+) ([a-z ]+)"', block)
    assert {s: int(n) for n, s in shown} == dict(found)


def test_claims_page_has_every_claim_as_recorded(site):
    rows = re.findall(r'<tr data-area="[^"]*" data-kind="([^"]*)" data-state="([^"]*)" '
                      r'id="([^"]*)">'
                      r"(.*?)</tr>", html(site, "claims.html"), re.S)
    assert len(rows) == len(records(site.root))
    by_id = {i: (kind, state, row) for kind, state, i, row in rows}
    for topic, c in records(site.root):
        kind, state, row = by_id[re.sub(r"[^a-z0-9]+", "-", f"{topic}-{c['id']}".lower())]
        assert (kind, state.replace("-", " ")) == (c["kind"], c["state"])
        assert f"<code>{c['target']}</code>" in row.replace("&gt;", ">").replace("&lt;", "<")
        study = re.search(r'href="([^"]+_study\.html)#claim-', row)[1]
        target = re.search(rf'<tr id="claim-{c["id"].lower()}">(.*?)</tr>', html(site, study), re.S)
        assert f'yl-{state}">{c["state"]}<' in target[1]


def test_study_page_says_which_run(site):
    runs = list(Path(site.root).glob("figures/*/run.json"))
    for path in runs:
        record = json.loads(path.read_text())
        page = next(site.path.rglob(f"{record['topic']}_study.html")).read_text()
        for run in record["runs"]:
            for x in (run["profile"], run["date"][:10], run["digest"][:12], run["hardware"]):
                assert x in unescape(page), x
        for f in record["figures"]:
            if f.get("kind", "figure") != "figure": continue
            for ext in (".svg", ".dark.svg", ".png"):
                assert f"figures/{record['topic']}/{f['name']}{ext}" in page
                assert (site.path / "figures" / record["topic"] / f"{f['name']}{ext}").exists()
    if site.generated: assert len(runs) == 2


def test_a_study_without_a_run_says_so(site):
    own(site)
    page = html(site, "curvature/topic2_study.html")
    assert "Not run yet." in page and page.count("yl-unmeasured") == 5
    assert "lab = begin" not in re.sub(r"<[^>]+>", "", html(site, "curvature/topic2.html"))


def test_parameters_are_a_table(site):
    own(site)
    page = html(site, "curvature/topic0_study.html")
    row = re.search(r'<th scope="row"><code>rounds</code></th>(.*?)</tr>', page, re.S)[1]
    assert re.findall(r"<code>(.*?)</code>", row) == ["int", "40", "2", "400", "30"]
    assert "profiles = dict" not in page


def test_method_page_shows_the_reference_and_hides_what_is_hidden(site):
    own(site)
    page = html(site, "curvature/topic0.html")
    text = unescape(re.sub(r"<[^>]+>", "", page))
    assert "secret" not in text and "default_exp" not in text and "@dataclass" not in text
    assert "One preconditioned step." in text and "the next parameters" in text
    assert "takes long" in text and "assert math.isclose" in text
    assert 'id="equation-eq-topic0-step"' in page
    api = html(site, "api/curvature.topic0.html")
    assert 'id="minilab.curvature.topic0.topic0_step"' in api
    assert 'id="minilab.curvature.topic0.Topic0State.advance"' in api
    assert "minilab/blob/main/minilab/curvature/topic0.py#L" in api


def test_every_picture_has_a_text(site):
    for page in site.path.rglob("*.html"):
        for img in re.findall(r"<img\b[^>]*>", page.read_text(encoding="utf-8")):
            if "mark.svg" in img: continue # the logo stands beside the name
            alt = re.search(r'alt="([^"]*)"', img)
            assert alt and len(alt[1]) > 8 and "_images/" not in alt[1], f"{page.name}: {img}"


def test_no_page_says_where_it_was_built(site):
    for page in site.path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert str(site.root) not in text and str(site.path) not in text, page.name


def test_formulas_are_drawn_or_left_to_a_local_script(site):
    own(site)
    page = html(site, "curvature/topic0.html")
    if can_draw():
        assert 'class="katex"' in page and "katex.min.js" not in page and r"\(" not in page
        assert html(site, "claims.html").count('class="katex"') == len(records(site.root))
    else: assert "katex.min.js" in page


@pytest.mark.slow
def test_a_second_build_writes_only_what_changed(site_copy):
    built = build_site(site_copy, prerender=False)
    src = site_copy / "docs" / "_stage" / "src"
    before = {p: p.stat().st_mtime_ns for p in src.rglob("*") if p.is_file()}
    for name in ("12_topic2.ipynb", "12_topic2_study.ipynb"):
        (site_copy / "nbs/10_curvature" / name).unlink()
    (site_copy / "minilab/curvature/topic2.py").unlink()
    log = site_copy / "figures" / "topic0" / "claims.json"
    log.write_text(log.read_text().replace('"state": "weak"', '"state": "refuted"'))
    again = build_site(site_copy, prerender=False)
    changed = {p.relative_to(src).as_posix() for p in src.rglob("*")
               if p.is_file() and before.get(p) != p.stat().st_mtime_ns}
    assert changed == {"index.md", "topics.md", "claims.md", "curvature/index.md", "api/index.md",
                       "curvature/topic0.ipynb", "curvature/topic0_study.ipynb"}
    assert not list(again.path.rglob("topic2*.html")) and again.pages == built.pages - 3
    page = (again.path / "claims.html").read_text()
    assert page.count('data-state="refuted"') == 3 and r"\(f-f^\ast\)" in page
    assert "katex.min.js" in page and check_links(again.path) == []


@pytest.mark.slow
def test_a_broken_link_stops_the_build_and_keeps_the_old_site(site_copy):
    old = site_copy / "_site"
    old.mkdir()
    (old / ".yokolab-site").touch()
    (old / "index.html").write_text("yesterday's")
    path = site_copy / "nbs/10_curvature/10_topic0.ipynb"
    path.write_text(path.read_text().replace("10_topic0_study.ipynb", "10_lost_study.ipynb")
                    .replace(r"\\qquad", r"\\undefinedmacro"))
    with pytest.raises(SiteError, match=r"curvature/topic0\.ipynb.*10_lost_study\.ipynb"):
        build_site(site_copy)
    assert (old / "index.html").read_text() == "yesterday's"
    path.write_text(path.read_text().replace("10_lost_study.ipynb", "10_topic0_study.ipynb"))
    if not can_draw(): return
    with pytest.raises(SiteError, match=r"topic0\.html: .*Undefined control sequence"):
        build_site(site_copy)
    assert (old / "index.html").read_text() == "yesterday's"
    assert not [p.name for p in site_copy.iterdir() if p.name.startswith("._site")]


@pytest.mark.parametrize("path, text, message", [
    ("figures/topic0/claims.json", '{"topic": "topic0", "claims": [', "damaged record"),
    ("figures/topic0/claims.json", '{"topic": "topic9", "claims": []}', "topic9"),
    ("figures/lost/claims.json", '{"topic": "lost", "claims": []}', "no area has this topic"),
    ("settings.ini", "[lab]\ntitle = x\n", "settings.ini"),
    ("nbs/10_curvature/10_topic0.ipynb", '{"cells": [', "not a readable notebook"),
    ("nbs/99_new/10_x.ipynb", "{}", "99_new: not an area"),
])
def test_files_that_contradict_each_other_are_named(site_copy, path, text, message):
    (site_copy / path).parent.mkdir(parents=True, exist_ok=True)
    (site_copy / path).write_text(text)
    with pytest.raises((LabError, ValueError), match=message): build_site(site_copy)


def test_bad_arguments(site_copy, tmp_path):
    with pytest.raises(SiteError, match="jobs=0"): build_site(site_copy, jobs=0)
    with pytest.raises(LabError, match=r"holds no settings\.ini"): build_site(tmp_path / "nowhere")


def test_somebody_elses_folder_is_not_replaced(site, tmp_path):
    from yokolab.lab.site import publish
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SiteError, match="not empty and not a site"): publish(site.path, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_checks_see_mistakes(tmp_path):
    sync(tmp_path, {"a.html": '<a href="b.html">x</a><a href="#y">x</a>'
                              '<img src="http://x.org/a.png"><link href="//x.org/a.css">'
                              '<span class="math">\\(x^2\\)</span>'})
    assert [b.rpartition(": ")[2] for b in check_links(tmp_path)] == [
        "no such file", "no such place on the page", "from the network", "from the network"]
    if can_draw():
        assert draw_pages(tmp_path) == []
        assert 'class="katex"' in (tmp_path / "a.html").read_text()


def test_states_have_a_look(site):
    css = html(site, "_static/site.css")
    for s in STATES:
        name = s.replace(" ", "-")
        assert re.search(rf"\.yl-{name} {{ --m: url", css), f"{s} has no shape"
        assert re.search(rf"\.yl-{name} {{ --c: ", css), f"{s} has no colour"


def test_katex_style_and_script_are_of_one_version(site):
    katex = pytest.importorskip("sphinxcontrib.katex")
    style = re.search(r"KaTeX (\d+\.\d+)", html(site, "_static/katex.css"))[1]
    assert style == ".".join(katex.katex_version.split(".")[:2])
