"""Stacked layers, input covariances and FOOF steps against dense references."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.federated.foof import Foof, FoofState, ModuleNet, covariance, foof_direction_ref
from yokolab.federated.networks import (
    Conv,
    Dense,
    Norm,
    cnn,
    evaluate,
    flatten,
    gradients,
    layout,
    losses,
    mlp,
    resnet18,
    stack,
    views,
)

few = settings(max_examples=15, deadline=None)


def gen(seed=0): return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def noisy(net, n, seed=0):
    """n clients with different parameters, float64."""
    g = gen(seed)
    return {k: v + 0.1*torch.randn(n, *v.shape, generator=g, dtype=torch.float64)
            for k, v in net.init(seed, dtype=torch.float64).items()}


def batch(net, n, b, seed=0):
    """Random samples, labels and weights with sum 1 for n clients."""
    g = gen(seed)
    w = torch.rand(n, b, generator=g, dtype=torch.float64)
    return (torch.randn(n, b, *net.inputs, generator=g, dtype=torch.float64),
            torch.randint(net.classes, (n, b), generator=g), w/w.sum(1, keepdim=True))


NETS = {
    "mlp": mlp(5, 7, 4, 3),
    "cnn": cnn((2, 8, 8), 3, channels=(3, 4), hidden=(6,), kernel=3, padding=1, groups=1),
    "plain cnn": cnn((1, 12, 12), 3, channels=(2, 3), hidden=(), kernel=3),
    "resnet": resnet18((2, 8, 8), 3, width=2, groups=1, blocks=(1, 1)),
}


def torch_twin(net, p):
    """The net of PyTorch's own layers with the weights of one client."""
    mods = []
    for l in net.layers:
        W = p.get(getattr(l, "name", None))
        if isinstance(l, Dense):
            m = nn.Linear(l.inp, l.out, dtype=torch.float64)
            m.weight.data, m.bias.data = W[:, :-1].clone(), W[:, -1].clone()
            mods += [nn.Flatten(), m]
        elif isinstance(l, Conv):
            m = nn.Conv2d(l.inp, l.out, l.kernel, l.stride, l.padding, dtype=torch.float64)
            m.weight.data, m.bias.data = W[:, :-1].reshape(m.weight.shape).clone(), W[:, -1].clone()
            mods.append(m)
        elif isinstance(l, Norm):
            m = nn.GroupNorm(l.groups, l.channels, dtype=torch.float64)
            m.weight.data, m.bias.data = W[0].clone(), W[1].clone()
            mods.append(m)
        else: mods.append({"ReLU": nn.ReLU(), "MaxPool": nn.MaxPool2d(2)}[type(l).__name__])
    return nn.Sequential(*mods)


