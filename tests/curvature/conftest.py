import warnings

import pytest


@pytest.fixture
def curvlinops():
    "The reference package; its import warns about torch's own deprecations"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
