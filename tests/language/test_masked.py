"""The masked layer: identities, gradients against autograd in float64, ablations, routing."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.language.masked import MGLU, route, streams
from yokolab.language.masking import (
    ACTIVATIONS,
    gate,
    masked_products,
    mglu,
    mglu_ref,
    straight_through,
)
from yokolab.language.model import Config, Transformer
from yokolab.language.packed import mask_stats, masked_layers

few = settings(deadline=None, max_examples=25)
sizes = st.tuples(*(st.integers(1, 9) for _ in range(4)), st.integers(0, 2**31))


def draw(T, h, d, n, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g, dtype=dtype) for s in ((T, h), (d, h), (n, d, h))]


def grads(f, *inputs):
    """Output and gradients under a random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*leaves)
    g = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=g, dtype=out.dtype))
    return out.detach(), *(t.grad for t in leaves)


@few
@given(sizes)
def test_gate_and_value_sum_to_the_total(s):
    x, W, S = draw(*s)
    y = masked_products(x, W, S)
    torch.testing.assert_close(y[:, 0], x @ W.mT)
    for i, Si in enumerate(S):
        torch.testing.assert_close(y[:, 1 + i], x @ (W*(Si > 0)).mT)
        torch.testing.assert_close(y[:, 0] - y[:, 1 + i], x @ (W*(Si <= 0)).mT)


@pytest.mark.parametrize("name", ACTIVATIONS)
@few
@given(sizes)
def test_forms_agree_in_output_and_all_gradients(name, s):
    for a, b in zip(grads(lambda *t: mglu(*t, name), *draw(*s)),
                    grads(lambda *t: mglu_ref(*t, name), *draw(*s)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "relu"])
def test_gradcheck_with_fixed_masks(name):
    x, W, S = draw(4, 5, 3, 3, 0)
    leaves = x.requires_grad_(), W.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, W: mglu(x, W, S, name), leaves)


