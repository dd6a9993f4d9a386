"""Controls, small generators, pre-training."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from yokolab.synthetic.contours import VisualAtom
from yokolab.synthetic.controls import (
    Bezier,
    Broken,
    Curve,
    DeadLeaves,
    Lattice,
    Leaf,
    PerlinNoise,
    Spread,
    WhiteNoise,
    bezier,
    cut,
    leaves,
)
from yokolab.synthetic.fdsl import (
    best_rate,
    components,
    edges,
    pretrain,
    real_set,
    small,
    transfer,
    tuning_target,
)
from yokolab.synthetic.pictures import fixed_set
from yokolab.synthetic.training import Recipe, predict
from yokolab.synthetic.vit import vit

SHAPE = dict(patch=8, dim=32, depth=2)


def test_white_noise_has_its_moments_and_no_space():
    x = WhiteNoise().render(Spread(120., 60.), 3, 200).double()[0]
    assert abs(x.mean() - 119.5) < 1 and abs(x.std() - 60/3**0.5) < 0.5
    for d in (0, 1): assert abs((x - x.mean()).roll(1, d).mul(x - x.mean()).mean()/x.var()) < 0.02


def test_perlin_noise_is_smooth_between_cells_and_flat_at_corners():
    c = Lattice((4, 4))
    x = PerlinNoise().render(c, 1, 256).double()[0]
    assert x.diff(dim=0).abs().max() <= 9 and x.diff(dim=1).abs().max() <= 9 and x.std() > 15
    corners = x[64::64, 64::64] + x[63:-1:64, 63:-1:64]
    assert (corners/2 - 128).abs().max() < 3


def test_leaves_cover_and_the_first_is_on_top():
    leaf, g = Leaf(0, 1.0, 0.2), DeadLeaves()
    x, top = g.render(leaf, 0, 60)[0].double(), leaves(leaf, g.key(leaf, 0), 20)
    v, u = (torch.arange(60) + 0.5)[:, None]/60, (torch.arange(60) + 0.5)/60
    inside = (u - top[0, 0])**2 + (v - top[0, 1])**2 <= top[0, 2]**2 - 1e-9
    assert inside.any() and (x[inside] == top[0, 5]).all()
    r = leaves(Leaf(0, 1., 1e-3), 5, 20_000)[:, 2]
    want = np.interp(np.linspace(0.05, 0.95, 5), np.cumsum(np.linspace(.03, 1, 2000)**-3 - 1)
                     / np.sum(np.linspace(.03, 1, 2000)**-3 - 1), np.linspace(.03, 1, 2000))
    assert np.abs(np.quantile(r, np.linspace(0.05, 0.95, 5)) - want).max() < 0.01


def test_bezier_curves_are_affine_and_bernstein():
    p = np.random.default_rng(0).uniform(size=(5, 2))
    t, q = np.arange(64)/64, np.concatenate([p, p[:1]])
    want = q[:, None] + np.zeros((6, 64, 2))
    while len(want) > 1: want = (1 - t)[:, None]*want[:-1] + t[:, None]*want[1:]     # de Casteljau
    assert np.abs(bezier(p, 64) - want[0]).max() < 1e-13
    assert Bezier().render(Curve(((.2, .2), (.8, .2), (.5, .9))), 0, 32).max() >= 64


def test_cutting():
    base = VisualAtom(canvas=64, fine=2)
    some = base.categories(2)
    assert (Broken(base, lines=0).render_batch(some, [3, 4], 24)
            == base.render_batch(some, [3, 4], 24)).all()
    x = torch.full((1, 50, 50), 200, dtype=torch.uint8)
    lit = [int((cut(x, 7, n) == 200).sum()) for n in (0, 1, 10, 100)]
    assert lit[0] == 2500 and lit == sorted(lit, reverse=True) and len(set(lit)) == 4
    assert (cut(x, 7, 10, width=2) <= cut(x, 7, 10)).all()
    with pytest.raises(ValueError, match="lines=-1"):
        Broken(base, lines=-1).render_batch(some, [0, 0], 24)
    with pytest.raises(ValueError, match="corners 0 or from 3"):
        DeadLeaves().render(Leaf(2, 1., 0.1), 0, 16)


def test_small_generators_fill_their_pictures():
    for name in ("VisualAtom", "RCDB", "Bezier", "dead leaves", "white noise", "broken"):
        g = small(name)
        x, y = fixed_set(g, g.categories(4), 5, 16)
        assert y.tolist() == [i//5 for i in range(20)]
        assert (x.flatten(1).float().std(1) > 1).float().mean() > 0.8, name
    with pytest.raises(ValueError, match="no such generator"): small("photographs")


def test_an_untrained_head_knows_nothing_and_a_trained_one_does():
    g = small("white noise")
    x, y = fixed_set(g, g.categories(6), 20, 16)
    start = vit("micro", 0, size=16, channels=1, classes=6, **SHAPE)
    before = float(torch.nn.functional.cross_entropy(predict(start, x), y))
    assert abs(before - math.log(6)) < 0.4
    recipe = Recipe(steps=60, warmup=5, lr=4e-3, smoothing=0.)
    a, b = (pretrain(x, y, recipe, 1, (x[::7], y[::7]), **SHAPE) for _ in range(2))
    assert a.loss == b.loss < 0.9*before and a.accuracy > 0.4 and a.classes == 6
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert pretrain(x, shuffled, recipe, 1, **SHAPE).loss > a.loss


def test_tuning_uses_pictures_of_its_own():
    t = tuning_target("digits", 16, 4, extra=6)
    assert t.y.bincount().tolist() == [4]*10 and t.test_y.bincount().tolist() == [6]*10
    net = vit("micro", 0, size=16, channels=1, classes=10, **SHAPE)
    rate, table = best_rate(net, t, Recipe(steps=2, batch=20, warmup=0), (1e-3, 1e-2))
    assert rate in table and table[rate] == max(table.values())
    r = transfer(net, [t, replace(t, x=t.test_x, y=t.test_y)])
    assert 0 < r.knn <= 1 and 0 < r.probe <= 1 and r.tuned is None


def test_measures_of_pictures():
    x = torch.zeros(3, 1, 20, 20, dtype=torch.uint8)
    x[0, 0, ::4, ::4] = 255
    x[1, 0, 5:15, 5:15] = 255
    assert components(x).tolist() == [25, 1, 0]
    e = edges(x)
    assert e[2] == 0 and 0 < e[1] < 0.5 and torch.allclose(edges(x.transpose(-1, -2)), e)
    y, labels = real_set(48, 16)
    assert y.shape == (48, 1, 16, 16) and labels.bincount().tolist() == [4]*12