@pytest.mark.parametrize("name", ["mlp", "cnn", "plain cnn"])
def test_the_stack_is_pytorchs_layers(name):
    net = NETS[name]
    p, (x, y, w) = noisy(net, 3), batch(net, 3, 6)
    loss, g = gradients(net, p, x, y, w)
    for i in range(3):
        twin = torch_twin(net, {k: v[i] for k, v in p.items()})
        one = (F.cross_entropy(twin(x[i]), y[i], reduction="none")*w[i]).sum()
        want = torch.autograd.grad(one, list(twin.parameters()))
        assert torch.allclose(loss[i], one, rtol=1e-12)
        have = torch.cat([g[k][i].flatten() if isinstance(l, Norm) else torch.cat(
            [g[k][i][:, :-1].flatten(), g[k][i][:, -1]]) for k, l in net.named().items()])
        assert torch.allclose(have, torch.cat([t.flatten() for t in want]), atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_a_client_of_the_stack_is_the_client_alone(name):
    net = NETS[name]
    p, (x, y, w) = noisy(net, 4), batch(net, 4, 5)
    both, alone = {}, {}
    loss, g = gradients(net, p, x, y, w, both)
    one = slice(2, 3)
    loss1, g1 = gradients(net, {k: v[one] for k, v in p.items()}, x[one], y[one], w[one], alone)
    assert torch.allclose(loss[one], loss1, rtol=1e-12)
    for k in g: assert torch.allclose(g[k][one], g1[k], atol=1e-13)
    for k, l in net.preconditioned().items():
        A, A1 = covariance(l, both[k], w), covariance(l, alone[k], w[one])
        assert torch.allclose(A[one], A1, atol=1e-12)


def test_weights_of_zero_are_no_samples():
    net = NETS["cnn"]
    p, (x, y, _) = noisy(net, 1), batch(net, 1, 6)
    w = torch.tensor([[.25]*4 + [0.]*2], dtype=torch.float64)
    record, short = {}, {}
    loss, g = gradients(net, p, x, y, w, record)
    loss4, g4 = gradients(net, p, x[:, :4], y[:, :4], w[:, :4], short)
    assert torch.allclose(loss, loss4) and all(torch.allclose(g[k], g4[k]) for k in g)
    for k, l in net.preconditioned().items():
        assert torch.allclose(covariance(l, record[k], w), covariance(l, short[k], w[:, :4]))


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_conv_covariance_is_the_sum_over_patches(channels, kernel, padding, stride, bias):
    conv = Conv("c", channels, 2, kernel, stride, padding, bias)
    x, w = randn(2, 3, channels, 6, 5), torch.full((2, 3), 1/3, dtype=torch.float64)
    A = covariance(conv, x.transpose(0, 1).flatten(1, 2), w)
    for i in range(2):
        want, z = 0, F.pad(x[i], (padding,)*4)
        for s in z:
            for r in range(0, z.shape[2] - kernel + 1, stride):
                for c in range(0, z.shape[3] - kernel + 1, stride):
                    a = s[:, r:r + kernel, c:c + kernel].flatten()
                    if bias: a = torch.cat([a, torch.ones(1, dtype=a.dtype)])
                    want = want + torch.outer(a, a)
        assert torch.allclose(A[i], want/3, atol=1e-12)


@few
@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 10))
def test_foof_direction_is_the_kronecker_solve(out, inp, damping):
    """Also for out != in, where a transposed convention cannot hide."""
    G, X = randn(out, inp), randn(9, inp, seed=1)
    A = X.T @ X/9 + damping*torch.eye(inp, dtype=torch.float64)
    P = torch.kron(A, torch.eye(out, dtype=torch.float64))         # vec by columns
    want = torch.linalg.solve(P, G.T.flatten()).reshape(inp, out).T
    assert torch.allclose(G @ torch.linalg.inv(A), want, atol=1e-10)
    assert torch.allclose(foof_direction_ref(G, A), want, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_foof_step_solves_the_proximal_problem(name):
    """<G, D> + (E|D a|^2 + damping |D|^2)/2 has its minimum at D = -G A^-1: zero gradient there."""
    net, lam = NETS[name], 0.3
    p, (x, y, w) = noisy(net, 2), batch(net, 2, 7)
    record = {}
    _, g = gradients(net, p, x, y, w, record)
    state = FoofState(Foof(lam), net, p)
    state.observe(record, w, 0)
    for k, l in net.preconditioned().items():
        D = (-g[k] @ state.inv[k]).requires_grad_()
        a = l.rows(record[k], w)                               # rows scaled by sqrt of their weight
        value = (g[k]*D).sum() + ((a @ D.mT).square().sum() + lam*D.square().sum())/2
        slope, = torch.autograd.grad(value, D)
        assert slope.abs().max() < 1e-10*g[k].abs().max()


def test_large_damping_is_sgd():
    net = NETS["cnn"]
    p, (x, y, w) = noisy(net, 2), batch(net, 2, 7)
    record = {}
    _, g = gradients(net, p, x, y, w, record)
    state = FoofState(Foof(1e9), net, p)
    state.observe(record, w, 0)
    for k in net.preconditioned(): assert torch.allclose(1e9*g[k] @ state.inv[k], g[k], rtol=1e-5)


@few
@given(st.floats(0, 0.99), st.integers(1, 4), st.integers(1, 4))
def test_running_covariance_and_the_matrix_that_is_mixed(ema, cov_every, inv_every):
    """P is the damped, bias-corrected exponential mean at the last inversion, for each client."""
    net, f = NETS["mlp"], Foof(0.2, ema, cov_every, inv_every)
    p = noisy(net, 3)
    state, seen, P = FoofState(f, net, p), {0: [], 1: [], 2: []}, {}
    for k, n in enumerate([3, 3, 3, 2, 2, 1]):                    # clients leave
        x, y, w = batch(net, n, 4, seed=k)
        record = {} if state.wants(k) else None
        gradients(net, {m: v[:n] for m, v in p.items()}, x, y, w, record)
        state.observe(record, w, k)
        for i in range(n):
            if record: seen[i].append(covariance(net.named()["fc2"], record["fc2"], w)[i])
            if k % inv_every == 0:
                c = torch.tensor([ema**(len(seen[i]) - 1 - j) for j in range(len(seen[i]))])
                mean = sum(ci*A for ci, A in zip(c/c.sum(), seen[i], strict=True))
                P[i] = mean + 0.2*torch.eye(8)
    for i in range(3):
        assert torch.allclose(state.P["fc2"][i], P[i], atol=1e-6)
        assert torch.allclose(state.inv["fc2"][i] @ state.P["fc2"][i], torch.eye(8).double(), atol=1e-9)
    assert not state.broken()


def test_a_preconditioner_without_cholesky_factor_is_named():
    net = NETS["mlp"]
    p = noisy(net, 3)
    state = FoofState(Foof(0.1), net, p)
    state.A["fc2"][1] = -torch.eye(8)
    state.invert(3)
    assert state.broken() == [(1, "fc2")]


@pytest.mark.parametrize("bad", [dict(damping=0.), dict(ema=1.), dict(cov_every=0), dict(inv_every=0)])
def test_foof_refuses(bad):
    with pytest.raises(ValueError, match=f"argument {next(iter(bad))}="): Foof(**bad)


def test_a_module_is_its_own_net():
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(),
                           nn.Flatten(), nn.Linear(4*25, 3)).double()
    net = ModuleNet(module, (2, 5, 5), 3)
    p, (x, y, w) = stack(net.init(dtype=torch.float64), 2), batch(net, 2, 4)
    record = {}
    _, g = gradients(net, p, x, y, w, record)
    want = torch.autograd.grad((F.cross_entropy(module(x[1]), y[1], reduction="none")*w[1]).sum(),
                               list(module.parameters()))
    assert torch.allclose(g["0"][1], want[0].flatten(1)) and torch.allclose(g["1.weight"][1], want[1])
    assert torch.allclose(g["4"][1], torch.cat([want[3], want[4][:, None]], 1))
    assert set(net.preconditioned()) == set(record) == {"0", "4"}
    assert covariance(net.layers["0"], record["0"], w).shape == (2, 18, 18)


