"""Rotation, normalisation and attention against their definitions."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.language.layers import (
    Cache,
    GroupedQueryAttention,
    RMSNorm,
    attend,
    attention_mask,
    attention_ref,
    check_heads,
    document_positions,
    rotary,
    rotary_frequencies,
    rotate,
)

few = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@few
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 3000),
       st.sampled_from([2, 6, 16, 64]), st.floats(10, 1e6))
def test_rotary_scores_know_the_distance_alone(t, s, shift, dim, theta):
    w = rotary_frequencies(dim, theta)
    q, k = normal(2, 1, 1, 1, dim, seed=t)
    turn = lambda x, at: rotate(x, *rotary(torch.tensor([at]), w, torch.float64))
    close((turn(q, t)*turn(k, s)).sum(), (turn(q, t + shift)*turn(k, s + shift)).sum(),
          rtol=1e-9, atol=1e-9)
    close(turn(q, t).norm(), q.norm())
    close(turn(turn(q, t), s), turn(q, t + s), rtol=1e-9, atol=1e-9)


def test_rotation_is_the_half_split_matrix():
    x, t = normal(1, 1, 1, 8), 3
    w = [1e4**(-2*j/8) for j in range(4)]
    want = torch.zeros(8, dtype=torch.float64)
    for j in range(4):
        a, b = x[0, 0, 0, j], x[0, 0, 0, j + 4]
        want[j] = a*math.cos(t*w[j]) - b*math.sin(t*w[j])
        want[j + 4] = a*math.sin(t*w[j]) + b*math.cos(t*w[j])
    turn = rotary(torch.tensor([t]), rotary_frequencies(8), torch.float64)
    close(rotate(x, *turn)[0, 0, 0], want)


def test_stretched_frequencies_keep_the_fast_and_slow_the_slow():
    plain = rotary_frequencies(64, 5e5)
    new = rotary_frequencies(64, 5e5, dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                           original_max_position_embeddings=8192))
    wave = 2*math.pi/plain
    assert torch.equal(new[wave < 8192/4], plain[wave < 8192/4])
    close(new[wave > 8192], plain[wave > 8192]/8)
    assert (new[1:] < new[:-1]).all() and ((plain/8 <= new*(1 + 1e-12)) & (new <= plain)).all()
    with pytest.raises(ValueError, match="without factor"):
        rotary_frequencies(8, 1e4, dict(low_freq_factor=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm(dtype):
    x, m = (1e3*normal(4, 32)).to(dtype), RMSNorm(32, 1e-5)
    with torch.no_grad(): m.weight.copy_(normal(32, seed=1))
    m = m.to(dtype)
    y, w = x.double(), m.weight.double()
    want = y/(y.square().mean(-1, keepdim=True) + 1e-5).sqrt()*w
    assert m(x).dtype == dtype
    close(m(x).double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_norm_gradient():
    m = RMSNorm(5).double()
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(m, dict(weight=w), x),
                                    (normal(3, 5).requires_grad_(), normal(5).requires_grad_()))


@few
@given(st.integers(1, 3), st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (4, 4)]),
       st.integers(1, 7), st.integers(0, 6), st.booleans())
def test_attention_is_its_formula(B, heads, S, past, masked):
    H, kv = heads
    q = normal(B, H, S, 4)
    k, v = (normal(B, kv, S + past, 4, seed=i) for i in (1, 2))
    mask = None
    if masked:
        mask = torch.rand(B, 1, S, S + past, generator=torch.Generator().manual_seed(S)) < 0.5
        mask[..., 0] = True
    close(attend(q, k, v, mask), attention_ref(q, k, v, mask))


@few
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_masked_row_is_its_documents(lengths, seed):
    docs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    m = GroupedQueryAttention(12, 3, 1, qk_norm=True).double()
    for i, p in enumerate(m.parameters()): p.data = normal(*p.shape, seed=seed + i)
    w, x = rotary_frequencies(4), normal(1, docs.shape[1], 12, seed=seed)
    turn = lambda t: rotary(t, w, torch.float64)
    row = m(x, *turn(document_positions(docs)), attention_mask(docs))
    alone = [m(part, *turn(torch.arange(part.shape[1]))) for part in x.split(lengths, 1)]
    close(row, torch.cat(alone, 1))


@few
@given(st.integers(0, 999), st.sampled_from([(2, 1), (4, 2), (6, 2), (3, 3)]), st.booleans())
def test_groups_are_repeated_heads(seed, heads, norm):
    H, kv = heads
    some = GroupedQueryAttention(8, H, kv, 4, qk_norm=norm).double()
    for i, p in enumerate(some.parameters()): p.data = normal(*p.shape, seed=seed + i)
    every = GroupedQueryAttention(8, H, H, 4, qk_norm=norm).double()
    rows = lambda w: w.view(kv, 4, 8).repeat_interleave(H//kv, 0).reshape(-1, 8)
    every.load_state_dict({n: rows(w) if n in ("k.weight", "v.weight") else w
                           for n, w in some.state_dict().items()})
    x = normal(2, 5, 8, seed=seed)
    turn = rotary(torch.arange(5), rotary_frequencies(4), torch.float64)
    close(some(x, *turn), every(x, *turn))


def test_cache_grows_and_returns_everything():
    c = Cache(2, 1, 3, 5, 4, torch.float64)
    k = normal(1, 3, 5, 4)
    for a, b in ((0, 2), (2, 5)):
        for layer in (0, 1): got, _ = c.update(layer, k[:, :, a:b]*(layer + 1), k[:, :, a:b])
        assert torch.equal(got, 2*k[:, :, :b])
        c.advance(b - a)
    assert c.length == 5
    with pytest.raises(ValueError, match="1 rows of 6 do not fit"):
        c.update(0, k[:, :, :1], k[:, :, :1])
    with pytest.raises(ValueError, match="2 rows of 3"):
        Cache(1, 1, 3, 5, 4).update(0, *k[:, :, :3].expand(2, 2, 3, 3, 4))


@pytest.mark.parametrize("args, text", [
    ((24, 5, None, None), "n_heads=5"), ((24, 4, 3, None), "n_kv_heads=3"),
    ((24, 8, None, None), "head_dim=3"), ((24, 0, None, None), "n_heads=0"),
    ((24, 4, 2, 5), "head_dim=5"), ((0, 4, 2, 4), "d_model=0")])
def test_heads_that_do_not_divide(args, text):
    with pytest.raises(ValueError, match=text): check_heads(*args)


def test_types_of_numbers():
    with pytest.raises(TypeError, match=r"d_model=24\.0"): check_heads(24.0, 4, None, None)
    assert check_heads(24, 4, None, None) == (4, 6) and check_heads(24, 5, 1, 8) == (1, 8)
