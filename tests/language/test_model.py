"""The whole model: causality, documents, cache, losses and what is refused."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.language.layers import attention_ref, rotary, rotate
from yokolab.language.model import IGNORE, Config, Transformer, cross_entropy

few = settings(max_examples=15, deadline=None)
close = torch.testing.assert_close
BASE = Config(vocab_size=23, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, context=24,
              init_std=0.2)
SHAPES = [BASE, replace(BASE, qk_norm=True, head_dim=8), replace(BASE, tie_embeddings=True),
          replace(BASE, ffn="gelu", n_kv_heads=1), replace(BASE, rope_theta=100.0, n_kv_heads=4)]
pick = st.sampled_from(SHAPES)
_made = {}


def model(shape):
    """One model per shape."""
    i = SHAPES.index(shape)
    if i not in _made: _made[i] = Transformer(shape, seed=i).double().eval()
    return _made[i]


def ids(B, S, seed=0):
    return torch.randint(23, (B, S), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_written_out(shape):
    """The whole model with plain products and the whole matrix of scores."""
    m, x, c = model(shape), ids(2, 9), shape
    norm = lambda h, w: h/(h.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()*w
    w = c.rope_theta**(-torch.arange(0, c.head_dim, 2).double()/c.head_dim)
    h = m.embedding.weight[x]
    turn = rotary(torch.arange(9), w, torch.float64)
    for b in m.blocks:
        a, z = b.attention, norm(h, b.attention_norm.weight)
        q, k, v = ((z @ p.weight.T).view(2, 9, -1, c.head_dim).transpose(1, 2)
                   for p in (a.q, a.k, a.v))
        if c.qk_norm: q, k = norm(q, a.q_norm.weight), norm(k, a.k_norm.weight)
        out = attention_ref(rotate(q, *turn), rotate(k, *turn), v)
        h = h + out.transpose(1, 2).reshape(2, 9, -1) @ a.o.weight.T
        h = h + b.ffn(norm(h, b.ffn_norm.weight))
    head = m.embedding.weight if c.tie_embeddings else m.head.weight
    close(m(x), norm(h, m.norm.weight) @ head.T)


@few
@given(pick, st.integers(1, 23), st.integers(0, 9))
def test_the_future_changes_nothing(shape, at, seed):
    a = ids(2, 24, seed)
    b = a.clone()
    b[:, at:] = (b[:, at:] + 1 + seed % 22) % 23
    assert torch.equal(model(shape)(a)[:, :at], model(shape)(b)[:, :at])


@few
@given(pick, st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 9))
def test_the_cache_changes_nothing(shape, parts, seed):
    n = min(sum(parts), 24)
    x, m = ids(2, n, seed), model(shape)
    cache, out, at = m.make_cache(2, n), [], 0
    for p in parts:
        if at < n: out.append(m(x[:, at:at + p], cache=cache))
        at += p
    close(torch.cat(out, 1), m(x))
    assert cache.length == n


@few
@given(pick, st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 9))
def test_documents_do_not_see_each_other(shape, lengths, seed):
    lengths = lengths[:3]
    x, m = ids(2, sum(lengths), seed), model(shape)
    docs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    alone = torch.cat([m(part) for part in x.split(lengths, 1)], 1)
    close(m(x, documents=docs), alone)


@pytest.mark.parametrize("ffn, options", [("mglu", dict(n_masks=2)),
                                          ("moe", dict(n_experts=5, top_k=2))])
def test_layers_of_other_notebooks(ffn, options):
    pytest.importorskip(f"yokolab.language.{dict(mglu='masked', moe='experts')[ffn]}")
    m = Transformer(replace(BASE, ffn=ffn, ffn_options=options)).double().eval()
    n = Transformer(m.config).double()
    for p, q in zip(m.parameters(), n.parameters(), strict=True): assert torch.equal(p, q)
    x, docs = ids(2, 12), torch.tensor([[0]*5 + [1]*7]*2)
    cache = m.make_cache(2)
    close(torch.cat([m(x[:, :5], cache=cache), m(x[:, 5:], cache=cache)], 1), m(x))
    close(m(x, documents=docs), torch.cat([m(x[:, :5]), m(x[:, 5:])], 1))
    w = m.config.init_std/(2*2)**0.5
    scaled = Transformer(replace(m.config, d_model=64, d_ff=128, head_dim=None, scaled_init=True))
    down = scaled.blocks[0].ffn.w2 if ffn == "moe" else scaled.blocks[0].ffn.down.weight
    assert abs(down.std()/w - 1) < 0.05


def test_loss_and_its_gradient():
    m, x = model(BASE), ids(3, 12)
    t = x[:, 1:].clone()
    t[0, 3:] = IGNORE
    p = m(x[:, :-1]).log_softmax(-1)
    want = -torch.stack([p[b, s, t[b, s]] for b in range(3) for s in range(11) if t[b, s] >= 0])
    close(m.loss(x[:, :-1], t), want.mean())
    close(m.loss(x[:, :-1], t, reduction="sum"), want.sum())
    each = m.loss(x[:, :-1], t, reduction="none")
    assert each.shape == t.shape and each[0, 3:].eq(0).all()
    close(m.loss(x[:, :-1], t.int()), want.mean())
    assert m.auxiliary_loss() == 0
    w = m.blocks[1].attention.k.weight
    g, = torch.autograd.grad(m.loss(x[:, :-1], t), w)
    e = torch.zeros_like(w); e[2, 3] = 1e-5
    with torch.no_grad():
        w += e; up = m.loss(x[:, :-1], t)
        w -= 2*e; down = m.loss(x[:, :-1], t)
        w += e
    close(g[2, 3], (up - down)/2e-5, rtol=1e-6, atol=1e-9)


def test_half_precision_logits_are_summed_in_single():
    z, t = 5*torch.randn(4, 9, 23), ids(4, 9)
    close(cross_entropy(z.bfloat16(), t), cross_entropy(z.bfloat16().float(), t), rtol=0, atol=0)


def test_auxiliary_losses_are_summed():
    m = Transformer(BASE)
    for i, b in enumerate(m.blocks): b.ffn.auxiliary = lambda i=i: torch.tensor(10.0**i)
    x = ids(1, 5)
    assert m.auxiliary_loss() == 11
    close(m.loss(x, x) - m.loss(x, x, auxiliary=False), torch.tensor(11.0))


def test_vectors_instead_of_tokens():
    m, x = model(BASE), ids(2, 7)
    close(m.logits(m.hidden(m.embed(x))), m(x))


def test_start():
    a, b, c = Transformer(BASE, seed=1), Transformer(BASE, seed=1), Transformer(BASE, seed=2)
    g = Transformer(BASE, generator=torch.Generator().manual_seed(1))
    for p, q, r, s in zip(*(m.parameters() for m in (a, b, g, c)), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
        assert not torch.equal(p, s) or p.ndim == 1
    wide = Transformer(replace(BASE, d_model=256, head_dim=None, d_ff=512, init_std=0.02,
                               scaled_init=True, n_layers=8))
    assert abs(wide.blocks[3].ffn.down.weight.std()/0.005 - 1) < 0.05
    assert abs(wide.blocks[3].attention.o.weight.std()/0.005 - 1) < 0.05
    assert abs(wide.blocks[3].ffn.up.weight.std()/0.02 - 1) < 0.05
    x = ids(4, 24)
    assert abs(wide.loss(x[:, :-1], x[:, 1:]).item() - math.log(23)) < 0.1


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    Transformer(BASE)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad, error, text", [
    (lambda x: x.float(), TypeError, "float32"), (lambda x: x[0], ValueError, r"shape \(10,\)"),
    (lambda x: x.tolist(), TypeError, "list"), (lambda x: x + 20, ValueError, "vocabulary of 23"),
    (lambda x: x - 30, ValueError, "tokens=-"),
    (lambda x: x.repeat(1, 3), ValueError, "context of 24"),
    (lambda x: x.bool(), TypeError, "bool")])
def test_bad_tokens(bad, error, text):
    with pytest.raises(error, match=text): model(BASE)(bad(ids(2, 10)))


def test_bad_companions():
    m, x = model(BASE), ids(2, 10)
    with pytest.raises(ValueError, match=r"documents=\(2, 9\)"): m(x, documents=torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"targets=\(2, 9\)"): m.loss(x, x[:, 1:])
    with pytest.raises(ValueError, match="targets=23"): m.loss(x, torch.full_like(x, 23))
    cache = m.make_cache(2)
    for _ in range(2):                        # an empty cache too: later tokens would see them all
        with pytest.raises(ValueError, match="leave documents out"): m(x, cache=cache, documents=x)
        if not cache.length: m(x, cache=cache)
    m(x, cache=cache)
    with pytest.raises(ValueError, match="tokens=30: longer than the context"): m(x, cache=cache)


@pytest.mark.parametrize("change, text", [
    (dict(vocab_size=0), "vocab_size=0"), (dict(n_heads=5), "n_heads=5"), (dict(d_ff=0), "d_ff=0"),
    (dict(n_kv_heads=3), "n_kv_heads=3"), (dict(norm_eps=0.0), "norm_eps"),
    (dict(context=0), "context=0"),
    (dict(rope_theta=-1.0), "rope_theta"), (dict(ffn="swigle"), "did you mean 'swiglu'")])
def test_shapes_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text): replace(BASE, **{"head_dim": None} | change)


def test_config_round_trip():
    for c in SHAPES: assert Config.from_dict(c.to_dict()) == c
    with pytest.raises(ValueError, match="did you mean 'n_layers'"):
        Config.from_dict(dict(layers=3))


@pytest.mark.filterwarnings("ignore")
def test_autocast_to_bfloat16():
    m, x = Transformer(replace(BASE, qk_norm=True)), ids(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
        cache = m.make_cache(2)
        z = torch.cat([m(x[:, :20], cache=cache), m(x[:, 20:], cache=cache)], 1)
    assert (y.float() - m(x)).abs().max() < 0.1*m(x).abs().max()
    close(z, y, rtol=0.1, atol=0.1)
