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


def test_periodic_lines_do_not_see_where_the_box_begins():
    loops = [ring(1.0, 40, (2, 2, 2)), ring(.7, 40, (2.5, 2, 3), (1, 2, 0))]
    u = [
        velocity(Filaments([l + s for l in loops], 1.0, 1e-3, period=4.0), 1e-7)
        for s in (0.0, [1.9, -2.3, 7.1])
    ]
    assert np.linalg.norm(u[0] - u[1]) < 1e-5 * np.linalg.norm(u[0])
    free = velocity(Filaments(loops, 1.0, 1e-3))
    wide = velocity(Filaments(loops, 1.0, 1e-3, period=400.0), 1e-7)
    assert np.linalg.norm(wide - free) < 1e-5 * np.linalg.norm(free)


def test_lines_through_the_boundary():
    z = np.linspace(0, 4, 32, endpoint=False); o = np.ones(32)
    up, down = np.stack([o, 2 * o, z], 1), np.stack([3 * o, 2 * o, z[::-1]], 1)
    u = velocity(Filaments([up, down], 1.0, 1e-3, period=4.0), 1e-7)
    # a square array of line pairs: each stands half a period from its opposite, all is at rest
    assert abs(u).max() < 1e-5
    with pytest.raises(ValueError, match="open space"):
        diagnostics(Filaments([up, down], period=4.0))


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_reconnection_across_a_periodic_boundary(shift):
    a, b = ring(1.0, 60, (1.49, 2, 2)), ring(1.0, 60, (3.51, 2, 2))
    f = Filaments([a + [shift, 0, 0], (b + [shift, 0, 0]) % 5.0], 1.0, 1e-3, period=5.0)
    g, n = reconnect(f, .11, "distance"); step = np.diff(g.loops[0], axis=0)
    assert n == 1 and len(g.loops) == 1 and len(g.nodes) == 120
    assert np.linalg.norm(step, axis=1).max() < .2 and np.ptp(g.loops[0][:, 0]) < 4.1
    later = [
        evolve(Filaments([(l + m) % 5.0 if m else l for l in f.loops], 1.0, 1e-3, period=5.0),
               0.01, .12, "length", frames=1)
        for m in (0.0, 1.3)
    ]
    assert later[0].reconnections == later[1].reconnections
    ends = [[len(l) for l in h.frames[-1].loops] for h in later]
    assert ends[0] == ends[1]
