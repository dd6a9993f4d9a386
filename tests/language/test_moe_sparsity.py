"""The sparsity topic: counters, tasks, GRPO and votes, estimators."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from yokolab.language import counting
from yokolab.language import moe_sparsity as ms
from yokolab.language import moe_sparsity_estimators as est
from yokolab.language import moe_sparsity_grpo as rl
from yokolab.language import moe_sparsity_tasks as tasks


def gen(seed=0):
    """A generator"""
    return torch.Generator().manual_seed(seed)


def bigram(V=tasks.VOCAB, seed=0):
    """A causal model without weights"""
    table = torch.randn(V, V, generator=gen(seed))
    return lambda x: table[x]


# counters

@pytest.mark.parametrize(("cell", "name"), ms.RELEASED.items())
def test_released_names(cell, name):
    s = ms.source_shape(*cell)
    assert f"{ms.size_name(s.total)}-A{ms.size_name(s.active)}" == name


def test_other_names_and_tpp():
    assert ms.size_name(ms.source_shape(2048, 32, 2).total) == "13.6B"
    assert ms.source_shape(512, 256, 4).sparsity == pytest.approx(0.984, abs=5e-4)
    assert ms.source_shape(512, 256, 2).tpp(125e9) == pytest.approx(19, rel=.02)
    assert ms.source_shape(2048, 16, 2).tpp(125e9) == pytest.approx(17.6, rel=.01)


@settings(deadline=None, max_examples=12)
@given(E=st.integers(1, 6), L=st.integers(1, 3), kv=st.sampled_from([1, 2, 4]), tied=st.booleans())
def test_counts_equal_the_model_and_the_core(E, L, kv, tied):
    s = ms.Shape(31, 16, L, E, max(1, E//2), 24, n_kv_heads=kv, tied=tied)
    model = ms.build(s, 8)
    assert sum(p.numel() for p in model.parameters()) == s.total
    core = counting.parameters(model.config)
    assert (core.total, core.active) == (s.total, s.active)
    dense = ms.Shape(31, 16, L, E, E, 24, n_kv_heads=kv, tied=tied)
    assert dense.active == dense.total == s.total and dense.sparsity == 0


@pytest.mark.parametrize("kv", [1, 4])
def test_flops_formula_against_counted_products(kv):
    s, B, S = ms.Shape(73, 16, 2, 3, 3, 32, n_kv_heads=kv), 3, 24
    model = ms.build(s, S)
    for block in model.blocks: block.ffn.kind = "padded"       # equal loads: no padding
    x = torch.zeros(B, S, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(x, x, auxiliary=False).backward()
    router = 3*2*B*S*s.n_layers*s.d_model*s.n_experts
    # the first layer's inputs need a gradient as well, since the embedding is trained
    assert counter.get_total_flops() - router == ms.training_flops(s, B, S)
    core = counting.training_flops(model.config, B, S)
    assert core - router == ms.training_flops(s, B, S)


def test_the_task_teaches_every_router():
    x = torch.arange(24)[None] % 9
    for k in (1, 2):
        model = ms.build(ms.Shape(11, 16, 1, 4, k, 16), 24)
        model.loss(x, (x + 1) % 9, auxiliary=False).backward()
        assert model.blocks[0].ffn.router.weight.grad.abs().max() > 1e-6


def test_training_is_reproducible_and_pairs_arms():
    stream = tasks.Stream((tasks.facts(40, gen()),), (3,), 24)
    s = ms.Shape(tasks.VOCAB, 16, 1, 4, 2, 16, tied=True)
    a, b = (ms.train(ms.build(s, 24), s, stream, 12, 1e-2, watch=5,
                     look=lambda m: m.config.d_model) for _ in range(2))
    assert a.losses == b.losses and a.tokens == 12*3*24
    assert [r[0] for r in a.routing] == [4, 9, 11] and a.tpp == a.tokens/s.total
    assert a.looks == ((4, 16), (9, 16), (11, 16)) and a.loss(.5, 5) == np.mean(a.losses[:6])
    assert a.loss(1.) == pytest.approx(np.mean(a.losses)) and a.losses[-1] < a.losses[0]


def test_shape_refuses():
    with pytest.raises(ValueError, match="top_k=3"): ms.Shape(9, 8, 1, 2, 3, 8)
    with pytest.raises(ValueError, match="steps=0"): ms.train(None, None, None, 0, 1.)


# tasks

def test_facts_have_keys_of_their_own_and_random_values():
    x = tasks.facts(3000, gen())
    assert len(x.prompt.unique(dim=0)) == 3000 and x.tokens.shape == (3000, 8)
    share = x.answer.flatten().bincount(minlength=64)/6000
    assert (share*64 - 1).abs().max() < .5                     # near six bits a symbol


@settings(deadline=None, max_examples=15)
@given(ops=st.integers(1, 5), modulus=st.sampled_from([5, 7, 23]), seed=st.integers(0, 99))
def test_modular_answers(ops, modulus, seed):
    a, b = tasks.modular(40, 20, gen(seed), ops=ops, modulus=modulus)
    assert len(torch.cat([a.prompt, b.prompt]).unique(dim=0)) == 60
    for q, v in zip(b.prompt, b.answer, strict=True):
        w = tasks.words(q)
        x = int(w[1])
        for i in range(ops): x = eval(f"({x} {w[2*i + 2]} {w[2*i + 3]}) % {modulus}")
        assert x == int(v)


@pytest.mark.parametrize("nodes, edges, train", [(6, 4, 5000), (5, 3, 600)])
def test_paths_differ_as_graphs(nodes, edges, train):
    q = torch.cat([x.prompt for x in tasks.paths(train, 300, gen(), nodes=nodes, edges=edges)])
    edge = (64*q[:, 1:1 + 2*edges:2] + q[:, 2:2 + 2*edges:2]).sort(1).values
    assert len(torch.cat([edge, q[:, -3:-1]], 1).unique(dim=0)) == train + 300
    mixed = q[:, 1:1 + 2*edges].view(-1, edges, 2)
    assert .05 < (mixed[:, :-1, 0] <= mixed[:, 1:, 0]).all(1).double().mean() < .9


@settings(deadline=None, max_examples=15)
@given(nodes=st.integers(4, 16), seed=st.integers(0, 99))
def test_paths_have_one_middle(nodes, seed):
    edges = min(9, nodes*(nodes - 1)//2)
    a, b = tasks.paths(15, 10, gen(seed), nodes=nodes, edges=edges)
    assert len(torch.cat([a.prompt, b.prompt]).unique(dim=0)) == 25
    for q, m in zip(a.prompt, a.answer, strict=True):
        e = {tuple(p) for p in q[1:1 + 2*edges].view(-1, 2).tolist()}
        s, t = q[-3:-1].tolist()
        assert len(e) == edges and (s, t) not in e and all(u != v for u, v in e)
        assert [w for w in range(nodes) if (s, w) in e and (w, t) in e] == m.tolist()


def test_tasks_refuse():
    with pytest.raises(ValueError, match="distinct items of 25"):
        tasks.modular(20, 6, gen(), ops=1, modulus=5, kinds="+")
    with pytest.raises(ValueError, match="larger graphs"): tasks.paths(60, 9, gen(), 4, 2)
    with pytest.raises(ValueError, match="nodes=3"): tasks.paths(1, 1, gen(), nodes=3)
    with pytest.raises(ValueError, match="argument text"): tasks.fold("")
    with pytest.raises(ValueError, match="columns"): tasks.filler("digits")


def test_fold_keeps_frequent_characters_apart():
    x = tasks.fold("the THE é" * 9)
    assert x[:3].tolist() == x[4:7].tolist() and x.max() < tasks.SYMBOLS
    many = tasks.fold(bytes(range(256)))
    assert (many == tasks.SYMBOLS - 1).sum() >= 256 - 63 - 26


@settings(deadline=None, max_examples=15)
@given(context=st.integers(12, 40), seed=st.integers(0, 9), prompts=st.booleans())
def test_stream_targets_are_the_next_tokens(context, seed, prompts):
    f, text = tasks.facts(30, gen()), tasks.fold("some text " * 30)
    stream = tasks.Stream((f, text), (3, 2), context, seed, prompts)
    for x, y in stream.batches(3):
        assert x.shape == y.shape == (5, context)
        counted = y[:, :-1] != tasks.IGNORE
        assert torch.equal(x[:, 1:][counted], y[:, :-1][counted])
        each = (context + 1)//8
        assert (y[:3] != tasks.IGNORE).sum() == 3*(8*each - 1 if prompts else 2*each)
        assert (y[3:] != tasks.IGNORE).all()


def test_every_item_is_dealt_once_an_epoch():
    f = tasks.facts(12, gen())
    seen = [x[:, 1:5] for x, _ in tasks.Stream((f,), (2,), 16).batches(9)]  # two rows of two items
    rows = [x[:, i:i + 4] for x, _ in tasks.Stream((f,), (2,), 16).batches(3) for i in (1, 9)]
    assert len(seen) == 9 and len(torch.cat(rows).unique(dim=0)) == 12


@settings(deadline=None, max_examples=20)
@given(p=st.integers(0, 4), a=st.integers(1, 4), extra=st.integers(0, 5))
def test_task_loss_in_nats_bits_and_padding(p, a, extra):
    logits, g = bigram(), gen(p + 10*a)
    q, ans = (torch.randint(64, (n,), generator=g) for n in (p, a + (p == 0)))
    long = torch.randint(64, (extra + 1,), generator=g)
    got = tasks.task_loss(logits, [q, long], [ans, ans], nbytes=[3, 5])
    whole = torch.cat([q, ans])
    start = max(p, 1)
    want = F.cross_entropy(logits(whole[None])[0, start - 1:-1], whole[start:], reduction="sum")
    assert float(got.nll[0]) == pytest.approx(float(want), rel=1e-5)
    one = tasks.task_loss(logits, [q], [ans], nbytes=[3])
    n = int(one.tokens)
    assert one.bits_per_token*n == pytest.approx(one.bits_per_byte*3)
    assert one.bits_per_byte*3 == pytest.approx(float(one.nll)/math.log(2))
    assert float(one.nll) == pytest.approx(float(got.nll[0]), rel=1e-6)


def test_hits_are_greedy_answers():
    s = ms.Shape(tasks.VOCAB, 16, 1, 2, 1, 16)
    model, f = ms.build(s, 12, std=.5), tasks.facts(20, gen())
    with torch.no_grad():
        x = f.prompt
        for _ in range(2): x = torch.cat([x, model(x)[:, -1:].argmax(-1)], 1)
    f.answer[:10] = x[:10, -2:]
    assert torch.equal(tasks.task_loss(model, f.prompt, f.answer).hit,
                       (x[:, -2:] == f.answer).all(1))


def test_answer_start_by_offsets():
    whole = [(0, 2), (2, 5), (5, 7)]                      # "ab" "c d" "ef", prompt "abc"
    assert tasks.answer_start(whole, 3) == 1              # counting the prompt's own tokens gives 2
    assert tasks.answer_start(whole, 5) == 2 and tasks.answer_start(whole, 0) == 0
    with pytest.raises(ValueError, match="border=7"): tasks.answer_start(whole, 7)


# GRPO and votes

@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from([0., 1., .5]), min_size=4, max_size=4), min_size=1,
                max_size=5))
def test_advantages(rows):
    R = torch.tensor(rows, dtype=torch.float64)
    A = rl.advantages(R)
    assert A.mean(1).abs().max() < 1e-12
    for r, a in zip(R, A, strict=True):
        want = 0. if len(r.unique()) == 1 else 1.
        assert float(a.square().mean()) == pytest.approx(want, abs=1e-9)


def test_kl_estimator():
    p = torch.randn(50, 4, generator=gen(), dtype=torch.float64)
    q = torch.randn(50, 4, generator=gen(1), dtype=torch.float64)
    assert (rl.kl(p, q) >= 0).all() and rl.kl(p, p).abs().max() == 0
    a, b = (torch.randn(6, generator=gen(i), dtype=torch.float64).log_softmax(0) for i in (2, 3))
    torch.testing.assert_close((a.exp()*rl.kl(a, b)).sum(), (a.exp()*(a - b)).sum())   # unbiased


def test_objective_clips_only_what_helps():
    old, A = torch.zeros(1, 4, 1), torch.tensor([[1., 1., -1., -1.]])
    logp = torch.tensor([2., .5, 2., .5]).log().view(1, 4, 1).requires_grad_()
    o = rl.objective(logp, old, old, A, clip=.2, beta=0.)
    assert o.loss.item() == pytest.approx(-(1.2 + .5 - 2. - .8)/4)
    o.loss.backward()
    assert (logp.grad.flatten() != 0).tolist() == [False, True, True, False] and o.clipped == .5
    with pytest.raises(ValueError, match="clip=0"): rl.objective(logp, old, old, A, clip=0)


def test_objective_gradient_is_the_policy_gradient_at_the_old_policy():
    z = torch.randn(3, 5, dtype=torch.float64, generator=gen(), requires_grad=True)
    draws = torch.randint(5, (3, 4), generator=gen())
    logp = z.log_softmax(-1).gather(1, draws)[..., None]
    A = rl.advantages(torch.rand(3, 4, generator=gen(), dtype=torch.float64))
    got, = torch.autograd.grad(rl.objective(logp, logp.detach(), logp.detach(), A).loss, z,
                               retain_graph=True)
    want, = torch.autograd.grad(-(logp[..., 0]*A).mean(), z)
    torch.testing.assert_close(got, want)


def test_samples_follow_the_model_and_logprob_agrees():
    logits, q = bigram(9), torch.tensor([[1, 2], [3, 4]])
    draws = rl.sample(logits, q, 2, 4000, gen())
    first = draws[0, :, 0].bincount(minlength=9)/4000
    torch.testing.assert_close(first, logits(q)[0, -1].softmax(-1), atol=.03, rtol=0)
    lp = rl.logprob(logits, q, draws[:, :5])
    whole = torch.cat([q[0], draws[0, 0]])
    want = logits(whole[None])[0, 1:3].log_softmax(-1).gather(1, draws[0, 0, :, None])[:, 0]
    torch.testing.assert_close(lp[0, 0], want)
    one = rl.logprob(logits, q, draws[:, :5, :1])
    torch.testing.assert_close(one, lp[..., :1])


def test_vote_of_one_is_a_sample_and_votes_grow_where_the_answer_is_the_mode():
    draws = torch.multinomial(torch.tensor([[.45, .3, .25]]).expand(2000, 3), 33, True,
                              generator=gen())[..., None]
    gold = torch.zeros(2000, 1, dtype=torch.long)
    curve = rl.votes(draws, gold)
    assert list(curve) == [1, 2, 4, 8, 16, 32]
    assert curve[1] == pytest.approx(float((draws == 0).double().mean()), abs=1e-9)
    assert curve[2] == pytest.approx(curve[1], abs=.02)         # a tie goes to the first
    assert sorted(list(curve.values())[1:]) == list(curve.values())[1:]
    best = rl.votes(draws, gold, best=True)
    assert best[1] == curve[1] and best[8] == pytest.approx(1 - .55**8, abs=.02)


def test_majority_of_longer_answers():
    draws = torch.tensor([[[1, 2], [1, 3], [1, 3], [1, 2], [4, 4]]])
    assert rl.majority(draws).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="argument gold"): rl.votes(draws, torch.zeros(1, 1))


def test_grpo_learns_and_leaves_the_reference():
    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(5, 5))
        def forward(self, x): return self.w[x]
    p, q = Policy(), torch.arange(5)[:, None]
    steps = list(rl.grpo(p, q, (q*2) % 5, updates=50, generator=gen(), lr=.1))
    assert steps[0][0] < .4 < .9 < steps[-1][0] and steps[0][1].kl == 0 < steps[-1][1].kl
    two = Policy()                                              # answers of two tokens
    gold = torch.cat([(q + 1) % 5, (q + 2) % 5], 1)
    steps = list(rl.grpo(two, q, gold, updates=150, generator=gen(), lr=.1, inner=2))
    assert steps[-1][0] > .9


# estimators

@settings(deadline=None, max_examples=20)
@given(peak=st.floats(5, 60), a=st.floats(.01, 1.), seeds=st.integers(1, 3))
def test_optimum_is_exact_on_exact_curves(peak, a, seeds):
    x = np.repeat([2., 4, 8, 16, 32, 64, 128], seeds)
    o = est.tpp_optimum(x, .7 - a*(np.log(x) - np.log(peak))**2, np.tile(range(seeds), 7))
    assert o.value == pytest.approx(peak, rel=1e-6) and not o.boundary
    assert o.curvature == pytest.approx(-2*a, rel=1e-6)


def test_flat_scores_have_no_optimum():
    rng = np.random.default_rng(0)
    for c in (0., *rng.uniform(.05, .95, 40)):                   # rounding must not make a peak
        x = np.tile(np.exp(rng.uniform(-1, 3, 6)), 3)
        o = est.tpp_optimum(x, np.full(18, c), np.repeat(range(3), 6), resamples=9)
        assert o.boundary == "unclear" and np.isnan(o.value) and o.inside == 0


@settings(deadline=None, max_examples=20)
@given(power=st.floats(.2, 2.), sign=st.sampled_from([-1, 1]), shift=st.floats(0, .3))
def test_monotone_curves_have_no_optimum(power, sign, shift):
    u = np.linspace(1, 5, 7)
    y = np.stack([sign*(u + shift*s)**power for s in range(3)], 1).ravel()
    o = est.tpp_optimum(np.repeat(np.exp(u), 3), y, np.tile(range(3), 7))
    assert o.boundary == ("high" if sign > 0 else "low") and math.isnan(o.value)
    assert "no optimum" in str(o)


def test_flat_noise_is_unclear_or_at_an_end():
    rng, bad = np.random.default_rng(0), 0
    x = np.repeat([2., 4, 8, 16, 32], 4)
    for _ in range(20):
        bad += not est.tpp_optimum(x, rng.standard_normal(20), np.tile(range(4), 5),
                                   resamples=99).boundary
    assert bad <= 4


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_residuals_vanish_if_loss_decides(seed):
    rng = np.random.default_rng(seed)
    L, k = rng.uniform(1, 3, 40), rng.integers(0, 3, 40)
    rest = est.iso_loss(L, np.exp(-L), k)
    assert max(abs(r).max() for r in rest.values()) < 1e-12
    noisy = est.iso_loss(L, np.exp(-L) + .01*rng.standard_normal(40), k)
    assert abs(sum(r.sum() for r in noisy.values())) < 1e-9        # the fit keeps the mean


def test_monotone_fit_is_the_least_squares_one():
    rng = np.random.default_rng(0)
    y = rng.standard_normal(6)
    fit = est.monotone(np.arange(6), y)
    assert (np.diff(fit) >= -1e-12).all()
    from scipy.optimize import minimize
    ok = minimize(lambda f: ((f - y)**2).sum(), np.sort(y), constraints=dict(
        type="ineq", fun=lambda f: np.diff(f)), tol=1e-12)
    assert np.allclose(fit, ok.x, atol=1e-4)
    assert np.allclose(est.monotone([1, 1, 2], [0, 2, 3]), [1, 1, 3])


def test_difference_at_equal_loss():
    rng, seed = np.random.default_rng(0), np.tile(range(5), 6)
    L = np.repeat(np.linspace(1, 2, 6), 5)
    noise = lambda: .004*rng.standard_normal(30)
    d = est.at_equal_loss(L, -L + .1 + noise(), seed, L + .3, -L - .3 + noise(), seed)
    assert d.value == pytest.approx(.1, abs=.01) and .05 < d.lo < d.hi < .15
    assert est.at_equal_loss(L, L, seed, L + 2, L, seed) is None
    with pytest.raises(ValueError, match="no seed"):
        est.at_equal_loss(L, L, seed, L, L, seed + 9)
    with pytest.raises(ValueError, match="one seed"): est.at_equal_loss(L, L, seed, L, L, seed + 4)


def test_interval_at_equal_loss_covers_with_three_seeds():
    rng, seed, wrong = np.random.default_rng(0), np.repeat(range(3), 8), 0
    def arm():                                                   # seeds differ more than points
        L = np.tile(np.linspace(3, 1, 8), 3) + .05*rng.standard_normal(24)
        return L, .8 - .2*L + np.repeat(.05*rng.standard_normal(3), 8), seed
    for _ in range(200):
        d = est.at_equal_loss(*arm(), *arm())
        wrong += not d.lo <= 0 <= d.hi
        assert (d.p < .05) == (not d.lo <= 0 <= d.hi)
    assert wrong <= 24                       # nominal 10; resampling three seeds is wrong 50 times


def test_bend_needs_falling_loss_and_falling_score():
    rng = np.random.default_rng(0)
    E, s = np.repeat([2, 4, 8, 16], 4), np.tile(range(4), 4)
    noise = lambda: .001*rng.standard_normal(16)
    peak, down = -(np.log2(E) - 2)**2 + noise(), -np.log(E) + noise()
    assert est.bend(E, peak, down, s).bends and est.bend(E, peak, down, s).best == 4
    assert not est.bend(E, peak, -down, s).bends and not est.bend(E, -down, down, s).bends
    with pytest.raises(ValueError, match="each pair once"): est.bend(E[1:], E[1:], E[1:], s[1:])


def test_gaps():
    one = torch.ones(4, dtype=torch.float64)
    a = tasks.TaskLoss(one*math.log(2), one, one, one > 0)
    b = tasks.TaskLoss(3*one*math.log(2), one, one, one > 0)
    g = est.gaps(.5*math.log(2), a, b)
    assert (g.memory, g.total, g.decision) == pytest.approx((2., 2.5, 1 - 1/8))
