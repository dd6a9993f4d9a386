"""Mixtures of experts against a masked loop, closed forms and the blocks of transformers."""
import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from yokolab.language.experts import MoE, balance_loss, expert_stats, route, z_loss
from yokolab.language.grouped import costs, experts_ref, experts_swiglu, layout


def problem(T, d, f, E, k, dtype=torch.float64, seed=0):
    """Random tokens, weights, choice and matrices"""
    g = torch.Generator().manual_seed(seed)
    x, w1, w3 = (torch.randn(s, generator=g, dtype=dtype).requires_grad_()
                 for s in ((T, d), (E, f, d), (E, f, d)))
    w2 = torch.randn(E, d, f, generator=g, dtype=dtype).requires_grad_()
    w, index = route(torch.randn(T, E, generator=g, dtype=dtype), k)
    return x, w.requires_grad_(), index, w1, w2, w3


def grads(y, args):
    """Gradients of a fixed projection of y"""
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y*g).sum(), [a for a in args if a.requires_grad])


def swiglu(x, w1, w2, w3):
    """One expert"""
    return (F.silu(x @ w1.T)*(x @ w3.T)) @ w2.T


def moe(E, k, **kw):
    """A layer in float64 with weights that matter"""
    torch.manual_seed(0)
    layer = MoE(6, 10, n_experts=E, top_k=k, dtype=torch.float64, **kw)
    layer.initialize(std=0.5, generator=torch.Generator().manual_seed(1))
    return layer


@settings(deadline=None, max_examples=25)
@given(T=st.integers(1, 40), E=st.integers(1, 20), k=st.integers(1, 4), seed=st.integers(0, 99),
       kind=st.sampled_from(["auto", "slices", "padded"]))
def test_grouped_equals_loop(T, E, k, seed, kind):
    args = problem(T, 5, 7, E, min(k, E), seed=seed)
    ref, y = experts_ref(*args), experts_swiglu(*args, kind)
    torch.testing.assert_close(y, ref)
    torch.testing.assert_close(grads(y, args), grads(ref, args))


def test_float32_grouped_product_with_empty_experts():
    args = problem(9, 8, 16, 12, 2, torch.float32)
    args[2][:] = torch.tensor([3, 7])
    ref = experts_ref(*args)
    want = grads(ref, args)
    for kind in ("auto", "slices", "padded"):
        y = experts_swiglu(*args, kind)
        torch.testing.assert_close(y, ref, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads(y, args), want, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(d=st.integers(1, 9), f=st.integers(1, 9), T=st.integers(1, 60), seed=st.integers(0, 9))
def test_float32_of_any_width(d, f, T, seed):
    args = problem(T, d, f, 7, 2, torch.float32, seed)
    args[2][::2] = 3                                        # skewed loads: not padded
    args[2][::2, 1] = 4
    y = experts_swiglu(*args)
    torch.testing.assert_close(y, experts_ref(*args), rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in grads(y, args))
    if (4*d) % 16 or (4*f) % 16:
        with pytest.raises(ValueError, match="rows of 16 bytes"): experts_swiglu(*args, "grouped")


@pytest.mark.parametrize("kind", ["slices", "padded"])
def test_gradcheck(kind):
    x, w, index, *rest = problem(6, 3, 4, 4, 2)
    assert gradcheck(lambda x, w, *m: experts_swiglu(x, w, index, *m, kind), (x, w, *rest))


def test_layout_counts_and_choice():
    index = torch.tensor([[0, 2], [2, 1], [2, 0]])
    at = layout(index, 4, "slices")
    assert at.counts.tolist() == [2, 1, 3, 0] and at.token.tolist() == [0, 2, 1, 0, 1, 2]
    assert at.token[at.row].tolist() == [[0, 0], [1, 1], [2, 2]]
    pad = layout(index, 4, "padded")
    assert len(pad.token) == 12 and pad.token[pad.row].tolist() == [[0, 0], [1, 1], [2, 2]]
    even, skew = costs([4]*8, 100), costs([25, 1, 1, 1, 1, 1, 1, 1], 1_000_000)
    assert min(even, key=even.get) == "padded" and min(skew, key=skew.get) == "grouped"


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), E=st.sampled_from([4, 16, 40]))
def test_order_of_tokens_changes_nothing(seed, E):
    layer, g = moe(E, 2, kind="slices"), torch.Generator().manual_seed(seed)
    x = torch.randn(33, 6, generator=g, dtype=torch.float64)
    order = torch.randperm(33, generator=g)
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=1e-13, atol=1e-14)


