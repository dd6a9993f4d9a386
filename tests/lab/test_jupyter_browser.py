"""A person opens JupyterLab, presses Run All on FedPM's study and reads its claims."""
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yokolab.lab.runs import Run
from yokolab.lab.study import find_studies

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.browser


@pytest.fixture
def jupyter(tmp_path):
    """Address of a JupyterLab that serves a copy of the study, at the smoke profile."""
    pytest.importorskip("jupyterlab")
    study = find_studies(ROOT).get("fedpm")
    if study is None: pytest.skip("the topic fedpm is not here")
    shutil.copy(study, tmp_path / "study.ipynb")
    env = os.environ | dict(YOKOLAB_ROOT=str(ROOT), YOKOLAB_PROFILE="smoke", YOKOLAB_RUNS=str(tmp_path / "runs"),
                            PYTHONPATH=str(ROOT), JUPYTER_CONFIG_DIR=str(tmp_path / "config"))
    env.pop("IN_TEST", None)
    args = ["lab", "--no-browser", "--allow-root", "--port=0", "--IdentityProvider.token=", "--ip=127.0.0.1",
            f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class="
            "jupyterlab.NeverCheckForUpdate"]
    p = subprocess.Popen([sys.executable, "-m", "jupyter", *args], env=env, text=True, cwd=tmp_path,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = next(m[1] for line in p.stdout if (m := re.search(r"(http://127\.0\.0\.1:\d+)/lab", line)))
    yield url, tmp_path
    p.terminate()
    p.communicate(timeout=20)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium (apt-get install chromium)")
def test_run_all_shows_the_claims(jupyter):
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install 'yokolab[dev]')")
    url, folder = jupyter
    with api.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport=dict(width=1400, height=900))
        page.goto(f"{url}/lab/tree/study.ipynb", timeout=60_000)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        page.get_by_text("| Idle").wait_for(timeout=60_000)             # the kernel is there
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator("table.claims").last.wait_for(state="attached", timeout=150_000)
        page.locator("table.claims").last.scroll_into_view_if_needed()
        rows = page.locator("table.claims").last.locator("tbody tr").count()
        if shot := os.environ.get("YOKOLAB_SHOTS"): page.screenshot(path=f"{shot}/jupyterlab.png")
        browser.close()
    run = Run(folder / "runs" / "fedpm" / "interactive")
    t0 = time.monotonic()
    while not run.claims and time.monotonic() - t0 < 10: time.sleep(0.1)
    assert rows == len(run.claims) > 0 and run.info["engine"] == "interactive"
