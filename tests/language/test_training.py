"""A run is decided by model, data and recipe; interrupted or not, in parts or not."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.language.model import Config, Transformer, cross_entropy
from yokolab.language.packing import pack
from yokolab.language.recipe import Recipe, adamw, learning_rate
from yokolab.language.training import Diverged, Trainer, evaluate

SHAPE = Config(vocab_size=12, d_model=16, n_layers=2, n_heads=2, d_ff=24, context=16, qk_norm=True)
DOCS = [torch.randint(12, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in range(3, 40)]
DATA = pack(DOCS, 16)
RECIPE = Recipe(steps=8, batch_size=8, lr=1e-2, warmup=2, clip=0.5)


class Noisy(nn.Module):
    """A layer with dropout, whose random numbers a resumed run must draw again."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x): return nn.functional.dropout(self.inner(x), 0.3, self.training)


def trainer(recipe=RECIPE, data=DATA, noisy=False, **kw):
    m = Transformer(SHAPE, seed=3)
    if noisy:
        for b in m.blocks: b.ffn = Noisy(b.ffn)
    return Trainer(m, data, recipe, **kw)


def flat(t): return torch.cat([p.detach().flatten() for p in t.model.parameters()])


def test_a_run_is_the_plain_loop():
    t = trainer()
    t.run()
    m = Transformer(SHAPE, seed=3)
    opt = adamw(m, RECIPE)
    for s in range(8):
        b = t.batches.at(s)
        loss = cross_entropy(m(b.tokens, documents=b.documents), b.targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        for g in opt.param_groups: g["lr"] = learning_rate(s, RECIPE)
        opt.step(); opt.zero_grad()
        r = t.history.steps[s]
        assert abs(r.loss - loss.item()) < 1e-5 and abs(r.grad_norm - norm.item()) < 1e-4
        assert (r.step, r.lr) == (s, learning_rate(s, RECIPE)) and r.tokens == b.counted
    got = torch.cat([p.detach().flatten() for p in m.parameters()])
    torch.testing.assert_close(flat(t), got, rtol=1e-4, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 7), max_size=3, unique=True), st.booleans(),
       st.sampled_from(["fp32", "bf16"]), st.integers(0, 3))
def test_an_interrupted_run_is_the_run(tmp_path_factory, stops, noisy, precision, seed):
    recipe = replace(RECIPE, precision=precision, seed=seed, accumulate=2)
    once = trainer(recipe, noisy=noisy)
    once.run()
    path = tmp_path_factory.mktemp("run")/"c.pt"
    for until in (*sorted(stops), None):
        torch.manual_seed(99)                                # whatever the process drew before
        t = trainer(recipe, noisy=noisy)
        t.run(until, checkpoint=path)
    assert torch.equal(flat(t), flat(once))
    assert t.history.losses == once.history.losses and t.done == 8
    for a, b in zip(t.optimizer.state.values(), once.optimizer.state.values(), strict=True):
        for k in a: assert torch.equal(a[k], b[k])


@pytest.mark.parametrize("ffn, options", [
    ("gelu", {}), ("mglu", dict(n_masks=2)), ("moe", dict(n_experts=5, top_k=2))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layer_resumes(tmp_path, ffn, options, precision):
    module = dict(mglu="masked", moe="experts", gelu="feedforward")[ffn]
    pytest.importorskip(f"yokolab.language.{module}")
    shape = replace(SHAPE, ffn=ffn, ffn_options=options)
    recipe = replace(RECIPE, precision=precision)
    make = lambda: Trainer(Transformer(shape, seed=3), DATA, recipe)
    once, path = make(), tmp_path/"c.pt"
    once.run()
    make().run(3, checkpoint=path)
    t = make()
    t.run(checkpoint=path)
    assert torch.equal(flat(t), flat(once)) and t.history.losses == once.history.losses
    assert (t.history.steps[-1].auxiliary > 0) == (ffn == "moe")


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_add_up_to_the_batch(parts):
    whole, split = trainer(), trainer(replace(RECIPE, accumulate=parts))
    for t in (whole, split): t.step()
    a, b = whole.history.steps[0], split.history.steps[0]
    assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4
    torch.testing.assert_close(flat(whole), flat(split), rtol=1e-3, atol=1e-4)


def test_auxiliary_losses_are_trained():
    t = trainer(replace(RECIPE, accumulate=2, clip=None))
    w = t.model.blocks[0].ffn.up.weight
    t.model.blocks[0].ffn.auxiliary = lambda: 1e3*w.square().sum()
    before = w.detach().clone()
    t.step()
    record = t.history.steps[0]
    assert abs(record.auxiliary - 1e3*before.square().sum().item()) < 1e-3*record.auxiliary
    assert record.grad_norm > 0.99*(2e3*before).norm()


def test_it_learns_and_bfloat16_follows():
    data = pack([[1, 2, 3, 4, 5, 6, 7, 8]*4], 16)
    runs = {}
    for precision in ("fp32", "bf16"):
        t = trainer(Recipe(steps=30, batch_size=2, lr=2e-2, precision=precision), data)
        runs[precision] = t.run().losses
        assert flat(t).dtype == torch.float32
    assert runs["fp32"][-1] < 0.3*runs["fp32"][0]
    assert abs(runs["bf16"][-1] - runs["fp32"][-1]) < 0.1*runs["fp32"][0]


def test_history_evaluation_and_report():
    t, seen = trainer(peak=1e12), []
    h = t.run(validation=DATA[:3], evaluate_every=3, report=seen.append)
    assert seen == h.steps and [s for s, _ in h.validation] == [3, 6, 8]
    assert h.validation[-1][1] == evaluate(t.model, DATA[:3], 8)
    f = h.frame()
    assert len(f) == 8 and (f.mfu > 0).all()
    assert (f.tokens_per_second*f.seconds - f.tokens).abs().max() < 1e-6
    assert t.model.training and "<table" in h._repr_html_()


def test_evaluation_is_the_mean_over_targets():
    m = Transformer(SHAPE).double()
    want = m.loss(DATA.tokens, DATA.targets, documents=DATA.documents, auxiliary=False).item()
    for size in (1, 5, 1000): assert abs(evaluate(m, DATA, size) - want) < 1e-9
    plain = m.loss(DATA.tokens, DATA.targets, auxiliary=False).item()
    assert abs(evaluate(m, DATA, document_mask=False) - plain) < 1e-9 and plain != want


def test_a_loss_that_is_no_number_stops_before_the_weights_change():
    t = trainer()
    t.run(2)
    t.model.logits = lambda h: h.sum()*torch.full((8, 16, 12), torch.nan)
    before = flat(t)
    with pytest.raises(Diverged, match=r"loss nan.*step 2; lower lr"): t.step()
    assert torch.equal(flat(t), before) and t.done == 2


def test_step_sizes_of_groups_can_be_scaled():
    make = lambda m, r: torch.optim.SGD([dict(params=list(m.parameters()), lr_scale=0.5)], lr=1.0)
    t = trainer(optimizer=make)
    t.step()
    assert t.optimizer.param_groups[0]["lr"] == 0.5*learning_rate(0, RECIPE)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    trainer(noisy=True).run(2)
    assert torch.equal(before, torch.get_rng_state())


def test_refused():
    with pytest.raises(ValueError, match="data=40: no such id in a vocabulary of 12"):
        trainer(data=pack([[1, 40]], 16))
    with pytest.raises(ValueError, match="longer than the context of 16"):
        trainer(data=pack(DOCS, 17))
    with pytest.raises(ValueError, match="without a target"):
        evaluate(Transformer(SHAPE), pack([[1], [2]], 1))
