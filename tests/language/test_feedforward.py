"""Layers by name, their start and what they count."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yokolab.language import feedforward as ff

close = torch.testing.assert_close


@pytest.mark.parametrize("name, flops", [("gelu", 4), ("swiglu", 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_formula_gradient_and_count(name, flops, bias):
    torch.manual_seed(0)
    m = ff.feedforward(name, 6, 9, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    z = F.gelu(m.up(x)) if name == "gelu" else F.silu(m.gate(x))*m.up(x)
    close(m(x), m.down(z))
    assert torch.autograd.gradcheck(m, (x,))
    c = type(m).count(6, 9, bias=bias)
    assert c.total == c.active == sum(p.numel() for p in m.parameters())
    assert c.flops == flops*6*9 and c.masks == 0


def test_tanh_approximation():
    m = ff.feedforward("gelu", 6, 9, approximate="tanh")
    x = torch.randn(4, 6)
    close(m(x), m.down(F.gelu(m.up(x), approximate="tanh")))


@pytest.mark.parametrize("name, error, text", [
    ("swiglue", ValueError, "did you mean 'swiglu'"), ("MGLU", ValueError, "did you mean 'mglu'"),
    ("xyz", ValueError, "there are gelu, swiglu, mglu, moe"), (3, ValueError, "ffn=3")])
def test_unknown_names(name, error, text):
    with pytest.raises(error, match=text): ff.feedforward(name, 4, 8)


def test_unknown_options_and_sizes():
    with pytest.raises(TypeError, match=r"ffn_options.*n_masks"):
        ff.feedforward("swiglu", 4, 8, n_masks=1)
    with pytest.raises(ValueError, match="d_model=-1"): ff.feedforward("swiglu", -1, 8)
    with pytest.raises(TypeError, match=r"d_ff=8\.0"): ff.feedforward("swiglu", 4, 8.0)


def test_start_by_role_and_by_generator():
    g = lambda: torch.Generator().manual_seed(5)
    m, n = (nn.ModuleDict(dict(a=ff.SwiGLU(256, 512, bias=True), o=nn.Linear(256, 256)))
            for _ in range(2))
    ff.initialize(m, 0.02, 0.005, g())
    ff.initialize(n, 0.02, 0.005, g())
    for p, q in zip(m.parameters(), n.parameters(), strict=True): assert torch.equal(p, q)
    for layer, std in ((m.a.gate, 0.02), (m.a.up, 0.02), (m.a.down, 0.005), (m.o, 0.005)):
        assert abs(layer.weight.std()/std - 1) < 0.02 and not layer.bias.any()


def test_a_layer_may_draw_for_itself():
    class Own(nn.Module):
        def initialize(self, *, std, out_std, generator): self.got = std, out_std, generator

    m, g = nn.Sequential(Own()), torch.Generator()
    ff.initialize(m, 0.1, None, g)
    assert m[0].got == (0.1, 0.1, g)
