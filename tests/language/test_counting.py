"""Counters against the model, against torch's FLOP counter and against published totals."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from yokolab.language.counting import (
    count_bytes,
    count_layer,
    forward_flops,
    moe_count,
    parameters,
    training_flops,
)
from yokolab.language.model import Config, Transformer

shapes = st.builds(
    lambda V, kv, groups, dh, L, ff, **kw: Config(
        vocab_size=V, d_model=2*ff, n_layers=L, n_heads=kv*groups, n_kv_heads=kv, head_dim=2*dh,
        d_ff=ff, context=16, **kw),
    V=st.integers(2, 40), kv=st.integers(1, 3), groups=st.integers(1, 3), dh=st.integers(1, 4),
    L=st.integers(1, 3), ff=st.integers(1, 24), ffn=st.sampled_from(["gelu", "swiglu"]),
    qk_norm=st.booleans(), tie_embeddings=st.booleans())
few = settings(max_examples=20, deadline=None)


def torch_flops(c, B, S, train=False):
    model = Transformer(c)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(torch.zeros(B, S, dtype=torch.int64))
        if train: out.sum().backward()
    return counter.get_total_flops()


@few
@given(shapes)
def test_weights(c):
    p, n = parameters(c), sum(p.numel() for p in Transformer(c).parameters())
    assert p.total == p.active == n
    assert count_bytes(c, bits=32).weights == 4*n and count_bytes(c).training == 16*n


@few
@given(shapes, st.integers(1, 3), st.integers(2, 16))
def test_operations(c, B, S):
    assert forward_flops(c, B, S) == torch_flops(c, B, S)
    assert training_flops(c, B, S) == torch_flops(c, B, S, True) == 3*forward_flops(c, B, S)
    head = 2*B*S*c.vocab_size*c.d_model
    assert forward_flops(c, B, S, head=False) == forward_flops(c, B, S) - head
    keys = c.n_layers*4*B*c.n_heads*c.head_dim
    assert forward_flops(c, B, S) - forward_flops(c, B, S, causal=True) == keys*(S*S - S*(S + 1)//2)


def test_cache_bytes():
    c = Config(vocab_size=9, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=24, context=20)
    m = Transformer(c)
    for B, n in ((1, 7), (3, 20)):
        cache = m.make_cache(B, n)
        b = count_bytes(c, batch=B, length=n, bits=32)
        assert b.cache == cache.keys.nbytes + cache.values.nbytes
        assert b.decode == b.weights - 4*(9 - B)*16 + b.cache
    assert count_bytes(replace(c, tie_embeddings=True), length=0).decode == \
        count_bytes(replace(c, tie_embeddings=True)).weights


@few
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.data())
def test_mixtures(d, d_ff, E, data):
    k = data.draw(st.integers(1, E))
    n = moe_count(d, d_ff, n_experts=E, top_k=k)
    assert n.total == 3*E*d*d_ff + E*d and n.active == 3*k*d*d_ff + E*d and n.flops == 2*n.active
    assert (n.active == n.total) == (k == E)


@pytest.mark.parametrize("name, options", [
    ("moe", dict(n_experts=4, top_k=2)), ("mglu", dict(n_masks=2))])
def test_layers_of_other_notebooks(name, options):
    module = dict(moe="experts", mglu="masked")[name]
    pytest.importorskip(f"yokolab.language.{module}")
    c = Config(vocab_size=9, d_model=16, n_layers=2, n_heads=2, d_ff=24, context=8, ffn=name,
               ffn_options=options)
    assert parameters(c).total == sum(p.numel() for p in Transformer(c).parameters())
    assert count_layer(name, 16, 24, **options).active <= count_layer(name, 16, 24, **options).total


@pytest.mark.parametrize("d, E, k, total, active", [
    (512, 8, 2, 320e6, 170e6), (512, 256, 16, 6.6e9, 520e6), (1024, 16, 2, 1.9e9, 470e6),
    (1024, 256, 16, 26.0e9, 1.9e9), (2048, 16, 16, 7.1e9, 7.1e9), (2048, 128, 8, 52.2e9, 3.9e9)])
def test_published_names(d, E, k, total, active):
    p = parameters(Config(vocab_size=99574, d_model=d, n_layers=16, n_heads=8, d_ff=2*d,
                          context=4096, ffn="moe", ffn_options=dict(n_experts=E, top_k=k)))
    assert p.total == 2*99574*d + d + 16*(4*d*d + 3*E*d*2*d + E*d + 2*d)
    for n, name in ((p.total, total), (p.active, active)):
        assert abs(n - name) <= (0.0505e9 if name >= 1e9 else 5.05e6)


def test_refused():
    c = Config(vocab_size=9, d_model=16, n_layers=1, n_heads=2, d_ff=24, context=8)
    with pytest.raises(ValueError, match="batch=0"): forward_flops(c, 0, 4)
    with pytest.raises(ValueError, match="length=-1"): count_bytes(c, length=-1)
    with pytest.raises(ValueError, match="did you mean 'moe'"): count_layer("moo", 4, 8)