def test_long_inputs_go_block_by_block():
    x, W, S = draw(700, 4, 64, 4, 1)
    for a, b in zip(grads(mglu, x, W, S), grads(mglu_ref, x, W, S), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_logits_receive_the_gradient_of_the_hard_mask():
    x, W, S = draw(6, 5, 4, 2, 2)
    M = (S > 0).double().requires_grad_()
    hard = sum(F.silu(x @ (m*W).mT)*(x @ ((1 - m)*W).mT) for m in M)
    g = torch.randn(hard.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    hard.backward(g)
    torch.testing.assert_close(grads(mglu, x, W, S)[3], M.grad)
    A, B = ((m*W).detach().requires_grad_() for m in (M[0].detach(), 1 - M[0].detach()))
    (F.silu(x @ A.mT)*(x @ B.mT)).backward(g)
    torch.testing.assert_close(grads(mglu, x, W, S)[3][0], W*(A.grad - B.grad))
    assert not grads(mglu, x, 0*W, S)[3].any()


def test_masks_of_one_kind():
    x, W, S = draw(6, 5, 4, 2, 3)
    for name in ("silu", "gelu", "relu"):
        assert not mglu(x, W, S.abs() + 1, name).any()
        assert not mglu(x, W, -S.abs(), name).any()
    torch.testing.assert_close(mglu(x, W, -S.abs(), "sigmoid"), 2*0.5*(x @ W.mT))
    assert not mglu(x, W, 0*S).any(), "a logit of exactly 0 is value"


def test_symmetries():
    x, W, S = draw(6, 5, 4, 3, 4)
    S[S == 0] = 1
    y, z = masked_products(x, W, S), masked_products(x, W, -S)
    torch.testing.assert_close(z[:, 1:], y[:, :1] - y[:, 1:])
    torch.testing.assert_close(mglu(x, W, S[[2, 0, 1]]), mglu(x, W, S))
    torch.testing.assert_close(mglu(x, W, torch.cat([S, S[:1]])), mglu(x, W, S) + mglu(x, W, S[:1]))
    torch.testing.assert_close(mglu(x, W, S[:1].expand(5, -1, -1)), 5*mglu(x, W, S[:1]))
    for c in (-2., 0.5): torch.testing.assert_close(mglu(x, c*W, S, "identity"),
                                                   c**2*mglu(x, W, S, "identity"))
    e = y[:, 1:]
    torch.testing.assert_close(mglu(x, W, S, "identity"), (e*(y[:, :1] - e)).sum(1))
    torch.testing.assert_close(gate(y.view(2, 3, 4, 4)), mglu(x, W, S).view(2, 3, 4))


def test_steps_are_exact_in_half_precision():
    S = torch.linspace(-400, 400, 999).bfloat16().requires_grad_()
    H = straight_through(S)
    assert torch.equal(H, (S > 0).bfloat16())
    usual = ((S > 0).bfloat16() - S).detach() + S
    assert not torch.equal(usual, H), "the usual form would do here"
    H.backward(torch.arange(999).bfloat16())
    assert torch.equal(S.grad, torch.arange(999).bfloat16())


def test_routing():
    g = lambda: torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=g())
    plain, routed = MGLU(8, 6, generator=g()), MGLU(8, 6, top_k=1, generator=g())
    torch.testing.assert_close(routed(x), plain(x))
    plain, routed = (MGLU(8, 6, n_masks=4, top_k=k, generator=g()) for k in (None, 4))
    with torch.no_grad(): routed.router.weight.zero_()
    torch.testing.assert_close(routed(x), plain(x)/4)
    r = route(torch.tensor([[3., 1, 2, 0], [0, 0, 5, 1]]), 2)
    torch.testing.assert_close(r.sum(-1), torch.ones(2))
    assert (r > 0).sum(-1).tolist() == [2, 2] and r[0, 0] > r[0, 2] > 0 and r[1, 2] > r[1, 3] > 0


@pytest.mark.parametrize("options", [dict(gate_mask=False), dict(value_mask=False),
                                     dict(top_k=2), dict(scale=True), {}])
def test_layer_forms_agree(options):
    g = lambda: torch.Generator().manual_seed(0)
    layers = [MGLU(8, 6, n_masks=3, form=f, generator=g(), **options).double()
              for f in ("complement", "direct")]
    x = torch.randn(2, 4, 8, generator=g(), dtype=torch.float64)
    outs = [layer(x) for layer in layers]
    torch.testing.assert_close(*outs)
    for out in outs: out.square().sum().backward()
    for (name, p), q in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_streams_are_complementary():
    layer = MGLU(8, 6, n_masks=3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8)
    gates, values = streams(layer, x)
    torch.testing.assert_close(gates + values, (x @ layer.weight.mT)[:, None].expand(-1, 3, -1))


def test_autocast_casts_weights_and_not_logits():
    layer = MGLU(16, 8, n_masks=2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 16)
    with torch.no_grad(): layer.logits[0, 0] = 1e-30      # not zero in float32
    with torch.autocast("cpu", dtype=torch.bfloat16): out = layer(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(out.float(), layer(x), rtol=0.1, atol=0.1)


def test_in_a_model_masks_learn_or_stay():
    """Both kinds start equal; only learned masks flip. Decay may be switched off for logits."""
    models, before = [], []
    for learned in (True, False):
        c = Config(vocab_size=20, d_model=16, n_layers=1, n_heads=2, d_ff=24, context=8, ffn="mglu",
                   ffn_options=dict(n_masks=2, learned=learned, decay=False))
        models.append(Transformer(c, generator=torch.Generator().manual_seed(0)))
        (layer,) = masked_layers(models[-1]).values()
        before.append(layer.logits.detach().clone())
        assert layer.no_decay == ("logits",) and layer.logits.std() < 0.02
    assert torch.equal(*before)
    for model, old, learned in zip(models, before, (True, False), strict=True):
        (layer,) = masked_layers(model).values()
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        tokens = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            out = model(tokens)
            loss = F.cross_entropy(getattr(out, "logits", out).flatten(0, 1), tokens.flatten())
            opt.zero_grad(); loss.backward(); opt.step()
        assert (mask_stats(layer.logits, old).flips > 0) == learned


def test_bad_input_is_named():
    x, W, S = draw(2, 5, 4, 2, 0)
    for call, text in ((lambda: mglu(x, W, S[0]), "arguments W, S"),
                       (lambda: mglu(x, W, S[:, :3]), "arguments W, S"),
                       (lambda: mglu(x[:, :4], W, S), "argument x"),
                       (lambda: mglu(x, W, S, "swish"), "activation='swish'"),
                       (lambda: MGLU(4, 0), "d_ff=0"), (lambda: MGLU(4, 4, top_k=3), "top_k=3"),
                       (lambda: MGLU(4, 4, form="x"), "form='x'"),
                       (lambda: mask_stats(S, S[:1]), "argument before")):
        with pytest.raises(ValueError, match=text): call()
    with pytest.raises(TypeError, match="arguments x, W"): mglu(x.float(), W, S)


def test_no_token_at_all():
    """A batch can be empty: an expert without tokens, a rank without rows."""
    layer, x = MGLU(8, 6, n_masks=2), torch.zeros(0, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 8) and not layer.weight.grad.any() and not layer.logits.grad.any()
