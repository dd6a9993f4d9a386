"""Packed masks: there and back, bytes, export of layers and models."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.language.masked import MGLU
from yokolab.language.packed import (
    PackedMGLU,
    mask_stats,
    pack,
    pack_bits,
    pack_bytes,
    pack_model,
    sums_ref,
    unit_bits,
    unpack,
    unpack_bits,
    unpack_bytes,
)

few = settings(deadline=None, max_examples=40)


@few
@given(st.integers(1, 16), st.integers(1, 5), st.integers(1, 99), st.integers(0, 2**31))
def test_bits_there_and_back(n, d, h, seed):
    M = torch.rand(n, d, h, generator=torch.Generator().manual_seed(seed)) > 0.5
    words = pack_bits(M)
    assert words.shape == (d, -(-h//32), n) and words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, h), M)
    assert torch.equal(pack_bits(unpack_bits(words, h)), words)
    r, i, k = (int(torch.randint(m, (), generator=torch.Generator().manual_seed(seed)))
               for m in (d, n, h))
    assert (int(words[r, k//32, i]) >> k % 32) & 1 == M[i, r, k]
    if n <= 8: assert torch.equal(unpack_bytes(pack_bytes(M), n), M)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("bits,dtype", [(16, torch.float16), (32, torch.float32)])
def test_bytes_are_those_of_the_formula(n, bits, dtype):
    p = pack(MGLU(96, 5, n_masks=n), dtype)
    assert 8*p.unit_bytes() == (bits + n)*96*5 == unit_bits("masked", n, bits)*96*5
    state = sum(t.nbytes for k, t in p.state_dict().items() if k != "down")
    assert state == p.unit_bytes()


def test_published_numbers():
    """46.9 % fewer bits with one mask, 37.5 % with four, break-even at sixteen."""
    saved = lambda n: 1 - unit_bits("masked", n)/unit_bits("gated")
    assert [saved(n) for n in (1, 4, 16)] == [1 - 17/32, 0.375, 0]
    assert {unit_bits("bytes", n) for n in range(1, 9)} == {24}
    with pytest.raises(ValueError, match="kind='x'"): unit_bits("x")


@pytest.mark.parametrize("h", [32, 45])
@pytest.mark.parametrize("options", [{}, dict(activation="gelu"), dict(scale=True)])
def test_layer_there_and_back(h, options):
    g = torch.Generator().manual_seed(0)
    layer, x = MGLU(h, 20, n_masks=3, generator=g, **options), torch.randn(2, 3, h, generator=g)
    p = pack(layer)
    torch.testing.assert_close(p(x), layer(x))
    again = pack(unpack(p))
    assert torch.equal(again(x), p(x)), "bit for bit"
    for name, t in p.state_dict().items(): assert torch.equal(t, again.state_dict()[name]), name
    assert mask_stats(unpack(p).logits, layer.logits).flips == 0


def test_state_dict_reload_is_bit_for_bit(tmp_path):
    g = torch.Generator().manual_seed(0)
    p, x = pack(MGLU(40, 20, n_masks=3, generator=g), torch.bfloat16), torch.randn(4, 40).bfloat16()
    torch.save(p.state_dict(), tmp_path/"p.pt")
    q = PackedMGLU(*(torch.zeros_like(t) for t in (p.weight, p.words, p.down)))
    q.load_state_dict(torch.load(tmp_path/"p.pt"))
    assert torch.equal(q(x), p(x))


def test_padding_changes_nothing():
    g = torch.Generator().manual_seed(0)
    x, W, M = torch.randn(3, 45), torch.randn(7, 45), torch.rand(2, 7, 45, generator=g) > 0.5
    wide = lambda t: torch.nn.functional.pad(t, (0, 19))
    torch.testing.assert_close(sums_ref(wide(x), wide(W), pack_bits(wide(M))),
                               sums_ref(x, W, pack_bits(M)))


def test_models_are_copied_and_packed():
    model = torch.nn.Sequential(MGLU(8, 8), torch.nn.Sequential(torch.nn.Tanh(), MGLU(8, 8)))
    p, x = pack_model(model), torch.randn(3, 8)
    assert sum(isinstance(m, PackedMGLU) for m in p.modules()) == 2
    assert sum(isinstance(m, MGLU) for m in model.modules()) == 2
    torch.testing.assert_close(p(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_fewer_bits_in_a_model_of_float32(dtype):
    g = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(MGLU(40, 24, n_masks=2, generator=g), torch.nn.Linear(40, 3))
    x = torch.randn(5, 40, generator=g)
    out = pack_model(model, dtype)(x)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out, model(x), rtol=0.05, atol=0.05)


def test_masks_of_another_layer_are_refused():
    """A single row would be spread over all rows without a word."""
    p = pack(MGLU(40, 24, n_masks=2))
    for rows in (1, 23):
        with pytest.raises(ValueError, match="argument words"):
            PackedMGLU(p.weight, p.words[:rows], p.down)


def test_what_cannot_be_packed():
    for o in (dict(top_k=1), dict(gate_mask=False), dict(value_mask=False)):
        with pytest.raises(ValueError, match="plain sum"): pack(MGLU(8, 8, **o))
    with pytest.raises(ValueError, match="do not fit into a byte"): pack_bytes(torch.ones(9, 2, 2))
    with pytest.raises(ValueError, match="argument words"): unpack_bits(torch.zeros(2, 3, 1), 70)


def test_statistics():
    S = torch.tensor([[[1., 1], [-1, -1]], [[1, -1], [1, -1]]])
    s = mask_stats(S, -S)
    assert s.ones.tolist() == [0.5, 0.5] and s.flips == 1 and s.pairwise == 0.5
    assert mask_stats(S, S.abs()).flips == 0.5
