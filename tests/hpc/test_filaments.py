"""Vortex lines: closed forms and invariants."""
import numpy as np
import pytest

pytest.importorskip("numba", reason="needs the extra hpc")
from yokolab.hpc.vortex_fmm_filaments import Filaments, diagnostics, ring, ring_speed, velocity
from yokolab.hpc.vortex_fmm_reconnection import evolve, reconnect, remesh


def test_ring_moves_with_kelvins_speed():
    errors = [
        abs(
            velocity(Filaments([ring(1.0, n)], core=1e-6))[:, 2].mean() / ring_speed(1.0, core=1e-6)
            - 1
        )
        for n in (32, 64, 128)
    ]
    assert errors[2] < 2e-5 and errors[0] > 2 * errors[1] > 4 * errors[2]


def test_ring_energy_has_the_right_derivative():
    E = [diagnostics(Filaments([ring(r, 128)], 1.0, 1e-4)).energy for r in (.99, 1.01)]
    assert abs((E[1] - E[0]) / (np.pi * (1.01**2 - .99**2)) / ring_speed(1.0, 1.0, 1e-4) - 1) < 1e-3


def test_fast_and_direct_velocity_agree():
    f = Filaments([ring(1.0, 600), ring(.6, 400, (.2, 0, .3), (0, 1, 1))], core=1e-6)
    a, b = velocity(f), velocity(f, fast=1, eps=1e-7)
    assert np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(a)


def test_leapfrogging_keeps_energy_and_impulse():
    h = evolve(
        Filaments([ring(1.0, 24), ring(1.0, 24, (0, 0, 0.5))], 1.0, 1e-3), 0.3, 0.35, None, frames=2
    )
    a, b = diagnostics(h.frames[0]), diagnostics(h.frames[-1])
    assert abs(b.energy / a.energy - 1) < 1e-4 and np.allclose(
        a.impulse, b.impulse, rtol=1e-4, atol=1e-9
    )


def test_reconnection_joins_two_rings_and_keeps_direction():
    f = Filaments([ring(1.0, 60, (-1.01, 0, 0)), ring(1.0, 60, (1.01, 0, 0))], 1.0, 1e-3)
    g, n = reconnect(f, .11, "distance")
    assert n == 1 and len(g.loops) == 1 and len(g.nodes) == 120
    assert np.allclose(diagnostics(g).impulse[2], diagnostics(f).impulse[2], rtol=.05)
    with pytest.raises(ValueError, match="rule='magic'"): reconnect(f, .1, "magic")
    assert not remesh(Filaments([ring(.01, 6)]), .25).loops
