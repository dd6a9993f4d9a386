"Layers as matrices: rows reproduce gradients for every kind of layer"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yokolab.curvature.core import (
    check_positive,
    errors,
    find_layers,
    gradient,
    inputs,
    outer,
    tensor_layers,
    write,
)

D = torch.float64


def _case(kind, seed, bias):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=D)
    norm = lambda m: m.double()
    return {
        "linear": lambda: (nn.Linear(5, 3, bias=bias), r(4, 5)),
        "linear tokens": lambda: (nn.Linear(5, 3, bias=bias), r(4, 6, 5)),
        "conv2d": lambda: (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), bias=bias),
                           r(4, 2, 7, 6)),
        "conv2d same": lambda: (nn.Conv2d(2, 3, 3, padding="same", dilation=2, bias=bias),
                                r(3, 2, 6, 6)),
        "conv2d reflect": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=bias),
                                   r(3, 2, 5, 5)),
        "conv1d": lambda: (nn.Conv1d(2, 3, 3, padding=1, stride=2, bias=bias), r(4, 2, 9)),
        "embedding": lambda: (nn.Embedding(7, 3, padding_idx=1),
                              torch.randint(7, (4, 6), generator=g)),
        "layer norm": lambda: (nn.LayerNorm((2, 5), bias=bias), r(4, 6, 2, 5)),
        "rms norm": lambda: (nn.RMSNorm(5), r(4, 6, 5)),
        "group norm": lambda: (norm(nn.GroupNorm(2, 4)), r(4, 4, 3)),
        "batch norm": lambda: (nn.BatchNorm2d(3), r(4, 3, 2, 2)),
    }[kind]()


KINDS = ["linear", "linear tokens", "conv2d", "conv2d same", "conv2d reflect", "conv1d",
         "embedding",
         "layer norm", "rms norm", "group norm", "batch norm"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=4, deadline=None)
def test_rows_reproduce_the_gradient(kind, bias, seed):
    m, x = _case(kind, seed, bias)
    m = m.double()
    if hasattr(m, "weight") and m.weight.dim() == 1:
        with torch.no_grad(): m.weight.zero_()  # gamma = 0 must not matter
    out = m(x)
    c = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=D)
    (out * c).sum().backward()
    (layer,), left = find_layers(m)
    assert not left
    G = outer(layer, inputs(layer, m, x), errors(layer, m, c))
    assert G.shape[0] == x.shape[0]
    torch.testing.assert_close(G.sum(0), gradient(layer), atol=1e-9, rtol=1e-9)
    write(layer, 2 * gradient(layer))
    torch.testing.assert_close(2 * G.sum(0), gradient(layer), atol=1e-9, rtol=1e-9)


def test_unknown_ignored_grouped_and_tied_layers_are_reported():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.emb.weight
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
            self.group, self.act, self.skip = (
                nn.Conv2d(4, 4, 3, groups=2), nn.PReLU(), nn.Linear(2, 2))
            self.bi = nn.Bilinear(2, 2, 2)
    layers, left = find_layers(Net(), ignore=("skip",))
    assert [k.name for k in layers] == ["a"] and len(layers[0].modules) == 2
    assert set(left) == {"emb", "head", "group", "act", "skip", "bi"}
    assert "tied" in left["head"] and "grouped" in left["group"] and left["skip"] == "ignored"


def test_blocks_of_parameters_cover_them_once():
    m = nn.Linear(10, 7)
    for p in m.parameters(): p.grad = torch.arange(p.numel(), dtype=torch.float32).view_as(p)
    layers, _ = tensor_layers(m, block=4)
    assert sum(gradient(k).numel() for k in layers) == 77
    for k in layers: write(k, -gradient(k))
    assert torch.equal(m.weight.grad, -torch.arange(70.).view(7, 10))


@pytest.mark.parametrize("value, error", [
    (0, ValueError), (-1., ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    ("1", TypeError), (True, TypeError)])
def test_positive_numbers(value, error):
    with pytest.raises(error, match=r"argument damping=.*; "): check_positive("damping", value)
