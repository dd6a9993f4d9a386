"Interleaved timing: order, counts and what is refused (never how fast something is)"

import subprocess
import sys

import numpy as np
import pytest

from yokolab.lab import bench


def test_repeats_are_interleaved():
    calls = []
    bench.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
                     repeats=4, warmup=3, min_time=0)
    assert "".join(calls) == "aaabbb" + "ab" + "abababab"      # warm-up, loop count, samples


def test_a_fast_function_is_looped_and_a_slow_one_is_not():
    calls = dict(fast=0, slow=0)

    def fast(): calls["fast"] += 1

    def slow():
        import time
        calls["slow"] += 1
        time.sleep(0.02)

    t = bench.interleave(dict(fast=fast, slow=slow), repeats=3, warmup=0)
    assert calls["slow"] == 1 + 3 and calls["fast"] > 1000
    assert (t["slow"] >= 0.02).all() and (t["fast"] > 0).all() and t["fast"].dtype == np.float64


@pytest.mark.parametrize("kw, words", [
    (dict(fns={}), "fns"),
    (dict(fns={"a": int}, repeats=0), "repeats=0"),
])
def test_nothing_to_measure_is_refused(kw, words):
    with pytest.raises(ValueError, match=words): bench.interleave(**kw)


def test_a_result_instead_of_a_function_is_refused():
    with pytest.raises(TypeError, match=r"fns\['dot'\]=3"): bench.interleave({"dot": 3})


def test_an_error_in_the_function_comes_through():
    with pytest.raises(ZeroDivisionError): bench.interleave({"a": lambda: 1/0})


def test_machine_and_hardware_agree():
    m = bench.machine()
    assert bench.machine() is m and m.cores >= 1 and m.threads >= 1
    assert bench.hardware().startswith(f"{m.cores}-core {m.cpu}")
    assert "<table>" in m._repr_html_() and m.cpu in m._repr_html_()


def test_hardware_needs_no_torch():
    code = ("import sys; from yokolab.lab.bench import hardware; t = hardware(); "
            "assert '-core' in t, t; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ceilings_are_positive_and_count_what_they_say():
    assert bench.copy_bandwidth(2**20, repeats=2) > 1e6
    for dtype in ("float64", "float32"): assert bench.matmul_flops(dtype, n=64, repeats=2) > 1e6


def test_an_unknown_dtype_is_refused():
    for bad in ("float31", "nn"):
        with pytest.raises(ValueError, match=bad): bench.matmul_flops(bad, n=8)
    with pytest.raises(ValueError, match="size=1"): bench.copy_bandwidth(1)


def test_memory_of_the_container_counts(monkeypatch):
    assert bench._memory() > 2**28

    def unknown(_): raise OSError

    monkeypatch.setattr(bench.os, "sysconf", unknown)
    assert bench._memory() == 0 and "GB" not in bench.hardware()
