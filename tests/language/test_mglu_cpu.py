"""The compiled decoding kernel: every instruction set of this machine, odd sizes, no compiler."""
import pytest
import torch

from yokolab.language import mglu_cpu as cpu
from yokolab.language.masked import MGLU
from yokolab.language.packed import pack, pack_bits, sums_ref

try: cpu.compiler(); COMPILER = True
except cpu.NoCompiler: COMPILER = False
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C compiler")
HERE = cpu.LEVELS[:1 + cpu.LEVELS.index(cpu.cpu_level())]
CASES = [(level, dtype, n) for k, level in enumerate(HERE)
         for n, dtype in zip((1, 4, 3) if k % 2 else (2, 1, 8), cpu.DTYPES, strict=True)]


def draw(T, d, h, n, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(m, h, generator=g).to(dtype) for m in (T, d))
    return x, W, torch.rand(n, d, h, generator=g) > 0.5


@needs_compiler
@pytest.mark.parametrize("level,dtype,n", CASES)
def test_kernel_is_the_dense_product(level, dtype, n):
    for T, d, h in ((1, 9, 70), (7, 6, 33), (16, 5, 96), (2, 1, 1), (3, 4, 31)):
        x, W, M = draw(T, d, h, n, dtype)
        z = cpu.sums(x, W, pack_bits(M), level=level, threads=1)
        ref = sums_ref(x.double(), W.double(), pack_bits(M))
        torch.testing.assert_close(z.double(), ref, rtol=1e-5, atol=3e-5)
        torch.testing.assert_close(z[0], ref[0].float(), rtol=1e-5, atol=3e-5)


@needs_compiler
def test_half_precision_edge_values():
    """Subnormal, largest and signed numbers of float16 in the portable conversion."""
    w = torch.tensor([2.**-24, -2.**-24, 2.**-14, 65504., -65504., -0., 1/3]).half()
    words = pack_bits(torch.ones(8, 7, 7, dtype=torch.bool))
    for level in HERE[:2]:
        z = cpu.sums(torch.eye(7), w.expand(7, 7), words, level=level, threads=1)
        assert torch.equal(z[0], w.float()[:, None].expand(7, 7)), level


@needs_compiler
def test_threads_and_strides_change_nothing():
    x, W, M = draw(5, 13, 64, 4, torch.float32)
    one = cpu.sums(x, W, pack_bits(M), threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(cpu.sums(x, W, pack_bits(M), threads=threads), one)
    wide, tall = torch.randn(5, 128), torch.randn(26, 64)
    wide[:, ::2], tall[::2] = x, W
    assert torch.equal(cpu.sums(wide[:, ::2], tall[::2], pack_bits(M), threads=1), one)
    torch.testing.assert_close(cpu.total(x, W, threads=1), x @ W.mT)


@needs_compiler
def test_layers_decode():
    layer = MGLU(64, 24, n_masks=4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(pack(layer, sums=cpu.sums)(x), layer(x), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_built_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.build.cache_clear()
    x, W, M = draw(1, 4, 32, 1, torch.float32)
    cpu.sums(x, W, pack_bits(M), level="portable")
    (lib,) = tmp_path.rglob("*.so")
    stamp = lib.stat().st_mtime_ns
    cpu.build.cache_clear()
    cpu.sums(x, W, pack_bits(M), level="portable")
    assert [p.stat().st_mtime_ns for p in tmp_path.rglob("*.so")] == [stamp]
    cpu.build.cache_clear()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_no_library_from_a_folder_that_others_write_to(tmp_path, monkeypatch, mode):
    """Whoever can write there could have planted code that is loaded into this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = cpu._folder()
    assert home == tmp_path/"yokolab"/"mglu" and home == cpu._folder()
    home.chmod(mode)
    assert tmp_path not in cpu._folder().parents
    home.chmod(0o700); home.parent.chmod(0o777)
    assert tmp_path not in cpu._folder().parents


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    def nowhere(): raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(cpu.Path, "home", nowhere)
    assert cpu._folder().is_dir()


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", ""); monkeypatch.delenv("CC", raising=False)
    cpu.compiler.cache_clear(); cpu.build.cache_clear()
    x, W, M = draw(1, 4, 32, 1, torch.float32)
    with pytest.raises(cpu.NoCompiler, match="install gcc or clang, or set CC"):
        cpu.sums(x, W, pack_bits(M))
    assert torch.equal(cpu.best_sums(x, W, pack_bits(M)), sums_ref(x, W, pack_bits(M)))
    cpu.compiler.cache_clear(); cpu.build.cache_clear()


@needs_compiler
def test_a_failing_compiler_says_so(tmp_path, monkeypatch):
    false = tmp_path/"cc"
    false.write_text('#!/bin/sh\n[ "$1" = --version ] && echo cc 0 && exit 0\n'
                     'echo boom >&2; exit 1\n')
    false.chmod(0o755)
    monkeypatch.setenv("CC", str(false)); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.compiler.cache_clear(); cpu.build.cache_clear()
    x, W, M = draw(1, 4, 32, 1, torch.float32)
    with pytest.raises(cpu.NoCompiler, match="boom"): cpu.sums(x, W, pack_bits(M))
    assert torch.equal(cpu.best_sums(x, W, pack_bits(M)), sums_ref(x, W, pack_bits(M)))
    cpu.compiler.cache_clear(); cpu.build.cache_clear()


def test_bad_input_is_named():
    x, W, M = draw(1, 4, 32, 1, torch.float32)
    words = pack_bits(M)
    for call, kind, text in ((lambda: cpu.sums(x, W.double(), words), TypeError, "argument weight"),
                             (lambda: cpu.sums(x, W, words[:2]), ValueError, "argument words"),
                             (lambda: cpu.sums(x[0], W, words), ValueError, "argument x"),
                             (lambda: cpu.sums(x, W, words, level="m"), ValueError, "level='m'")):
        with pytest.raises(kind, match=text): call()


def test_what_would_crash_the_process_is_refused(monkeypatch):
    """Addresses that are not in main memory, instructions that the processor does not have."""
    x, W, M = draw(1, 4, 32, 1, torch.float32)
    words = pack_bits(M)
    with pytest.raises(TypeError, match="argument x on meta"): cpu.sums(x.to("meta"), W, words)
    with pytest.raises(TypeError, match="argument words on meta"): cpu.sums(x, W, words.to("meta"))
    monkeypatch.setattr(cpu, "cpu_level", lambda: "portable")
    with pytest.raises(ValueError, match="level='avx2': one of portable on this processor"):
        cpu.sums(x, W, words, level="avx2")
