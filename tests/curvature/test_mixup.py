"""Mixup: mass, convexity, running partners, bad input."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from yokolab.curvature.mixup import (
    RunningMixup,
    beta_weights,
    mix,
    mixup,
    soft_cross_entropy,
    soft_labels,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def rng(seed): return torch.Generator().manual_seed(seed)


def batch(seed, n=9, classes=4, shape=(2, 3)):
    g = rng(seed)
    labels = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, *shape, generator=g), soft_labels(labels, classes)


@quick
@given(seeds, st.floats(0.01, 8), st.booleans())
def test_label_mass_and_ranges(seed, alpha, per_sample):
    x, y = batch(seed)
    m = mixup(x, y, alpha, rng(seed), per_sample)
    assert torch.allclose(m.y.sum(1), torch.ones(9)) and bool(((0 <= m.lam) & (m.lam <= 1)).all())
    assert m.x.min() >= x.min() - 1e-6 and m.x.max() <= x.max() + 1e-6
    assert torch.allclose(m.x.sum(0), x.sum(0), atol=1e-4) or per_sample    # a permutation
    assert (len(m.lam.unique()) == 1) == (not per_sample)


@quick
@given(seeds)
def test_weights_of_one_and_zero_return_the_data(seed):
    x, y = batch(seed)
    u, v = batch(seed + 1)
    one = mix(x, y, u, v, torch.ones(9))
    nil = mix(x, y, u, v, torch.zeros(9))
    assert torch.equal(one.x, x) and torch.equal(one.y, y)
    assert torch.equal(nil.x, u) and torch.equal(nil.y, v)


@quick
@given(seeds, st.floats(0, 1))
def test_mixing_labels_is_mixing_losses(seed, lam):
    z = torch.randn(9, 4, dtype=torch.float64, generator=rng(seed))
    y, v = batch(seed)[1].double(), batch(seed + 1)[1].double()
    mixed = soft_cross_entropy(z, lam * y + (1 - lam) * v)
    losses = lam * soft_cross_entropy(z, y) + (1 - lam) * soft_cross_entropy(z, v)
    assert torch.allclose(mixed, losses, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 4.0])
def test_weights_follow_the_beta_distribution(alpha):
    lam = beta_weights(5000, alpha, rng(3), torch.float64).numpy()
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_alpha_zero_touches_nothing():
    x, y = batch(0)
    g = rng(0)
    state = g.get_state()
    m = mixup(x, y, 0, g)
    assert m.x is x and m.y is y and torch.equal(state, g.get_state())


@quick
@given(seeds, st.floats(0.1, 2))
def test_running_mixup_unrolls(seed, alpha):
    running, g, prior = RunningMixup(alpha), rng(seed), None
    for t in range(4):
        x, y = batch(seed + t)
        m = running(x, y, g)
        if prior is None: assert m.x is x
        else:
            lam = m.lam[:, None, None]
            assert torch.allclose(m.x, lam * x + (1 - lam) * prior, atol=1e-6)
            assert bool((m.lam >= 0.5).all()) and torch.allclose(m.y.sum(1), torch.ones(9))
        prior = m.x


def test_running_mixup_resumes_from_a_checkpoint():
    a, g = RunningMixup(0.4), rng(0)
    a(*batch(1), g)
    b = RunningMixup(1.0)
    b.load_state_dict(a.state_dict())
    h = torch.Generator()
    h.set_state(g.get_state())
    assert torch.equal(a(*batch(2), g).x, b(*batch(2), h).x)


def test_label_smoothing_and_class_probabilities():
    y = soft_labels(torch.tensor([1, 0]), 4, 0.2)
    assert torch.allclose(y, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert torch.equal(soft_labels(y, 4), y)


@pytest.mark.parametrize(("make", "word"), [
    (lambda: soft_labels(torch.tensor([5]), 3), "labels from 5"),
    (lambda: soft_labels(torch.zeros(2, 5), 3), "(2, 5)"),
    (lambda: soft_labels(torch.tensor([0]), 3, 1.0), "eps=1.0"),
    (lambda: beta_weights(3, -1.0), "alpha=-1.0"),
    (lambda: RunningMixup(float("inf")), "alpha=inf"),
    (lambda: mixup(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 1.0), "soft_labels"),
    (lambda: mix(*batch(0), *batch(1), torch.ones(3)), "lam of shape (3,)"),
    (lambda: soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4)), "soft_labels(y, 3)"),
])
def test_errors_name_the_argument(make, word):
    with pytest.raises(ValueError, match="argument") as error: make()
    assert word in str(error.value)


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="floating"):
        mixup(torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3, 2), 1.0)
