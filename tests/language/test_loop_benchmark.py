"""The benchmark of the training loop compares the same model, and works at a small size."""
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from yokolab.language.model import Config, Transformer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Config(vocab_size=257, d_model=16, n_layers=2, n_heads=2, d_ff=24, context=16)


@pytest.fixture
def loop(monkeypatch):
    """The benchmark with a small model."""
    spec = importlib.util.spec_from_file_location("loop", ROOT/"benchmarks"/"language_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPE", SHAPE)
    return module


def test_the_plain_model_is_the_same(loop):
    ours = Transformer(replace(SHAPE, init_std=0.3))
    plain = loop.Plain(SHAPE)
    loop.copy_weights(ours, plain)
    x = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-5, atol=1e-5)


def test_what_it_reports(loop):
    r = loop.measure(repeats=2, batch_size=2)
    assert r["largest_gap_of_losses"] < 1e-5 and r["steps_compared"] >= 3
    assert r["resumed_run_is_bitwise_equal"] and r["speed_over_plain"] > 0


CODE = """
import sys
for name in ("tokenizers", "safetensors", "transformers", "numba"): sys.modules[name] = None
from yokolab.language import generation, hub, model, text, training, weights
for f in (lambda: text.train_bpe(["a"], 300), lambda: weights._safetensors()):
    try: f()
    except ImportError as e: assert 'pip install "yokolab[language]"' in str(e), e
    else: raise SystemExit("no error")
"""


def test_the_core_needs_torch_alone():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