def test_all_experts_active_is_the_soft_mixture():
    layer, x = moe(4, 4), torch.randn(2, 9, 6, dtype=torch.float64)
    p = layer.router(x).softmax(-1)
    want = sum(p[..., e, None]*swiglu(x, layer.w1[e], layer.w2[e], layer.w3[e]) for e in range(4))
    torch.testing.assert_close(layer(x), want)


def test_one_expert_is_dense():
    layer, x = moe(1, 1), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    matrices = layer.w1, layer.w2, layer.w3
    y, want = layer(x), swiglu(x, *(w[0] for w in matrices))
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(grads(y, (x, *matrices)), grads(want, (x, *matrices)))
    layer(x).square().sum().backward()
    assert not layer.router.weight.grad.any()


def test_renormalised_probabilities_are_a_softmax_of_the_chosen():
    r = torch.randn(40, 9, dtype=torch.float64)
    w, index = route(r, 3)
    p = r.softmax(-1).gather(1, index)
    torch.testing.assert_close(w, p/p.sum(1, keepdim=True))
    torch.testing.assert_close(route(r, 3, normalize=False)[0], p)
    assert (w[:, :-1] >= w[:, 1:]).all()


@settings(deadline=None, max_examples=20)
@given(E=st.sampled_from([3, 16, 50]), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_fast_choice_is_topk(E, k, seed):
    r = torch.randn(20, E, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(route(r, k)[1], r.topk(k).indices)


def test_choice_is_distinct_with_ties_and_infinities():
    for r in (torch.zeros(4, 32), torch.full((4, 32), -torch.inf)):
        assert all(len(set(row)) == 3 for row in route(r, 3)[1].tolist())


def test_balance_is_one_when_balanced_and_more_when_not():
    even = torch.arange(48).view(24, 2) % 8
    assert balance_loss(torch.zeros(24, 8), even) == 1
    torch.testing.assert_close(balance_loss(torch.randn(24, 8), even), torch.tensor(1.))
    p = torch.tensor([.5, .25, .125, .125])              # loads proportional to probabilities
    index = torch.tensor([0]*4 + [1]*2 + [2, 3])[:, None]
    torch.testing.assert_close(balance_loss(p.log().expand(8, 4), index), 4*p.square().sum())
    assert 4*p.square().sum() >= 1


def test_balance_gradient_flows_through_probabilities_only():
    r = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    index = r.topk(2).indices
    got, = torch.autograd.grad(balance_loss(r, index), r)
    f = torch.bincount(index.flatten(), minlength=5)/24
    want, = torch.autograd.grad(5*(r.softmax(-1).mean(0)*f).sum(), r)
    torch.testing.assert_close(got, want)


def test_permuted_experts_change_nothing():
    layer, x = moe(5, 2), torch.randn(30, 6, dtype=torch.float64)
    y, losses = layer(x), layer.last
    order, other = torch.tensor([3, 0, 4, 1, 2]), copy.deepcopy(layer)
    with torch.no_grad():
        for w in (other.router.weight, other.w1, other.w2, other.w3): w.copy_(w[order])
    torch.testing.assert_close(other(x), y)
    for loss in (lambda r, i: balance_loss(r, i), lambda r, i: z_loss(r)):
        torch.testing.assert_close(loss(*other.last), loss(*losses))


def test_constant_added_to_logits():
    r, c = torch.randn(30, 5, dtype=torch.float64), 1.7
    (w, index), (v, index2) = route(r, 2), route(r + c, 2)
    assert torch.equal(index, index2)
    torch.testing.assert_close(v, w)
    torch.testing.assert_close(balance_loss(r + c, index), balance_loss(r, index))
    torch.testing.assert_close(z_loss(r + c), (r.logsumexp(-1) + c).square().mean())


def test_identical_experts_do_not_need_the_router():
    layer, x = moe(4, 2), torch.randn(20, 6, dtype=torch.float64)
    with torch.no_grad():
        for w in (layer.w1, layer.w2, layer.w3): w.copy_(w[:1].expand_as(w).clone())
    y = layer(x)
    y.square().sum().backward()
    assert layer.router.weight.grad.abs().max() < 1e-12
    with torch.no_grad(): layer.router.weight.mul_(-3)
    torch.testing.assert_close(layer(x), y)


def test_auxiliary_is_the_weighted_sum_and_trains_the_router():
    layer, x = moe(4, 2, balance=.3, z=.2), torch.randn(20, 6, dtype=torch.float64)
    layer(x)
    r = F.linear(x, layer.router.weight)
    want = .3*balance_loss(r, layer.last[1]) + .2*z_loss(r)
    torch.testing.assert_close(layer.auxiliary(), want)
    layer.auxiliary().backward()
    assert layer.router.weight.grad.abs().max() > 0 and layer.w1.grad is None


def test_autocast_keeps_the_router_in_float32():
    layer = MoE(16, 32, n_experts=4, top_k=2)
    layer.initialize(std=.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
        assert layer.last[0].dtype == torch.float32
    assert z.dtype == torch.bfloat16 and (z - y).norm() < .02*y.norm()
    z.float().square().sum().backward()
    assert layer.w2.grad.dtype == x.grad.dtype == torch.float32


def test_statistics():
    s = expert_stats(torch.zeros(6, 4), torch.tensor([[0], [0], [0], [0], [1], [1]]))
    assert s.load == pytest.approx((2/3, 1/3, 0, 0)) and s.dead == 2
    assert s.peak == pytest.approx(8/3) and s.confidence == pytest.approx(.25)
    assert s.entropy == pytest.approx(-(2/3*torch.tensor(2/3).log2() + 1/3*torch.tensor(1/3).log2())
                                      .item()/2, rel=1e-6)


def test_copies_hold_no_graph_and_state_loads():
    layer, x = moe(4, 2), torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.last is None
    with pytest.raises(RuntimeError, match="has not been called"): twin.auxiliary()
    fresh = moe(4, 2)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), y)


@pytest.mark.parametrize(("kw", "match"), [
    (dict(n_experts=4, top_k=5), "top_k=5.*n_experts=4"), (dict(n_experts=4, top_k=0), "top_k=0"),
    (dict(n_experts=0, top_k=1), "n_experts=0"), (dict(n_experts=4, top_k=1, z=-1.), "z=-1"),
    (dict(n_experts=4, top_k=1, balance=float("nan")), "balance=nan")])
def test_refuses(kw, match):
    with pytest.raises(ValueError, match=match): MoE(6, 10, **kw)


def test_refuses_shapes_and_kinds():
    args = problem(5, 6, 10, 4, 2)
    with pytest.raises(ValueError, match=r"argument w2: shape \(4, 6, 10\)"):
        experts_swiglu(*args[:3], args[3][:, :9], args[4], args[5][:, :9])
    with pytest.raises(ValueError, match="kind='fast'"): experts_swiglu(*args, "fast")
    with pytest.raises(ValueError, match="no grouped product"): experts_swiglu(*args, "grouped")
    with pytest.raises(ValueError, match="last dimension 5"): moe(4, 2)(torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"top_k=2\.0"): MoE(6, 10, n_experts=4, top_k=2.)


def _copy_into(block, layer):
    """Give a block of transformers our weights"""
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([layer.w1, layer.w3], 1))
        block.experts.down_proj.copy_(layer.w2)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_equals_transformers(family):
    try: importlib.import_module("torchvision")
    except Exception: sys.modules["torchvision"] = None     # broken: transformers goes without
    pytest.importorskip("transformers")
    if family == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
        block = MixtralSparseMoeBlock(MixtralConfig(
            hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2))
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(
            hidden_size=16, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2,
            norm_topk_prob=True))
    layer = MoE(16, 24, n_experts=6, top_k=2, dtype=torch.float64)
    layer.initialize(std=.3, generator=torch.Generator().manual_seed(0))
    block = block.double()
    _copy_into(block, layer)
    x = torch.randn(3, 11, 16, dtype=torch.float64,
                    generator=torch.Generator().manual_seed(1)).requires_grad_()
    y, z = layer(x), block(x)
    z = z[0] if isinstance(z, tuple) else z
    assert (y - z).abs().max() < 1e-6*y.abs().max()
    ours = grads(y, (x, layer.router.weight, layer.w1, layer.w3, layer.w2))
    dx, dr, dgu, dw2 = grads(z, (x, block.gate.weight, block.experts.gate_up_proj,
                                 block.experts.down_proj))
    for a, b in zip(ours, (dx, dr, dgu[:, :24], dgu[:, 24:], dw2), strict=True):
        assert (a - b).abs().max() < 1e-6*b.abs().max()
