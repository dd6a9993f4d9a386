"""README.md is what the index notebook and the records say."""
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from yokolab.lab.readme import readme, write_readme
from yokolab.lab.store import LabError

ROOT = Path(__file__).resolve().parents[2]


def test_readme_is_fresh():
    here = (ROOT / "README.md").read_text(encoding="utf-8")
    assert here == readme(ROOT), "run `make export` and commit"


def test_counts_are_those_of_the_records():
    found = Counter(c["state"] for p in ROOT.glob("figures/*/claims.json")
                    for c in json.loads(p.read_text())["claims"])
    text = readme(ROOT)
    if not found: assert "No run has been promoted yet." in text; return
    line = re.search(r"^(\d+) claims? of \d+ topics?: (.*)\.$", text, re.M)
    assert int(line[1]) == sum(found.values())
    assert {s: int(n) for n, s in re.findall(r"(\d+) ([a-z ]+)", line[2])} == dict(found)


def test_every_relative_link_leads_somewhere():
    for url in re.findall(r"\]\(([^()\s]+)\)", readme(ROOT)):
        if "://" not in url and not url.startswith("#"):
            assert (ROOT / url.partition("#")[0]).exists(), url


def test_generated_parts(site_project):
    index = site_project / "nbs" / "index.ipynb"
    cell = dict(cell_type="markdown", id="a", metadata={},
                source="# L\n> s\n\n<!-- counts -->\n\n<!-- topics -->\n\n<!-- figure -->")
    try:
        index.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
        text = readme(site_project)
        assert "10 claims of 2 topics" in text and "figures/topic0/convergence.svg" in text
        assert text.count("not run yet") == 1 and "cpu 12.5 s" in text
        assert write_readme(site_project).read_text() == text
        ini = site_project / "settings.ini"
        plain = ini.read_text()
        try: # the settings choose another picture
            ini.write_text(plain.replace("[site]", "[site]\nfirst = topic1/convergence"))
            assert "figures/topic1/convergence.svg" in readme(site_project)
        finally: ini.write_text(plain)
        index.write_text(json.dumps(dict(cells=[cell | dict(source="<!-- counst -->")])))
        with pytest.raises(LabError, match="counst"): readme(site_project)
    finally: index.unlink()
