"""Time of the site's build for 64 generated notebooks: `python benchmarks/site_64.py`.

The generated project has everything a real one has (formulas, stored outputs, exported functions
with documented parameters, promoted runs with claims in every state), so the tests build their
small site from it as well.
"""

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
AREAS = ["curvature", "federated", "language", "synthetic", "vision", "hpc", "agents", "audio"]
STATES = ["confirmed", "weak", "refuted", "out of scale", "unmeasured"]

PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "minilab"
version = "0.1.0"
description = "A small lab for the site's tests"
requires-python = ">=3.11"

[project.urls]
Repository = "https://example.org/minilab"
Documentation = "https://example.org/docs/minilab"

[tool.nbdev]
nbs_path = "nbs"
lib_path = "minilab"
tst_flags = "slow gpu data"
allowed_cell_metadata_keys = ["tags"]
"""


INI = """[lab]
title = minilab
subtitle = a small lab

[profiles]
cpu = 300

[runs]
folder = runs
promoted = figures
engine = inline

[site]
folder = _site
repository = https://example.org/minilab

[areas]
"""

IDEA = r"""## The idea

Minimise $f(\theta)=\tfrac1N\sum_i f_i(\theta)$ with gradient $g$ and preconditioner $P$.
`NAME_step` is one step; it is measured in [the study](STEM_study.ipynb).

:::{note}
A symbol of the source keeps its name.
:::"""

EQUATION = r"""## The method

$$
\theta^{t+1} = \theta^t - \eta P^{-1} g, \qquad P = \begin{bmatrix} a & b \\ b & c \end{bmatrix}
$$ (eq-NAME-step)

Equation {eq}`eq-NAME-step` is the whole method, component by component

\begin{align}
\theta_1 &= \theta_1 - \eta g_1 \\
\theta_2 &= \theta_2 - \eta g_2
\end{align}"""

STEP = r"""#| export
def NAME_step(
    theta:float, # parameters, (d,)
    grad:float, # gradient at `theta`, (d,)
    lr:float=0.1, # step size $\eta$
) -> float: # the next parameters
    "One preconditioned step."
    return theta - lr * grad"""

STATE = """#| export
@dataclass
class TITLEState:
    "What a round leaves behind."
    theta: float # parameters
    rounds: int = 0 # rounds so far

    def advance(self,
        grad:float, # gradient
    ): # the state after one more round
        "One round."
        return TITLEState(NAME_step(self.theta, grad), self.rounds + 1)"""

PARAMETERS = r"""rounds: int = 40  # communication rounds
lr: float | None = 0.1  # step size $\eta$
alphas: tuple[float, ...] = (0.1, 1.0)  # Dirichlet concentrations"""


def cell(kind, source, tags=(), outputs=()):
    "One notebook cell."
    out = dict(cell_type="markdown" if kind == "md" else "code", source=source,
               id=hashlib.sha1((kind + source).encode()).hexdigest()[:8],
               metadata=dict(tags=list(tags)) if tags else {})
    return out if kind == "md" else out | dict(execution_count=None, outputs=list(outputs))


def notebook(path, *cells):
    "Write a notebook."
    kernel = dict(display_name="python3", language="python", name="python3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4,
                                    nbformat_minor=5),
                               indent=1))


@cache
def picture(k):
    "Three curves as bytes, by format."
    import matplotlib.pyplot as plt

    from yokolab.lab.plots import figure, save, style
    with style():
        fig, ax = figure()
        for j, mark in enumerate("os^"):
            gap = [10.0 ** (-i * (j + 1 + k % 3) / 4) for i in range(12)]
            ax.semilogy(gap, marker=mark, label=f"method {j + 1}")
        ax.set(xlabel="round", ylabel="loss gap")
        ax.legend()
    with tempfile.TemporaryDirectory() as tmp:
        data = {fmt: path.read_bytes() for fmt, path in save(fig, Path(tmp) / "x").items()}
    plt.close(fig)
    return data


def png_output(k):
    "A stored picture output."
    data = {"image/png": base64.b64encode(picture(k % 3)["png"]).decode(),
            "text/plain": ["<Figure>"]}
    return dict(output_type="display_data", data=data, metadata={})


def table_output():
    "A stored table output."
    import pandas as pd
    frame = pd.DataFrame({"round": [1, 2, 3], "loss gap": [1e-1, 1e-3, 1e-9]})
    data = {"text/html": frame.to_html(), "text/plain": [str(frame)]}
    return dict(output_type="execute_result", execution_count=None, data=data, metadata={})


def method(path, area, name, k):
    "A method notebook with stored outputs."
    fill = lambda t: (t.replace("NAME", name).replace("TITLE", name.title())
                      .replace("STEM", path.stem))
    notebook(
        path, cell("md", f"# {name.upper()}\n> preconditioned mixing number {k}, written out"),
        cell("code", f"#| default_exp {area}.{name}"),
        cell("code", "#| export\nimport math\nfrom dataclasses import dataclass"),
        cell("md", fill(IDEA)), cell("code", "fig", outputs=[png_output(k)]),
        cell("md", fill(EQUATION)), cell("code", fill(STEP)),
        cell("code", f"assert math.isclose({name}_step(1.0, 1.0), 0.9)"),
        cell("code", fill(STATE)), cell("code", "#| slow\ntable", outputs=[table_output()]),
        cell("code", "#| hide\nsecret = 1"),
        cell("md", fill("## See also\n\n`TITLEState` and the [settings](../../settings.ini).")))


