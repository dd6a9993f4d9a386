"Figures: bytes, limits, looks and the dark version"

import io
import subprocess
import sys
import xml.dom.minidom

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

mpl.use("agg")
from matplotlib import pyplot as plt

from yokolab.lab import plots


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def line(seed=0):
    with plots.style():
        fig, ax = plt.subplots(figsize=(4, 2))
        ax.plot(np.random.default_rng(seed).random(30), label="a")
        ax.set(xlabel="round", ylabel=r"gap $\|x - x^*\|^2$")
        ax.legend()
    return fig


SCRIPT = """
import sys, hashlib, numpy as np, matplotlib; matplotlib.use("agg")
from matplotlib import pyplot as plt
from yokolab.lab import plots
with plots.style():
    fig, ax = plt.subplots()
    ax.plot(np.arange(5.0)**2, **plots.styles("a")["a"]); ax.fill_between(range(5), 1, 2, alpha=0.2)
files = plots.save(fig, sys.argv[1] + "/f", data=dict(x=np.arange(5)/3))
for p in files.values(): print(hashlib.sha256(p.read_bytes()).hexdigest())
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    a, b = (subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path/d)], check=True, text=True,
                           capture_output=True).stdout for d in "ab")
    assert a == b and len(a.split()) == 3


def test_other_numbers_give_other_bytes(tmp_path):
    a, b = plots.save(line(0), tmp_path/"a"), plots.save(line(1), tmp_path/"b")
    for kind in a: assert a[kind].read_bytes() != b[kind].read_bytes()


def test_no_date_no_version(tmp_path):
    files = plots.save(line(), tmp_path/"a")
    assert b"Matplotlib" not in files["svg"].read_bytes().replace(b"Created with matplotlib", b"")
    assert b"dc:date" not in files["svg"].read_bytes()
    with Image.open(files["png"]) as png: assert "Software" not in png.info


def test_data_come_back_as_they_were(tmp_path):
    frame = pd.DataFrame(dict(round=[1, 2], gap=[1/3, 1e-12], method=["FedPM", "a, b"]))
    back = pd.read_csv(plots.save(line(), tmp_path/"a", data=frame)["csv"])
    assert back["method"].tolist() == ["FedPM", "a, b"]
    assert np.allclose(back["gap"], frame["gap"], rtol=1e-7, atol=0)


def test_without_data_there_is_no_csv(tmp_path):
    assert set(plots.save(line(), tmp_path/"sub"/"a")) == {"svg", "png"}


def test_the_style_of_the_moment_does_not_change_what_is_saved(tmp_path):
    def draw(name):
        with plots.style(): fig, ax = plt.subplots()
        with plots.style(): ax.plot([1, 2], color="C1")
        return plots.save(fig, tmp_path/name)["svg"].read_bytes()
    one = draw("a")
    other = {"svg.fonttype": "none", "svg.hashsalt": "x",
             "axes.prop_cycle": "cycler('color', 'rgb')"}
    with mpl.rc_context(other): two = draw("b")
    assert one == two and plots.PALETTE["orange"][0].encode() in one


def test_ten_thousand_points_become_an_image(tmp_path):
    with plots.style(): fig, ax = plt.subplots()
    cloud = ax.scatter(*np.random.default_rng(0).random((2, 20_000)), s=2)
    curve, = ax.plot(np.random.default_rng(1).random(9000))
    files = plots.save(fig, tmp_path/"a")
    assert all(p.stat().st_size <= plots.LIMIT for p in files.values())
    assert "<image" in files["svg"].read_text()
    assert not cloud.get_rasterized() and not curve.get_rasterized()


def test_a_mesh_is_an_image_at_once(tmp_path):
    with plots.style(): fig, ax = plt.subplots()
    ax.pcolormesh(np.eye(4), cmap="RdBu")
    assert "<image" in plots.save(fig, tmp_path/"a")["svg"].read_text()


def test_too_heavy_is_refused_and_nothing_is_written(tmp_path):
    fig, ax = plt.subplots(figsize=(8, 6))
    ax.imshow(np.random.default_rng(0).random((600, 800, 3)))
    with pytest.raises(ValueError, match=r"kB as svg.*fewer or smaller images"):
        plots.save(fig, tmp_path/"a")
    rows = dict(x=np.random.default_rng(0).random(20_000), y=0.123456789)
    with pytest.raises(ValueError, match="20000 rows"): plots.save(line(), tmp_path/"b", data=rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.svg", "a b", ".."])
def test_names_are_plain(tmp_path, name):
    with pytest.raises(ValueError, match="path="): plots.save(line(), tmp_path/name)


def test_not_a_figure():
    with pytest.raises(TypeError, match="fig=3"): plots.save(3, "a")


def test_a_photograph_keeps_its_colours(tmp_path):
    h, w = 120, 160
    red, green = np.meshgrid(np.linspace(0, 1, w), np.linspace(0, 1, h))
    picture = np.stack([red, green, 0.5 + 0*red], -1)
    with plots.style(): fig, ax = plt.subplots(figsize=(4, 3))
    ax.imshow(picture); ax.axis("off")
    with Image.open(plots.save(fig, tmp_path/"a")["png"]) as f: png = f.convert("RGB")
    with Image.open(_plain(fig)) as f: reference = f.convert("RGB")
    assert png.size == reference.size
    assert np.abs(np.asarray(png, int) - np.asarray(reference, int)).max() <= 24


def _plain(fig):
    out = io.BytesIO()
    with plots.style():
        fig.savefig(out, format="png", dpi=200, bbox_inches="tight", pad_inches=0.06)
    return out


# looks

def lightness(color):
    c = np.array(mpl.colors.to_rgb(color))
    c = np.where(c <= 0.04045, c/12.92, ((c + 0.055)/1.055)**2.4)
    return c @ [0.2126, 0.7152, 0.0722]


def contrast(a, b):
    hi, lo = sorted((lightness(a), lightness(b)), reverse=True)
    return (hi + 0.05)/(lo + 0.05)


# Machado, Oliveira and Fernandes (2009), severity 1
VISION = dict(
    normal=np.eye(3),
    protan=[[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998]],
    deutan=[[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881]],
    tritan=[[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900]],
    grey=np.tile([0.2126, 0.7152, 0.0722], (3, 1)))


TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929],        # OKLab, Ottosson (2020)
                   [0.2119034982, 0.6806995451, 0.1073969566],
                   [0.0883024619, 0.2817188376, 0.6299787005]])
TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                   [1.9779984951, -2.4285922050, 0.4505937099],
                   [0.0259040371, 0.7827717662, -0.8086757660]])


def lab(color, vision):
    c = np.array(mpl.colors.to_rgb(color))
    c = np.where(c <= 0.04045, c/12.92, ((c + 0.055)/1.055)**2.4)
    return TO_LAB @ np.cbrt(TO_LMS @ np.clip(np.array(vision) @ c, 0, 1))


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("paper", [0, 1])
def test_colours_differ_for_every_eye_and_in_grey(kind, paper):
    c = [lab(pair[paper], VISION[kind]) for pair in plots.PALETTE.values()]
    least = min(np.linalg.norm(a - b) for i, a in enumerate(c) for b in c[:i])
    assert least > (0.035 if paper == 0 else 0.02)        # 0.02 is about one noticeable step


def test_text_and_methods_can_be_read():
    for i in (0, 1):
        assert contrast(plots.INK[i], plots.PAPER[i]) > 12
        assert contrast(plots.FAINT[i], plots.PAPER[i]) > 4.5
    first = list(plots.PALETTE.values())[:3]
    assert all(contrast(c[i], plots.PAPER[i]) > 3 for c in first for i in (0, 1))


def test_base_names_look_the_same_everywhere():
    a, b = plots.styles("x", "SGD", "y"), plots.styles("AdamW", "SGD")
    assert a["SGD"] == b["SGD"] and a["y"]["color"] == list(plots.PALETTE.values())[1][0]
    a["SGD"]["color"] = "red"
    assert plots.styles("SGD")["SGD"]["color"] != "red"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("abcdefg", min_size=1, max_size=6), unique=True, max_size=28))
def test_no_two_methods_look_alike(names):
    st_ = plots.styles(*names, *plots.BASE)
    assert len({tuple(s.values()) for s in st_.values()}) == len(names) + len(plots.BASE)
    with plots.style(): assert all(mpl.colors.is_color_like(s["color"]) for s in st_.values())


def test_twice_and_too_many():
    with pytest.raises(ValueError, match="twice"): plots.styles("a", "b", "a")
    with pytest.raises(ValueError, match="33 methods"): plots.styles(*map(str, range(33)))


def test_figure_has_the_style():
    fig, axes = plots.figure(5, 2, ncols=2)
    assert tuple(fig.get_size_inches()) == (5, 2) and len(axes) == 2
    assert not axes[0].spines["top"].get_visible() and mpl.rcParams["axes.spines.top"]


def test_use_sets_the_style_for_good():
    with mpl.rc_context():
        plots.use()
        assert not mpl.rcParams["axes.spines.top"]


# dark

def test_dark_changes_colours_only(tmp_path):
    light = plots.save(line(), tmp_path/"a")["svg"].read_text()
    night = plots.dark(light)
    xml.dom.minidom.parseString(night)
    for table in (plots.PAPER, plots.INK, plots.GRID, plots.PALETTE["blue"]):
        assert table[0] in light and table[0] not in night and table[1] in night
    undo = night.replace(f' fill="{plots.INK[1]}"', "", 1)
    assert len(undo) == len(light) and undo.count("#") == light.count("#")
    assert plots.dark(light, paper="none").count("none") > light.count("none")


def test_dark_keeps_images_and_white_text(tmp_path):
    with plots.style(): fig, ax = plt.subplots()
    ax.imshow(np.eye(5))
    for i, color in enumerate(("w", "k", "0.5")): ax.text(i, i, "text", color=color)
    light = plots.save(fig, tmp_path/"a")["svg"].read_text()
    night = plots.dark(light)
    image = lambda s: s.split("base64,")[1].split('"')[0]
    assert image(light) == image(night) and "#ffffff" in night and "#808080" not in night


def test_dark_needs_the_text():
    with pytest.raises(ValueError, match=r"svg='a/b\.svg'"): plots.dark("a/b.svg")


def test_importing_plots_does_not_load_matplotlib():
    code = ("import sys, yokolab.lab.plots; "
            "assert not {'matplotlib', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
