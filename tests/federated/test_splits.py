"""Every split is a partition; what is asked for is what comes."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.federated.splits import (
    client_weights,
    contiguous_split,
    dirichlet_split,
    shuffled_split,
    sorted_split,
)

fast = settings(max_examples=25, deadline=None)
counts = st.lists(st.integers(5, 60), min_size=2, max_size=5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def labels_of(sizes):
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def assert_partition(parts, samples):
    "Disjoint and complete"
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(samples))


@fast
@given(counts, st.integers(1, 6), st.integers(0, 99), st.floats(0, 1))
def test_partitions(sizes, clients, seed, similarity):
    y = labels_of(sizes)
    for parts in (contiguous_split(len(y), clients), shuffled_split(len(y), clients, seeded(seed)),
                  sorted_split(y, clients, similarity, seeded(seed))):
        assert len(parts) == clients
        assert_partition(parts, len(y))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@fast
@given(counts, st.integers(1, 4), st.sampled_from([0.3, 1., 10., math.inf]), st.integers(0, 99))
def test_dirichlet_is_a_partition_with_the_right_class_counts(sizes, clients, alpha, seed):
    y = labels_of(sizes)
    parts = dirichlet_split(y, clients, alpha, minimum=1, generator=seeded(seed))
    assert_partition(parts, len(y))
    per_class = torch.stack([torch.bincount(y[p], minlength=len(sizes)) for p in parts])
    assert per_class.sum(0).tolist() == sizes
    if alpha == math.inf:
        exact = torch.tensor(sizes)/clients
        assert ((per_class - exact).abs() <= 1).all()


def test_dirichlet_alpha_decides_how_uneven():
    y = labels_of([300]*10)
    def classes(alpha):
        parts = dirichlet_split(y, 10, alpha, generator=seeded(3))
        return sum((torch.bincount(y[p], minlength=10) > 15).sum().item() for p in parts)/10
    assert classes(0.1) < 4 < 8 < classes(100.)


def test_dirichlet_redraws_to_the_minimum_and_repeats_with_the_seed():
    y = labels_of([50, 50])
    one, two = (dirichlet_split(y, 5, 0.3, minimum=8, generator=seeded(1)) for _ in range(2))
    assert min(map(len, one)) >= 8
    assert all(map(torch.equal, one, two))


def test_sorted_split_sorts():
    y = labels_of([40, 40])[torch.randperm(80, generator=seeded(0))]
    parts = sorted_split(y, 4)
    assert sorted(float(y[p].float().mean()) for p in parts) == [0, 0, 1, 1]
    mixed = [float(y[p].float().mean()) for p in sorted_split(y, 4, 1., seeded(0))]
    assert min(mixed) > 0.1 and max(mixed) < 0.9


def test_weights():
    parts = [torch.arange(3), torch.arange(1)]
    assert client_weights(parts).tolist() == [0.5, 0.5]
    assert client_weights(parts, "size").tolist() == [0.75, 0.25]


@pytest.mark.parametrize("call, message", [
    (lambda: shuffled_split(10, 0), "clients=0: a federation has at least one client"),
    (lambda: contiguous_split(3, 4), "clients=4: more clients than the 3 samples"),
    (lambda: sorted_split(torch.zeros(9), 3, 1.5), "similarity=1.5"),
    (lambda: dirichlet_split(torch.zeros(20), 2, 0.), "alpha=0.0: a concentration is positive"),
    (lambda: dirichlet_split(torch.zeros(20), 2, 1., minimum=11), "minimum=11: none of 1000 draws"),
    (lambda: client_weights([torch.arange(2), torch.arange(0)]), r"sizes \[2, 0\]"),
    (lambda: client_weights([torch.arange(2)], "count"), "kind='count': unknown"),
])
def test_errors_name_argument_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
