"""Radial contours against closed forms, Pillow's lines and the tensor path."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.synthetic import contours
from yokolab.synthetic.contours import FIX, RCDB, Contour, VisualAtom, draw_contour, positions
from yokolab.synthetic.lines import average_down, draw_polygons

RINGS = st.builds(
    Contour, vertices=st.integers(3, 90), orbits=st.integers(1, 40), noise=st.just(0.),
    spacing=st.floats(0, 2), factor=st.sampled_from([1., 2.]),
    waves=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    axes=st.tuples(st.floats(0, 200), st.floats(0, 200)),
    centre=st.tuples(st.floats(0, 512), st.floats(0, 512)), key=st.integers(0, 2**64 - 1))


def closed_form(c):
    """Vertices without noise: (2, K, q)."""
    theta = 2*np.pi/c.vertices*np.arange(c.vertices)
    k = np.arange(1, c.orbits + 1)[:, None]
    grow = k*(np.sin(c.waves[0]*theta)/2 + np.sin(c.waves[1]*theta)/2 + c.spacing)
    return np.stack([m + f(theta)*(r + grow) for m, r, f in
                     zip(c.centre, c.axes, (np.cos, np.sin), strict=True)])


@given(RINGS)
@settings(deadline=None, max_examples=40)
def test_vertices_without_noise_have_a_closed_form(c):
    assert np.abs(positions(c).numpy()/FIX - closed_form(c)).max() < 1e-9


@given(RINGS, st.floats(0, 4), st.sampled_from([24, 60, 130]), st.sampled_from([0, 255]))
@settings(deadline=None, max_examples=25)
def test_loop_and_tensors_give_the_same_pixels(c, noise, size, background):
    c = replace(c, noise=noise)
    grays = np.random.default_rng(c.key % 1000).integers(0, 256, c.orbits).astype(np.uint8)
    a, b = (draw_contour(c, grays, 512, size, background, d) for d in (None, "cpu"))
    assert (a == b).all()


@given(RINGS)
@settings(deadline=None, max_examples=10)
def test_pixels_are_those_of_pillow(c):
    pillow = pytest.importorskip("PIL.Image")
    from PIL import ImageDraw
    grays = np.random.default_rng(0).integers(0, 256, c.orbits).astype(np.uint8)
    image = pillow.new("L", (512, 512))
    draw, at = ImageDraw.Draw(image), positions(c).numpy()/FIX
    for k in range(c.orbits):
        for j in range(c.vertices):
            i = (j + 1) % c.vertices
            draw.line((*at[:, k, j], *at[:, k, i]), fill=int(grays[k]), width=1)
    assert (np.asarray(image) == draw_contour(c, grays, 512, 512).numpy()).all()


def test_symmetries():
    c = Contour(60, 12, 0., 0.3, 1., (4, 8), (50., 50.), (0., 0.), 0)
    x, y = positions(c).double()/FIX                        # waves of multiples of 4: quarter turns
    assert (x.roll(15, 1) - y).abs().max() < 1e-9 and (y.roll(15, 1) + x).abs().max() < 1e-9
    g = VisualAtom(sorted_waves=True)
    assert all(a.waves[0] <= a.waves[1] for a in g.categories(30))
    atom = VisualAtom().categories(1)[0]
    pictures = []
    for waves in ((3, 7), (7, 3)):
        k = VisualAtom().contour(replace(atom, waves=waves), 99)
        pictures.append(draw_contour(k, np.full(atom.orbits, 200, np.uint8), 512, 128))
    assert (pictures[0] == pictures[1]).all()


def test_noise_has_perlins_marginal():
    i, u = np.meshgrid(np.arange(256), np.linspace(0, 1, 201))
    g = contours.GRADIENTS
    xi = contours.blend(u, g[i], g[(i + 1) % 256])
    assert abs(xi.std() - 0.329) < 2e-3 and abs(xi.mean()) < 2e-3
    assert np.allclose(np.quantile(xi, [.05, .25, .75, .95]), [-.579, -.152, .144, .616], atol=8e-3)
    assert abs(xi.max() - 0.952) < 1e-3 and (xi[0] == 0).all() and np.abs(xi[-1]).max() == 0


@pytest.mark.parametrize("change", [
    dict(vertices=2), dict(vertices=10**6), dict(orbits=0), dict(noise=-1.), dict(noise=np.nan),
    dict(spacing=np.inf), dict(radius=-1), dict(waves=(-1, 2)), dict(ovals=(0., 1.))])
def test_parameters_out_of_range_are_refused_by_name(change):
    g = VisualAtom()
    bad = replace(g.categories(1)[0], **change)
    with pytest.raises(ValueError, match=f"argument {next(iter(change))}="): g.render(bad, 0, 16)


@pytest.mark.parametrize("g, message", [
    (RCDB(vertices=(20, 3)), "vertices="), (RCDB(mean=0.), "mean=0"),
    (RCDB(vertices=(2000, 3000)), "mean=100"), (RCDB(orbits=(9, 3)), "low=9, high=3"),
    (VisualAtom(waves=(4, 3)), "low=4, high=3")])
def test_ranges_that_hold_no_category_are_refused_at_once(g, message):
    with pytest.raises(ValueError, match=message): g.categories(1)


def test_ranges_are_kept_and_one_frequency_is_possible():
    for c in VisualAtom().categories(60, seed=3):
        assert 200 <= c.vertices <= 1000 and 1 <= c.orbits <= 200 and 0 <= c.noise < 4
        assert c.waves[0] == 0 or c.waves[0] != c.waves[1]
    assert all(3 <= c.vertices <= 200 for c in RCDB().categories(60))
    assert VisualAtom(waves=(20, 20)).categories(1)[0].waves == (20, 20)


def test_average_and_polygons_without_extent():
    with pytest.raises(ValueError, match="does not divide"):
        average_down(torch.zeros(1, 9, 9, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="argument fine=0"):
        average_down(torch.zeros(1, 9, 9, dtype=torch.uint8), 0)
    assert average_down(torch.full((1, 4, 4), 255, dtype=torch.uint8), 2).unique().tolist() == [255]
    p = torch.full((1, 4), -3)
    assert draw_polygons(p, p, torch.tensor([9]), 8).sum() == 0
