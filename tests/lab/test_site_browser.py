"""The site in a real browser, from files, with the network off."""
import json
import re
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", exc_type=ImportError,
                                 reason="playwright is not here: pip install 'yokolab[dev]'")
if not CHROMIUM.exists():
    pytest.skip("/usr/bin/chromium is not here: apt-get install chromium", allow_module_level=True)
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-component-update",
        "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests."""
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield b
        b.close()


@pytest.fixture
def visit(browser, site):
    """(name) -> the page, opened from disk; an error or a request to the network fails the test."""
    wrong, contexts = [], []

    def open_page(name, folder=site.path, **options):
        c = browser.new_context(offline=True,
                                **{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(c)
        page = c.new_page()
        page.on("console", lambda m: wrong.append(f"{name}: {m.text}") if m.type == "error"
                else None)
        page.on("pageerror", lambda e: wrong.append(f"{name}: {e}"))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else
                wrong.append(f"{name}: asks for {r.url}"))
        path, mark, rest = re.fullmatch(r"([^?#]*)([?#]?)(.*)", name).groups()
        page.goto((folder / path).as_uri() + mark + rest)
        return page
    yield open_page
    for c in contexts: c.close()
    assert not wrong


def recorded(site):
    """States of all promoted claims."""
    return Counter(c["state"] for p in Path(site.root).glob("figures/*/claims.json")
                   for c in json.loads(p.read_text())["claims"])


def test_no_page_has_an_error_or_asks_the_network(visit, site):
    pages = sorted(p.relative_to(site.path).as_posix() for p in site.path.rglob("*.html"))
    page = visit("index.html")
    for p in pages:
        page.goto((site.path / p).as_uri())
        assert page.title(), p
        broken = page.eval_on_selector_all(
            "img",
            "all => all.filter(i => i.complete && !i.naturalWidth && i.offsetParent)"
            ".map(i => i.src)")
        assert not broken, f"{p}: {broken}"


def formula_page(site):
    """A page with a formula on lines of its own."""
    for p in sorted(site.path.rglob("*.html")):
        if '<div class="math' in p.read_text(encoding="utf-8"):
            return p.relative_to(site.path).as_posix()
    pytest.skip("no page has a formula")


def check_formulas(page):
    """Formulas are drawn, in KaTeX's own font, at a sensible size."""
    page.wait_for_selector("div.math .katex-display")
    assert page.locator(".katex-error").count() == 0
    box = page.locator("div.math .katex-html").first.bounding_box()
    assert box["height"] > 14 and box["width"] > 20
    assert page.evaluate("document.fonts.ready.then(() => document.fonts.check('16px KaTeX_Main'))")
    loaded = page.evaluate("[...document.fonts].filter(f => f.status == 'loaded')"
                           ".map(f => f.family)")
    assert any("KaTeX" in f for f in loaded)


def test_formulas_are_drawn(visit, site):
    page = visit(formula_page(site))
    check_formulas(page)
    text = page.locator("article").inner_text()
    assert r"\frac" not in text and r"\begin" not in text and r"\(" not in text


def test_formulas_are_drawn_by_the_browser_where_node_is_missing(visit, site, tmp_path):
    if not site.generated: pytest.skip("YOKOLAB_SITE is set: nothing is built here")
    from yokolab.lab.site import build_site
    built = build_site(site.root, out=tmp_path / "plain", prerender=False)
    page = visit("curvature/topic0.html", folder=built.path)
    check_formulas(page)
    assert page.locator("div.math .katex-display").count() == 2
    claims = visit("claims.html", folder=built.path)
    claims.wait_for_selector(".yl-text .katex")
    assert "$" not in claims.locator("#yl-claims").inner_text()


def test_search_finds_a_symbol(visit, site):
    api = next(p for p in sorted((site.path / "api").glob("*.html")) if p.stem != "index"
               and '<dt class="sig' in p.read_text(encoding="utf-8"))
    full = re.search(r'<dt class="sig[^"]*" id="([^"]+)"', api.read_text(encoding="utf-8"))[1]
    page = visit("index.html")
    page.keyboard.press("Control+k")
    box = page.locator("#pst-search-dialog input[type=search]")
    box.wait_for(state="visible")
    box.fill(full.rsplit(".", 1)[-1])
    box.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    hit = page.locator("#search-results a", has_text=full.rsplit(".", 1)[-1]).first
    hit.wait_for()
    found = page.locator("#search-results a")
    links = found.evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert any(f"{api.name}#{full}" in x for x in links), links
    hit.click()
    assert full.rsplit(".", 1)[-1] in page.locator("article").inner_text()


def test_light_and_dark(visit, site):
    figure = next((p for p in sorted(site.path.rglob("*_study.html"))
                   if "yl-on-dark" in p.read_text()), None)
    name = figure.relative_to(site.path).as_posix() if figure else "index.html"
    look = lambda p: p.evaluate("[document.documentElement.dataset.theme,"
                                "getComputedStyle(document.body).backgroundColor]")
    page = visit(name, color_scheme="dark")
    theme, colour = look(page)
    assert theme == "dark" and max(map(int, re.findall(r"\d+", colour)[:3])) < 60
    page.locator(".theme-switch-button").first.click()
    page.locator("[data-theme=light], [data-mode=light]").locator("visible=true").first.wait_for()
    if page.locator("button[data-mode=light]").count():
        page.locator("button[data-mode=light]").first.click()
    theme, colour = look(page)
    assert theme == "light" and min(map(int, re.findall(r"\d+", colour)[:3])) > 200
    if figure:
        seen = "all => all.filter(i => i.offsetParent).map(i => i.src)"
        shown = page.locator(".yl-figure img").evaluate_all(seen)
        assert shown and not any(".dark.svg" in s for s in shown)
        dark = visit(name, color_scheme="dark").locator(".yl-figure img")
        assert all(".dark.svg" in s for s in dark.evaluate_all(seen))


def visible(page):
    """States of the rows that are shown, in order."""
    return page.locator("#yl-claims tbody tr").evaluate_all(
        "all => all.filter(r => !r.hidden).map(r => r.dataset.state.replaceAll('-', ' '))")


def test_claims_are_filtered_searched_and_sorted(visit, site):
    want = recorded(site)
    if not want: pytest.skip("no run has been promoted")
    page = visit("claims.html")
    assert Counter(visible(page)) == want
    state = min(want, key=want.get)
    chip = page.locator("#yl-filter label",
                        has=page.locator(f"input[value='{state.replace(' ', '-')}']"))
    chip.click()
    assert visible(page) == [state] * want[state]
    total = sum(want.values())
    shown = f"{want[state]} of {total} claims" if want[state] < total else f"{total} claims"
    assert page.locator("#yl-filter output").inner_text() == shown
    chip.click()
    page.locator("#yl-filter select[name=kind]").select_option("trend")
    kinds = page.locator("#yl-claims tbody tr:not([hidden])").evaluate_all(
        "all => all.map(r => r.dataset.kind)")
    assert set(kinds) <= {"trend"} and len(kinds) < total
    page.locator("#yl-filter select[name=kind]").select_option("")
    page.locator("#yl-filter input[name=q]").fill("no claim says this, surely")
    assert visible(page) == []
    page.locator("#yl-filter input[name=q]").fill("")
    page.locator("#yl-claims th", has_text="State").get_by_role("button").click()
    order = ["confirmed", "weak", "refuted", "out of scale", "unmeasured"]
    assert [order.index(s) for s in visible(page)] == sorted(order.index(s) for s in visible(page))
    page.locator("#yl-claims th", has_text="State").get_by_role("button").click()
    assert visible(page)[0] == max(want, key=order.index)


def test_a_count_on_the_landing_page_leads_to_its_claims(visit, site):
    want = recorded(site)
    if not want: pytest.skip("no run has been promoted")
    page = visit("index.html")
    link = page.locator(".yl-verdicts .yl-tally a").first
    n, state = re.match(r"(\d+) (.*)", link.get_attribute("title")).groups()
    link.click()
    page.wait_for_url("**/claims.html?state=*")
    assert visible(page) == [state] * int(n)
    page.locator("#yl-claims tbody tr:not([hidden]) .yl-links a").first.click()
    page.wait_for_url("**/*.html#claim-*")
    target = page.evaluate("document.querySelector(':target')?.id")
    assert target and target.startswith("claim-")


@pytest.mark.parametrize("width", [390, 820])
def test_nothing_is_wider_than_the_screen(visit, site, width):
    studies = [p.relative_to(site.path).as_posix()
               for p in sorted(site.path.rglob("*_study.html"))[:2]]
    page = visit("index.html", viewport={"width": width, "height": 800})
    for name in ["index.html", "claims.html", "topics.html", formula_page(site), *studies]:
        page.goto((site.path / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_code_can_be_copied_and_notebooks_downloaded(visit, site):
    page = visit(formula_page(site))
    assert page.locator("button.copybtn").count() > 0
    links = page.locator(".yl-nav a[download]").evaluate_all("all => all.map(a => a.href)")
    assert links
    for url in links: assert json.loads(Path(url.removeprefix("file://")).read_text())["cells"]
