"""Cost model and measured cases of the masked gated unit."""
import pytest
import torch

from yokolab.language import mglu, mglu_cpu
from yokolab.language.counting import count_bytes, parameters
from yokolab.language.masked import MGLU
from yokolab.language.model import Config

try: mglu_cpu.compiler(); COMPILER = True
except mglu_cpu.NoCompiler: COMPILER = False


def test_bytes_of_the_source():
    """H100-sized layers: 96 MB to 64 MB and 2 MB a mask; 31 and 25 per cent less for the block."""
    h, d = 2048, 8192
    assert mglu.read_bytes("gated", d, h, block=True) == 96*2**20
    for n in (1, 2, 4): assert mglu.read_bytes("masked", d, h, n, block=True) == (64 + 2*n)*2**20
    share = lambda n: 1 - (32 + n)/48
    assert round(share(1), 2) == 0.31 and round(share(4), 2) == 0.25


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_equal_bytes(n):
    d = 960
    for gated, kind in ((True, "gated"), (False, "plain")):
        width = mglu.equal_bytes(d, n, gated)
        ours, theirs = (mglu.read_bytes(k, w, 64, n, block=True)
                        for k, w in (("masked", d), (kind, width)))
        assert abs(ours - theirs) <= 64*6/2


def test_products():
    assert [mglu.step_products("complement", n) for n in (1, 4)] == [6, 15]
    assert [mglu.step_products("direct", n) for n in (1, 4)] == [6, 24]
    with pytest.raises(ValueError, match="kind='x'"): mglu.step_products("x")


@pytest.mark.parametrize("n", [1, 3])
def test_counts_of_a_model(n):
    """The counters of the language core agree with the layer and with the byte model."""
    options = dict(vocab_size=11, d_model=16, n_layers=2, n_heads=2, d_ff=24, context=8)
    masked = Config(ffn="mglu", ffn_options=dict(n_masks=n), **options)
    plain = Config(ffn="gelu", **options)
    layer = MGLU(16, 24, n_masks=n)
    assert parameters(masked).masks == 2*layer.logits.numel()
    more = count_bytes(masked, length=0).decode - count_bytes(plain, length=0).decode
    assert more == 2*n*16*24/8
    assert MGLU.count(16, 24, n_masks=n).total == sum(p.numel() for p in layer.parameters())
    none = MGLU(16, 24, gate_mask=False, value_mask=False)
    assert MGLU.count(16, 24, gate_mask=False, value_mask=False).total == sum(
        p.numel() for p in none.parameters())


@pytest.mark.skipif(not COMPILER, reason="no C compiler")
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_all_ways_to_decode_agree(dtype, tol):
    cases = mglu.decode_cases(20, 64, dtype, (1, 4), (1, 4), tokens=3)
    close = lambda a, b: torch.testing.assert_close(a.float(), b.float(), rtol=tol, atol=tol*64)
    for name in ("SwiGLU, one product", "SwiGLU, own kernel"):
        close(cases[name].run(), cases["SwiGLU"].run())
    for n in (1, 4): close(cases[f"MGLU {n}"].run(), cases[f"naive {n}"].run())
    size = torch.finfo(dtype).bits
    assert 8*cases["MGLU 4"].nbytes == (size + 4)*20*64 and 8*cases["SwiGLU"].nbytes == 2*size*20*64


def test_steps_compute_the_same_gradients():
    steps = mglu.step_cases(10, 12, 7, 4)
    ours = [t.clone() for t in steps["complement"]()]
    for a, b in zip(ours, steps["direct"](), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert len(steps["SwiGLU"]()) == 3
