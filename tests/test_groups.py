"""Coupled groups as units: counts, selection against a naive reference, masks of their parameters."""

import math

import pytest
import torch
from families import FAMILY_MODELS, make_family
from torch import Tensor

from mama_hf.coupling import find_coupled_groups
from mama_hf.groups import alive, entry_mask, group_sum, members_of, num_kept, select_groups


def naive_selection(scores: list[Tensor], sparsity: float, multiple: int) -> list[set[int]]:
    """Global scope: chunks taken one at a time, from a list of all of them, after each layer's safe ones."""
    total = num_kept(sum(map(len, scores)), sparsity, multiple)
    kept: list[set[int]] = [set() for _ in scores]
    chunks = []
    for layer, score in enumerate(scores):
        order = sorted(range(len(score)), key=lambda group, score=score: -float(score[group]))
        parts = [order[start : start + multiple] for start in range(0, len(order), multiple)]
        safe = math.ceil(max(1, 0.1 * (1 - sparsity) * len(score)) / multiple)
        for place, part in enumerate(parts):
            if place < safe:
                kept[layer] |= set(part)
            else:
                chunks.append((sum(float(score[group]) for group in part) / len(part), layer, part))
    for _, layer, part in sorted(chunks, key=lambda chunk: -chunk[0]):
        if sum(map(len, kept)) + len(part) <= total:
            kept[layer] |= set(part)
    return kept


@pytest.mark.parametrize(
    ("size", "sparsity", "multiple", "expected"),
    [
        (1536, 0.25, 8, 1152),
        (24, 0.5, 8, 16),  # 12 is as near to 8 as to 16: more stays
        (24, 0.6, 8, 8),
        (24, 0.99, 8, 8),  # never none
        (24, 0.0, 16, 24),
        (100, 0.03, 8, 96),
        (3, 0.25, 1, 2),
        (1, 0.9, 1, 1),
        (4, 0.9, 8, 4),
    ],
)
def test_num_kept(size: int, sparsity: float, multiple: int, expected: int) -> None:
    assert num_kept(size, sparsity, multiple) == expected


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_masks_and_sums_are_those_of_the_positions(name: str) -> None:
    for group in find_coupled_groups(make_family(name), "neuron+head"):
        kept = torch.rand(group.num_groups, generator=torch.Generator().manual_seed(group.layer)) > 0.5
        for member in members_of(group):
            mask = entry_mask(member, kept)
            assert mask.shape == member.parameter.shape
            sums = group_sum(member, member.parameter.detach())
            for number in range(group.num_groups):
                part = member.parameter.detach().index_select(member.dim, member.index[number])
                torch.testing.assert_close(sums[number], part.sum())
                assert (mask.index_select(member.dim, member.index[number]) == kept[number]).all()


def test_a_bias_keeps_a_group_alive() -> None:
    (group, _) = find_coupled_groups(make_family("llama"), "neuron")
    with torch.no_grad():
        for member in members_of(group):
            member.parameter.mul_(entry_mask(member, torch.arange(24) >= 5))
        assert alive(group).tolist() == [False] * 5 + [True] * 19
        next(member for member in group.readers if member.name.endswith("bias")).parameter[2] = 1.0
    assert alive(group).tolist() == [False, False, True, False, False] + [True] * 19


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_global_selection_equals_the_naive_one(sparsity: float, multiple: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(size, generator=generator) * scale for size, scale in ((24, 1.0), (24, 0.1), (16, 2.0))]
    masks = select_groups(scores, scores, sparsity, "global", "neuron", multiple)
    assert [set(mask.nonzero().flatten().tolist()) for mask in masks] == naive_selection(scores, sparsity, multiple)
    assert sum(int(mask.sum()) for mask in masks) == num_kept(64, sparsity, multiple)
    assert all(int(mask.sum()) % multiple == 0 for mask in masks)
    assert all(mask.any() for mask in masks)


def test_layer_selection_keeps_the_best_and_never_brings_back() -> None:
    score, size = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 9.0, 1.0, 1.0])
    (mask,) = select_groups([score], [size], 0.5, "layer", "head")
    assert mask.tolist() == [True, False, False, True, False, True]  # magnitude breaks the tie
    previous = torch.tensor([True, True, True, True, True, False])
    (mask,) = select_groups([score], [size], 0.5, "layer", "head", previous=[previous])
    assert mask.tolist() == [True, False, True, True, False, False]
