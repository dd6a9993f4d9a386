"Products against dense matrices and against curvlinops"
import pytest
import torch
from torch import nn

from yokolab.curvature.products import (
    conjugate_gradients,
    fisher_ref,
    flat,
    ggn_product,
    hessian_product,
    hessian_ref,
    parameters,
    unflat,
)
from yokolab.curvature.solve import SolveError

D = torch.float64
LOSS = {"cross_entropy": nn.CrossEntropyLoss(), "mse": nn.MSELoss(),
        "binary": nn.BCEWithLogitsLoss()}


def case(kind):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    y = torch.randint(4, (6,)) if kind == "cross_entropy" else torch.rand(6, 4, dtype=D)
    return m, torch.randn(6, 5, dtype=D), y


QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, raised in curvlinops


@QUIET
@pytest.mark.parametrize("kind", list(LOSS))
def test_products_equal_dense_and_curvlinops(kind, curvlinops):
    m, x, y = case(kind)
    theta = parameters(m)
    v = torch.randn(flat(theta).numel(), dtype=D)
    H, G = hessian_ref(m, x, y, kind), fisher_ref(m, x, kind=kind)
    torch.testing.assert_close(H, H.t())
    torch.testing.assert_close(hessian_product(m, x, y, v, kind), H @ v)
    torch.testing.assert_close(ggn_product(m, x, v, kind), G @ v)
    assert float(v @ ggn_product(m, x, v, kind)) >= 0
    args = (m, LOSS[kind], list(m.parameters()), [(x, y)])
    vs = list(unflat(v, theta).values())
    for op, want in ((curvlinops.HessianLinearOperator, H @ v),
                     (curvlinops.GGNLinearOperator, G @ v)):
        got = torch.cat([t.reshape(-1) for t in op(*args, check_deterministic=False) @ vs])
        torch.testing.assert_close(got.detach(), want, atol=1e-9, rtol=1e-6)


@QUIET
def test_empirical_fisher_equals_curvlinops(curvlinops):
    m, x, y = case("cross_entropy")
    v = torch.randn(flat(parameters(m)).numel(), dtype=D)
    op = curvlinops.EFLinearOperator(m, LOSS["cross_entropy"], list(m.parameters()), [(x, y)],
                                     check_deterministic=False)
    got = torch.cat([t.reshape(-1) for t in op @ list(unflat(v, parameters(m)).values())]).detach()
    torch.testing.assert_close(got, fisher_ref(m, x, y) @ v, atol=1e-9, rtol=1e-6)


def test_conjugate_gradients():
    A = torch.randn(12, 12, dtype=D)
    A, g = A @ A.t(), torch.randn(12, dtype=D)
    torch.testing.assert_close(conjugate_gradients(lambda v: A @ v, g, .5, 100),
                               torch.linalg.solve(A + .5 * torch.eye(12, dtype=D), g))
    with pytest.raises(SolveError, match="negative curvature"):
        conjugate_gradients(lambda v: -v, g, .5)
    with pytest.raises(ValueError, match="argument damping=0"):
        conjugate_gradients(lambda v: v, g, 0)