@pytest.mark.parametrize("layer, word", [
    (nn.Conv2d(2, 2, 3, groups=2), "grouped"), (nn.Conv2d(2, 2, (3, 1)), "square"),
    (nn.Conv2d(2, 2, 3, dilation=2), "dilated"), (nn.BatchNorm2d(2), "GroupNorm")])
def test_a_layer_that_foof_cannot_treat_is_named(layer, word):
    with pytest.raises(ValueError, match=rf"layer '1' .*{word}"):
        ModuleNet(nn.Sequential(nn.ReLU(), layer), (2, 5, 5), 3)


def test_views_share_memory_and_cover_the_vector():
    net = NETS["cnn"]
    p = net.init(3)
    shapes = {k: tuple(v.shape) for k, v in p.items()}
    flat = flatten(p).repeat(2, 1)
    V = views(flat, shapes)
    assert all(torch.equal(V[k][1], p[k]) for k in p)
    for v in V.values(): v.zero_()
    assert (flat == 0).all()
    ends = [s for s, _ in layout(shapes).values()]
    assert [s.start for s in ends] == [0, *(s.stop for s in ends[:-1])] and ends[-1].stop == flat.shape[1]


def test_evaluate_in_parts_is_evaluate_at_once():
    net = NETS["mlp"]
    p = {k: v[0].float() for k, v in noisy(net, 1).items()}
    x, y, w = (t.squeeze(0) for t in batch(net, 1, 50))
    whole, parts = evaluate(net, p, x.float(), y), evaluate(net, p, x.float(), y, batch=7)
    assert whole[0] == parts[0] and abs(whole[1] - parts[1]) < 1e-6
    z = net({k: v[None] for k, v in p.items()}, x.float()[None])[0]
    assert whole[0] == (z.argmax(1) == y).double().mean()


def test_half_precision_logits_give_a_float_loss():
    net = NETS["mlp"]
    p = {k: v.float() for k, v in noisy(net, 2).items()}
    x, y, w = batch(net, 2, 8)
    with torch.autocast("cpu", torch.bfloat16): low = losses(net, p, x.float(), y, w.float())
    assert low.dtype == torch.float32
    assert torch.allclose(low, losses(net, p, x.float(), y, w.float()), atol=0.05)


def test_small_pictures_are_refused():
    with pytest.raises(ValueError, match="nothing is left after 2 pools"): cnn((1, 8, 8))
    with pytest.raises(ValueError, match="at least inputs and classes"): mlp(5)
