"""Training, augmentation and evaluation: closed forms, reproducibility, resuming."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.synthetic import augment
from yokolab.synthetic.evaluation import (
    Target,
    evaluate,
    few,
    knn,
    linear_probe,
    patches,
    sized,
    target,
)
from yokolab.synthetic.training import Recipe, accuracy, ahead, cached, predict, rate, train
from yokolab.synthetic.vit import vit

G = lambda s=0: torch.Generator().manual_seed(s)
tiny = lambda classes=4, **k: vit("micro", size=8, patch=4, channels=1, classes=classes, dim=16,
                                  depth=1, heads=2, **k)
X = torch.rand(40, 1, 8, 8, generator=G())
Y = torch.arange(40) % 4


def test_adamw_and_loss_against_a_plain_loop():
    """Three steps of train() equal torch's own optimiser fed by hand."""
    recipe = Recipe(steps=3, batch=10, lr=3e-3, warmup=1, decay=0.1, smoothing=0.2, clip=None)
    ours, plain, source = tiny(), tiny(), cached(X, Y, 10, 2)
    train(ours, source, recipe, 2)
    w = dict(plain.named_parameters())
    free = [p for n, p in w.items() if p.ndim < 2 or n in ("cls_token", "pos_embed")]
    rest = [p for n, p in w.items() if p.ndim >= 2 and n not in ("cls_token", "pos_embed")]
    opt = torch.optim.AdamW([dict(params=free, weight_decay=0.0),
                             dict(params=rest, weight_decay=0.1)])
    for t in range(3):
        for g in opt.param_groups: g["lr"] = rate(t, recipe)
        x, y = source(t)
        opt.zero_grad()
        F.cross_entropy(plain(2*x - 1), y, label_smoothing=0.2).backward()
        opt.step()
    for n, p in ours.named_parameters():
        if n.endswith("qkv.bias"): continue     # of keys: its gradient is 0 up to rounding
        torch.testing.assert_close(p, w[n], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", [augment.DEIT, augment.LIGHT])
def test_the_seed_decides_alone(policy):
    recipe = Recipe(steps=4, batch=8, augment=policy, average=0.9)
    nets, means = [], []
    for noise in (1, 5):
        torch.rand(noise)
        net = tiny(drop_path=0.3)
        means.append(train(net, cached(X, Y, 8), recipe, 7).average)
        nets.append(net.state_dict())
    assert all(torch.equal(nets[0][n], nets[1][n]) for n in nets[0])
    assert all(torch.equal(means[0][n], means[1][n]) for n in means[0])
    other = tiny(drop_path=0.3)
    train(other, cached(X, Y, 8), recipe, 8)
    assert not torch.equal(other.head.weight, nets[0]["head.weight"])


def test_sources_run_ahead_and_show_errors():
    source = cached(X, Y, 16, 3)
    early = ahead(source, 9)
    for t in range(9): assert torch.equal(early(t)[0], source(t)[0])
    def broken(step): raise ValueError(f"no picture {step}")
    with pytest.raises(ValueError, match="no picture 0"): ahead(broken, 3)(0)
    seen = torch.cat([source(t)[1] for t in range(2)])
    assert len(seen) == 32 and torch.equal(cached(X, Y, 100)(0)[1].sort().values, Y.sort().values)


def test_half_precision_is_close():
    a, b = tiny(), tiny()
    r = dict(steps=3, batch=10, warmup=1)
    one = train(a, cached(X, Y, 10), Recipe(**r)).losses
    two = train(b, cached(X, Y, 10), Recipe(**r, half=True)).losses
    assert max(abs(u - v) for u, v in zip(one, two, strict=True)) < 0.02


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([(9, 9), (16, 12)]),
       st.floats(0, 10))
def test_augmentation_stays_in_range(seed, channels, shape, magnitude):
    x = torch.rand(5, channels, *shape, generator=G(seed))
    y = augment.rand_augment(x, G(seed), magnitude)
    assert y.shape == x.shape and y.min() >= -1e-6 and y.max() <= 1 + 1e-6
    q = augment.smooth_targets(torch.arange(5), 5)
    for f in (augment.mixup, augment.cutmix):
        v, p = f(x, q, G(seed))
        torch.testing.assert_close(p.sum(1), torch.ones(5))
        assert v.min() >= 0 and v.max() <= 1
    assert torch.equal(augment.random_crop(x, G(seed)), augment.random_crop(x, G(seed)))
    two = (x > 0.5).float()
    assert set(augment.random_shift(two, G(seed), 3).unique().tolist()) <= {0.0, 1.0}


def test_probe_separates_what_is_linear():
    g = G(3)
    centres = 3*torch.randn(4, 10, generator=g)
    x = centres[Y] + 0.3*torch.randn(40, 10, generator=g)
    test = centres[Y] + 0.3*torch.randn(40, 10, generator=g)
    assert (linear_probe(x, Y, 4)(test).argmax(1) == Y).all() and (knn(x, Y, test) == Y).all()
    noise = torch.randn(40, 200, generator=g)
    assert linear_probe(noise, Y, 4).right < 0.6 < linear_probe(x, Y, 4).right
    same = linear_probe(x*100 + 7, Y, 4)(test*100 + 7)
    torch.testing.assert_close(same, linear_probe(x, Y, 4)(test), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="at least two"): linear_probe(x[:1], Y[:1], 4)


def test_targets_are_disjoint_and_repeatable():
    t = target("digits", 8, channels=1, per_class=5, seed=3)
    u = target("digits", 8, channels=1, per_class=5, seed=3)
    assert torch.equal(t.x, u.x) and len(t.x) == 50 and t.y.bincount().tolist() == [5]*10
    seen = {v.numpy().tobytes() for v in t.x}
    assert len(seen & {v.numpy().tobytes() for v in t.test_x}) == 0
    for across in (False, True):
        a, _ = patches(4, 64, 0, G(1), across)
        b, _ = patches(4, 64, 1, G(1), across)
        assert not (a.flatten(1)[:, None] == b.flatten(1)).all(-1).any()
    assert torch.equal(few(Y, 2, G(1)), few(Y, 2, G(1)))
    gray = sized(torch.full((1, 3, 4, 4), 200, dtype=torch.uint8), 8, 1)
    assert gray.shape == (1, 1, 8, 8) and (gray == 200).all()


def test_cifar10_by_name():
    from yokolab.lab.data import DataNotFound
    try: t = target("cifar10", 16, per_class=3, tests=50)
    except DataNotFound: pytest.skip("cifar10 is not in YOKOLAB_DATA")
    assert t.x.shape == (30, 3, 16, 16) and t.classes == 10 and len(t.test_x) == 50


def test_evaluation_leaves_the_net_alone():
    t = Target("toy", X, Y, X, Y, 4)
    net = tiny(classes=9)
    before = {n: w.clone() for n, w in net.state_dict().items()}
    report = evaluate(net, t, Recipe(steps=60, batch=40, lr=5e-3, smoothing=0.0, warmup=5))
    assert all(torch.equal(before[n], w) for n, w in net.state_dict().items())
    assert report.tuned > 0.5                               # it can learn 40 pictures by heart
    assert predict(net, X, batch=7).shape == (40, 9)
    torch.testing.assert_close(predict(net, X, 7), predict(net, X))
    assert accuracy(net, X, predict(net, X).argmax(1)) == 1.0
