"""The protocol of the generators: one picture, whoever draws it."""
import functools
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.synthetic import chaos, contours, controls, fractals, solids
from yokolab.synthetic.contours import RCDB, Rings, VisualAtom
from yokolab.synthetic.controls import Bezier, Broken, DeadLeaves, PerlinNoise, WhiteNoise
from yokolab.synthetic.core import (
    Generator,
    NoCategory,
    Stream,
    _category_key,
    as_keys,
    key_of,
    snap,
    words,
    words_on,
)
from yokolab.synthetic.fractals import FractalDB, OnePerturbed
from yokolab.synthetic.newton_fractals import NewtonFractals
from yokolab.synthetic.solids import ExFractalDB

QUICK = dict(points=1500, searched=5000)
MAKERS = {
    "VisualAtom": lambda: VisualAtom(), "RCDB": lambda: RCDB(), "Bezier": lambda: Bezier(),
    "FractalDB": lambda: FractalDB(rate=0.012, pad=3, **QUICK), "white": lambda: WhiteNoise(),
    "ExFractalDB": lambda: ExFractalDB(points=800), "Perlin": lambda: PerlinNoise(),
    "1p-frac": lambda: OnePerturbed(rate=0.012, pad=3, **QUICK), "leaves": lambda: DeadLeaves(),
    "broken": lambda: Broken(VisualAtom(canvas=64, fine=2)),
}


def digests():
    """A hash per generator of twelve pictures of 24 pixels, with the threads of the environment."""
    out = {}
    for name, make in MAKERS.items():
        g = make()
        some = g.categories(3, seed=5)
        x = g.render_batch([*some]*4, [0]*3 + [1]*3 + [2]*3 + [103]*3, 24,
                           threads=int(os.environ.get("THREADS", 1)))
        out[name] = hashlib.blake2b(x.numpy().tobytes(), digest_size=8).hexdigest()
    return out


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
@settings(deadline=None, max_examples=50)
def test_words_are_those_of_splitmix64_on_both_paths(key, at):
    z = (key + (at + 1)*0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ z >> 30)*0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27)*0x94D049BB133111EB) % 2**64
    want = z ^ z >> 31
    assert int(words(key, at)) == want
    assert int(words_on(as_keys([key]), torch.tensor([at])).numpy().view(np.uint64)[0]) == want


def test_streams_are_uniform_and_walk():
    s = Stream(key_of("a"))
    u = s.uniform(0, 1, 50_000)
    assert abs(u.mean() - 0.5) < 5e-3 and abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.02
    counts = np.bincount(Stream(3).integers(0, 9, 50_000))
    assert ((counts - 5000)**2/5000).sum() < 28                 # chi-squared, 9 degrees: p > 0.001
    assert Stream(3, 7).one(0, 1) == Stream(3).uniform(0, 1, 8)[7]


def test_another_process_draws_the_same_pixels():
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); import test_core; " \
           "json.dump(test_core.digests(), sys.stdout)"
    env = {**os.environ, "THREADS": "3", "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__)], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests()


def keys():
    """Keys of categories whose parameters come from cosines, products and eigenvalues."""
    plain, coefficients = NewtonFractals(), NewtonFractals(coefficients=True)
    return [g.key(c, 3) for g, n in ((plain, 3), (coefficients, 2), (MAKERS["1p-frac"](), 4),
                                     (MAKERS["ExFractalDB"](), 6)) for c in g.categories(n, 2)]


def test_keys_do_not_depend_on_the_processor():
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    off = " ".join(f for f in __cpu_dispatch__ if __cpu_features__.get(f))
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); import test_core; " \
           "json.dump(test_core.keys(), sys.stdout)"
    env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": off, "OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__)], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == keys()
    x = snap([-1e-17, 0.1])
    assert repr(float(x[0])) == "0.0" and abs(x[1] - 0.1) < 2**-30 and x[1]*2**30 % 1 == 0


def test_a_key_does_not_depend_on_what_was_drawn_before():
    g, whole, broken = RCDB(), Rings(5, 3, 1, 0), Rings(5, 3, 1.0, 0.0)     # equal, but not in repr
    both = g.key(whole, 0), g.key(broken, 0)
    _category_key.cache_clear()
    assert (g.key(broken, 0), g.key(whole, 0)) == both[::-1]


GOLDEN = {
    "VisualAtom": "1842546f2f41506f",
    "RCDB": "f05cb31160381cab",
    "Bezier": "8c06347c40f97da0",
    "FractalDB": "81ba31a2f97019bd",
    "white": "53638ee58209ba5d",
    "ExFractalDB": "affaad20ac49a708",
    "Perlin": "0eea61f7b7d8c7d8",
    "1p-frac": "3c36d41fb9d5102b",
    "leaves": "628d5a77efd162df",
    "broken": "bf10d6ff9c1e8349",
}


@pytest.mark.parametrize("name", MAKERS)
def test_pixels_of_a_version_never_change(name):
    assert digests_once()[name] == GOLDEN[name], "a pixel changed: raise the generator's version"


@pytest.mark.parametrize("name", ["VisualAtom", "RCDB", "FractalDB", "ExFractalDB", "leaves",
                                  "broken"])
def test_without_a_compiler_the_pixels_are_the_same(name, monkeypatch):
    g, size = MAKERS[name](), 12
    some = g.categories(3, seed=5)
    want = g.render_batch(some, [0, 1, 103], size)
    for module in (chaos, contours, controls, fractals, solids):
        monkeypatch.setattr(module, "have_numba", lambda: False)
    assert (g.render_batch(some, [0, 1, 103], size) == want).all()


@functools.cache
def digests_once():
    """The digests, computed once."""
    return digests()


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_does_not_depend_on_its_batch(name):
    g = MAKERS[name]()
    some = g.categories(3, seed=5)
    which = [0, 1, 2, 103]
    whole = g.render_batch([c for c in some for _ in which], which*3, 24, threads=4)
    assert whole.dtype == torch.uint8 and whole.shape == (12, g.channels, 24, 24)
    for i, c in enumerate(some):
        for j, n in enumerate(which): assert (g.render(c, n, 24) == whole[4*i + j]).all()
    back = g.render_batch(some[::-1], torch.tensor([1, 1, 1]), 24)
    assert (back.flip(0) == whole[1::4]).all()
    assert g.categories(2, seed=5) == some[:2] and g.categories(2, seed=6) != some[:2]
    none = g.render_batch([], [], 24, device="meta")
    assert none.shape == (0, 1, 24, 24) and none.device.type == "meta"


@pytest.mark.parametrize("bad", [0, -3, 2.5, True, 10_000])
def test_sizes_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="argument size="):
        RCDB().render_batch(RCDB().categories(1), [0], bad)


def test_other_bad_input():
    g = RCDB()
    c = g.categories(1)
    for call, message in ((lambda: g.categories(0), "argument n=0"),
                          (lambda: OnePerturbed().categories(0), "argument n=0"),
                          (lambda: Stream(0).pick(4, 3), "low=4, high=3"),
                          (lambda: g.render(c[0], -1, 8), "argument instance=-1"),
                          (lambda: g.render_batch(c, [0, 1], 8), "1 and 2 given"),
                          (lambda: g.render_batch(c, [0], 8, threads=0), "argument threads=0")):
        with pytest.raises(ValueError, match=message): call()
    with pytest.raises(TypeError, match="RCDB draws Rings"): g.render((3, 1), 0, 8)

    class Never(Generator):
        name, tries = "never", 50
        def draw(self, stream): return None
    with pytest.raises(NoCategory, match="50 candidates of never gave 0 categories"):
        Never().categories(1)
