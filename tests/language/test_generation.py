"""Draws from the right distribution, the same with and without the cache."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.language.generation import filtered, generate
from yokolab.language.model import Config, Transformer

SHAPE = Config(vocab_size=17, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, context=20,
               init_std=0.4, qk_norm=True)
MODEL = Transformer(SHAPE).double().eval()
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
few = settings(max_examples=15, deadline=None)


@few
@given(st.integers(0, 10), st.one_of(st.just(0.0), st.floats(0.2, 2)),
       st.one_of(st.none(), st.integers(1, 20)), st.one_of(st.none(), st.floats(0.05, 1)),
       st.integers(0, 17), st.integers(1, 2))
def test_cache_and_no_cache_agree(seed, temperature, top_k, top_p, n, rows):
    kw = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    a = generate(MODEL, PROMPT[:rows], n, **kw)
    b = generate(MODEL, PROMPT[:rows], n, cache=False, **kw)
    assert torch.equal(a, b) and a.shape == (rows, 3 + n) and torch.equal(a[:, :3], PROMPT[:rows])


def test_greedy_takes_the_largest():
    out = generate(MODEL, PROMPT, 12)
    assert torch.equal(out[:, 3:], MODEL(out[:, :-1])[:, 2:].argmax(-1))
    assert torch.equal(out, generate(MODEL, PROMPT, 12, temperature=1.0, top_k=1))
    assert torch.equal(out, generate(MODEL, PROMPT, 12, temperature=1.0, top_p=1e-9))


def test_draws_follow_the_distribution():
    out = generate(MODEL, PROMPT[:1].expand(20_000, -1), 1, temperature=1.0)[:, 3]
    p = MODEL(PROMPT[:1])[0, -1].softmax(-1)
    seen = torch.bincount(out, minlength=17)/20_000
    assert ((seen - p).abs() <= 5*(p*(1 - p)/20_000).sqrt() + 1e-9).all()


@few
@given(st.integers(0, 99), st.integers(1, 12), st.floats(0.01, 1), st.floats(0.1, 3))
def test_filter_keeps_the_most_probable(seed, k, p, tau):
    z = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    full = (z/tau).softmax(-1)
    for kw in (dict(top_k=k), dict(top_p=p)):
        q = filtered(z, tau, **kw)
        torch.testing.assert_close(q.sum(-1), torch.ones(3, dtype=torch.float64))
        for a, b in zip(full, q, strict=True):
            kept = b > 0
            assert not kept.all() or kw.get("top_k", 12) == 12 or "top_p" in kw
            assert a[kept].min() >= a[~kept].max() if (~kept).any() else True
            torch.testing.assert_close(b[kept], a[kept]/a[kept].sum())
            if "top_k" in kw: assert int(kept.sum()) == k
            else:                                            # the smallest set with that mass
                assert a[kept].sum() >= p - 1e-12
                assert a[kept].sum() - a[kept].min() < p + 1e-12


def test_a_row_that_ended_is_filled_with_its_end():
    greedy = generate(MODEL, PROMPT, 12)
    end = int(greedy[0, 5])
    out = generate(MODEL, PROMPT, 12, stop=end)
    for a, b in zip(greedy.tolist(), out.tolist(), strict=True):
        at = next((i for i in range(3, 15) if a[i] == end), 14)
        assert b[:at + 1] == a[:at + 1][:len(b)] and set(b[at + 1:]) <= {end}


@pytest.mark.parametrize("kw, text", [
    (dict(n_tokens=18), "ask for at most 17"), (dict(n_tokens=-1), "n_tokens=-1"),
    (dict(temperature=-0.5), "temperature"), (dict(top_k=0), "top_k=0"), (dict(top_p=0.0), "top_p"),
    (dict(prompt=PROMPT[0]), "prompt"), (dict(prompt=PROMPT[:, :0]), "prompt"),
    (dict(prompt=[1, 2]), "prompt='list'"), (dict(prompt=PROMPT + 15), "vocabulary of 17")])
def test_requests_that_cannot_be_met(kw, text):
    with pytest.raises(ValueError, match=text):
        generate(MODEL, **dict(prompt=PROMPT, n_tokens=2) | kw)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    generate(MODEL, PROMPT, 3, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())