def study_cells(name, k, figure=None):
    "The cells of a study; with the figure's output when it has been run."
    claims = {f"C{i + 1}": dict(text=f"{name} claim {i + 1}: the gap shrinks",
                                source=f"Somebody 2026, Table {i + 1}",
                                kind=kind, target="> 0.05")
              for i, kind in enumerate(("trend", "identity", "cost", "bound", "number"))}
    out = []
    if figure:
        data = {"image/png": base64.b64encode(picture(k % 3)["png"]).decode(),
                "text/plain": ["<Figure>"]}
        out = [dict(output_type="display_data", data=data,
                    metadata={"yokolab": {"figure": figure}})]
    return [cell("md", f"# {name.upper()} study\n> does {name} do what its source says"),
        cell("md", "## Claims in scope\n\nSet before the run."),
        cell("code", "from minilab.lab import begin"),
        cell("code", PARAMETERS, tags=["parameters"]),
        cell("code", "profiles = dict(smoke=dict(rounds=2), cpu=dict(), gpu=dict(rounds=400))",
             tags=["profiles"]),
        cell("code", f"claims = {json.dumps(claims, indent=4)}", tags=["claims"]),
        cell("code", f"lab = begin({name!r}, rounds, lr, alphas)"),
        cell("md", "## Convergence\n\nThe gap against rounds."),
        cell("code", 'lab.figure("convergence", None)', outputs=out),
        cell("md", "## Reading the result\n\nOne claim is refuted, with its numbers.")]


def promote(root, area, name, k):
    "A promoted run: claims, run record, executed study, figure and its data."
    out = root / "figures" / name
    out.mkdir(parents=True)
    digest = hashlib.sha1(name.encode()).hexdigest()[:12]
    claims = []
    for i, kind in enumerate(("trend", "identity", "cost", "bound", "number")):
        state = STATES[(i + k) % 5]
        value = dict(confirmed=(0.12, 0.08, 0.16), weak=(0.06, 0.03, 0.09),
                     refuted=(0.01, -0.02, 0.03)).get(state)
        claims.append(dict(
            id=f"C{i + 1}",
            text=f"{name}: the gap $f-f^\\ast$ shrinks faster than with `averaging`, part {i + 1}",
            source=f"Somebody 2026, Table {i + 1}", kind=kind, target="> 0.05",
            measured=value[0] if value else None,
            interval=list(value[1:]) if value else None, seeds=[0, 1, 2] if value else [],
            profile="cpu",
            hardware="2 cores", versions={"torch": "2.13.0"}, digest=digest, date="2026-11-20",
            state=state,
            reason="needs a GPU" if state == "out of scale" else "", unit="accuracy"))
    (out / "claims.json").write_text(json.dumps(dict(topic=name, claims=claims)))
    run = dict(digest=digest, profile="cpu", engine="papermill", hardware="2 cores",
               date="2026-11-20", seconds=12.5,
               params=dict(rounds=30, lr=0.1, alphas=[0.1, 1.0]), claims=[c["id"] for c in claims])
    fig = dict(name="convergence", caption="Loss gap against rounds (C1).",
               alt="Three falling curves.", digest=digest)
    (out / "run.json").write_text(json.dumps(dict(topic=name, title=f"{name.upper()} study",
                                                  area=area, runs=[run],
                                                  figures=[fig])))
    for fmt in ("svg", "png"): (out / f"convergence.{fmt}").write_bytes(picture(k % 3)[fmt])
    (out / "convergence.csv").write_text("round,gap\n1,0.1\n")
    notebook(out / "study.ipynb", *study_cells(name, k, figure="convergence"))


def project(root, notebooks=8, docs=HERE / "docs"):
    "A project of `notebooks` notebooks, two a topic; the last topic has not been run."
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    topics = notebooks // 2
    count = min(len(AREAS), max(1, topics // 2))
    chosen = AREAS[:count]
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "minilab").mkdir()
    (root / "minilab" / "__init__.py").write_text('"A small lab."\n__version__ = "0.1.0"\n')
    areas = "\n".join(f"{10 * (i + 1)}_{a} = {a.title()} | all about {a}"
                      for i, a in enumerate(chosen))
    (root / "settings.ini").write_text(INI + areas + "\n")
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0\n\n- First release.\n")
    for k in range(topics):
        a, name = k % count, f"topic{k}"
        at = root / "nbs" / f"{10 * (a + 1)}_{chosen[a]}"
        method(at / f"{10 + k}_{name}.ipynb", chosen[a], name, k)
        notebook(at / f"{10 + k}_{name}_study.ipynb", *study_cells(name, k))
        if k < topics - 1: promote(root, chosen[a], name, k)
    skip = shutil.ignore_patterns("_stage", "__pycache__")
    shutil.copytree(docs, root / "docs", ignore=skip)
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", export], cwd=root, check=True, capture_output=True)
    return root


def main():
    "Generate, build cold and warm, report."
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--notebooks", type=int, default=64)
    ap.add_argument("--jobs", type=int, default=2)
    args = ap.parse_args()
    from yokolab.lab.site import build_site
    with tempfile.TemporaryDirectory() as tmp:
        root = project(Path(tmp) / "minilab", args.notebooks)
        rows = {}
        for name in ("cold", "warm"):
            t = time.perf_counter()
            site = build_site(root, jobs=args.jobs)
            rows[name] = round(time.perf_counter() - t, 2)
        size = sum(p.stat().st_size for p in site.path.rglob("*") if p.is_file())
        print(json.dumps(dict(notebooks=args.notebooks, jobs=args.jobs, pages=site.pages,
                              seconds=rows,
                              megabytes=round(size / 1e6, 1))))


if __name__ == "__main__": main()
