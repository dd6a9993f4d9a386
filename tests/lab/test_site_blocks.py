"""Pieces of the site on random input: escaping, addresses, strips, prose, the reference."""
import math
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.lab import api, blocks, prose
from yokolab.lab.claims import STATES, Claim

QUICK = settings(max_examples=60, deadline=None)
TEXT = st.text(max_size=40)
NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
DOC = st.lists(NAME, min_size=1, max_size=3).map("/".join)


class Text(HTMLParser):
    """The text of HTML, and its elements."""
    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.attrs = "", [], []
        self.feed(html)
        self.close()

    def handle_data(self, data): self.text += data

    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attrs += attrs


@QUICK
@given(TEXT)
def test_text_is_never_markup(text):
    seen = Text(blocks.inline(text))
    assert set(seen.tags) <= {"span", "code"}
    plain = re.sub(r"[$`]|\\[()]", "", text).replace("\r", "\n").replace("\x00", "\ufffd")
    if "&" not in text and "\x00" not in text and "\r" not in text:
        assert re.sub(r"[$`]|\\[()]", "", seen.text) == plain


@QUICK
@given(TEXT, TEXT)
def test_attributes_keep_their_value(value, text):
    if re.search(r"[\x00\r]", value): return
    seen = Text(blocks.tag("a", blocks.inline(text), title=value, hidden=True, href=None))
    assert dict(seen.attrs)["title"] == value and "href" not in dict(seen.attrs)


@QUICK
@given(DOC, DOC, st.sampled_from(["", "#here", "?state=weak", "?a=1#b"]))
def test_relative_addresses_lead_back(doc, target, rest):
    got = blocks.rel(doc, f"{target}.html{rest}")
    path = got[:len(got) - len(rest)] if rest else got
    assert posixpath.normpath(posixpath.join(posixpath.dirname(doc), path)) == f"{target}.html"
    assert got.endswith(rest) and not got.startswith("/")


FINITE = st.floats(-1e6, 1e6).map(lambda x: round(x, 6))


@QUICK
@given(FINITE, st.floats(0, 1e3), st.sampled_from([">", ">=", "<", "<="]), FINITE,
       st.sampled_from(STATES))
def test_strip_shows_which_side_of_the_target(value, half, op, edge, state):
    c = Claim("C1", "t", "s", "trend", f"{op} {edge}", value, (value - half, value + half),
              state=state)
    svg = blocks.strip(c)
    rect = re.search(r'<rect class="t" x="([\d.]+)" y="1" width="([\d.]+)"', svg)
    a, w, dot = float(rect[1]), float(rect[2]), float(re.search(r'cx="([\d.]+)"', svg)[1])
    assert 0 <= a <= 132 and a + w <= 133.5 and 0 <= dot <= 132
    assert f"yl-{blocks.slug(state)}" in svg
    inside = value >= edge if op[0] == ">" else value <= edge
    if abs(value - edge) > 0.05 * (half + abs(value - edge)): # farther apart than a pixel
        assert (a - 0.2 <= dot <= a + w + 0.2) == inside


def test_strip_is_logarithmic_where_it_has_to_be():
    c = Claim("C1", "t", "s", "bound", "<= 1e-12", 3e-15, None, state="confirmed")
    far = Claim("C1", "t", "s", "bound", "<= 1e-12", 3e-10, None, state="refuted")
    x = [float(re.search(r'cx="([\d.]+)"', blocks.strip(k))[1]) for k in (c, far)]
    edge = [float(re.search(r'width="([\d.]+)" height="16"', blocks.strip(k))[1]) for k in (c, far)]
    assert x[0] < edge[0] - 20 and x[1] > edge[1] + 20
    assert blocks.strip(Claim("C1", "t", "s", "bound", "> 0", math.pi, None)).count("<circle") == 1


@QUICK
@given(st.dictionaries(st.sampled_from(STATES), st.integers(0, 50)))
def test_bars_and_tallies_add_up(n):
    shares = [int(k) for k in re.findall(r"flex-grow:(\d+)", blocks.bar(n))]
    assert sum(shares) == sum(n.values()) and len(shares) == sum(k > 0 for k in n.values())
    words = re.findall(r'title="(\d+) ([a-z ]+)"', blocks.tally(n))
    assert {s: int(k) for k, s in words} == {s: k for s, k in n.items() if k}


LINKS = prose.Links(Path("/p"), {"nbs/20_a/10_b.ipynb": "a/b"}, [
    api.Module("lab.a.b", Path("/p/lab/a/b.py"), "",
               (api.Symbol("step", "function", "()", (), None, "", 1),))])
HERE = Path("/p/nbs/20_a/20_c.ipynb")


@QUICK
@given(st.text(alphabet="ab `$\n#-*_{}|\\", max_size=60))
def test_prose_without_links_and_symbols_is_left_alone(text):
    if text.lstrip().startswith("#|") or "$$ {#" in text: return
    kept = prose.prose(text, "a/c", HERE, LINKS)
    assert kept == "\n".join(prose.directives(text)[1].splitlines())


@QUICK
@given(st.text(alphabet="ab\n `[]()", max_size=40))
def test_code_blocks_are_left_alone(code):
    if "```" in code: return
    block = f"```\n{code}\n[x](10_b.ipynb) `step`\n```"
    assert prose.prose(block, "a/c", HERE, LINKS) == block


def test_links_and_symbols_around_code():
    text = "`step`\n\n~~~text\n`step`\n~~~\n[b](10_b.ipynb#Idea)\n\n    `step`"
    assert prose.prose(text, "a/c", HERE, LINKS) == (
        "{py:obj}`step <lab.a.b.step>`\n\n~~~text\n`step`\n~~~\n[b](b.ipynb#idea)\n\n    `step`")


@QUICK
@given(st.lists(st.tuples(NAME, st.sampled_from(["int", "float | None", "str"]), TEXT), min_size=1,
                max_size=4, unique_by=lambda a: a[0]))
def test_docments_are_read_as_written(args):
    keep = lambda s: " ".join(re.sub(r"[^\w ,.$()|-]", "", s, flags=re.A).split())
    args = [(f"v_{n}", t, keep(h)) for n, t, h in args]
    lines = "\n".join(f"    {n}:{t}={i}, # {h}" for i, (n, t, h) in enumerate(args))
    mod = _module(f'def f(\n{lines}\n) -> int: # what comes back\n    "Doc."\n')
    assert [(a.name, a.type, a.help) for a in mod.symbols[0].args] == args
    assert [a.default for a in mod.symbols[0].args] == [str(i) for i in range(len(args))]
    assert mod.symbols[0].returns.help == "what comes back"
    table = api.arg_table(mod.symbols[0].args)
    assert len({re.sub(r"\\\|", "", r).count("|") for r in table.splitlines() if r[0] == "|"}) == 1


def _module(source):
    """Read source as a module."""
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "m.py").write_text(source, encoding="utf-8")
        return api.read_module(Path(d) / "m.py", "lab.m")


@pytest.mark.parametrize("name", ["catalog", "site", "blocks", "runs", "claims"])
def test_own_modules_have_a_reference(name):
    path = Path(api.__file__).with_name(f"{name}.py")
    mod = api.read_module(path, f"yokolab.lab.{name}")
    page = api.module_page(mod)
    assert mod.symbols and all(s.doc for s in mod.symbols)
    for s in mod.symbols: assert f" {s.name}" in page
    assert page.count("::::::::{py:") >= len(mod.symbols)
