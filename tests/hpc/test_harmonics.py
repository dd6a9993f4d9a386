"""Operators of the expansions against closed forms."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.hpc.harmonics import (
    gradient_matrices,
    irregular,
    m2l_matrix,
    regular,
    shift_matrix,
    solid_ref,
)

quick = settings(max_examples=15, deadline=None)
vector = st.tuples(*[st.floats(-.5, .5) for _ in range(3)])


@quick
@given(vector, vector)
def test_addition_theorem_and_group_law(a, b):
    a, b = np.array(a), np.array(b)
    A, B, C = shift_matrix(np.stack([a, b, a + b]), 6)
    assert np.allclose(A @ B, C, atol=1e-12)
    assert np.allclose(A @ regular(b[None], 6), regular((a + b)[None], 6), atol=1e-13)


@quick
@given(vector, vector, st.integers(0, 5))
def test_product_of_harmonics_is_the_reciprocal_distance(a, b, seed):
    x = np.array(a) + np.random.default_rng(seed).permutation([3, 1, 0])
    exact = 1 / np.linalg.norm(x - b)
    assert abs((regular(np.array(b)[None], 20) * irregular(x[None], 20)).sum() / exact - 1) < 1e-6


def test_real_form_matches_angles():
    from scipy.special import sph_harm_y
    x = np.random.default_rng(0).standard_normal((7, 3)); r = np.linalg.norm(x, axis=1)
    theta, phi = np.arccos(x[:, 2] / r), np.arctan2(x[:, 1], x[:, 0]); R = regular(x, 6)
    for n in range(6):
        for m in range(n + 1):
            y = (
                (-1) ** m
                * np.sqrt(4 * np.pi / (2 * n + 1))
                * r**n
                * sph_harm_y(n, m, theta, phi)
                * (2**0.5 if m else 1)
            )
            assert np.allclose(R[n*n + n + m], y.real, atol=1e-12)
            if m: assert np.allclose(R[n*n + n - m], y.imag, atol=1e-12)


@pytest.mark.parametrize(
    "order,side,errors", [(4, 2.0, 0.3), (8, 2.0, 2e-2), (14, 2.0, 1e-3), (10, 3.0, 1e-4)]
)
def test_whole_chain_converges(order, side, errors):
    rng = np.random.default_rng(1); y, x = rng.uniform(-.5, .5, (2, 60, 3))
    q = rng.standard_normal(60)
    child, up = np.array([.25, .25, .25]), np.array([[.1, 0, .05]])
    M = shift_matrix(child[None], order)[0] @ (regular(y - child, order) @ q)
    L = m2l_matrix(np.array([[side, 0, 0]]), order)[0] @ M
    L = shift_matrix(up, order)[0].T @ L
    d = x[:, None] + [side, 0, 0] - y[None]; r = np.linalg.norm(d, axis=2)
    phi = L @ regular(x - up, order)
    grad = np.stack([(g.T @ L) @ regular(x - up, order) for g in gradient_matrices(order)], 1)
    exact = -(d / r[..., None]**3 * q[None, :, None]).sum(1)
    assert np.linalg.norm(grad - exact) < errors * np.linalg.norm(exact)
    assert np.linalg.norm(phi - (q / r).sum(1)) < errors * np.linalg.norm((q / r).sum(1))


def test_local_expansion_of_a_linear_field_is_exact():
    L = np.array([2.0, 3, 5, 7]); x = np.random.default_rng(0).standard_normal((9, 3))
    e = np.array([[.3, -1, 2]])
    assert np.allclose((shift_matrix(e, 2)[0].T @ L) @ regular(x - e, 2), L @ regular(x, 2))


def test_harmonics_at_the_origin_are_finite():
    assert np.isfinite(solid_ref(np.zeros((1, 3)), 8)).all()
