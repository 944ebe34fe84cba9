"""Tests of `mama_hf.criteria`."""

from typing import get_args

import pytest
import reference
import torch
from torch import Tensor, nn

from mama_hf import CRITERIA, MamaPruningConfig
from mama_hf.config import CriterionName, ScopeName
from mama_hf.criteria import score
from mama_hf.masks import select
from mama_hf.statistics import Statistics
from mama_hf.targets import find_targets


def statistics(name: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Random values of what a criterion needs, in the range of the real ones."""
    generator = torch.Generator().manual_seed(1)
    draws = {
        "gradient_square": torch.randn(shape, generator=generator).square(),
        "movement": torch.randn(shape, generator=generator),
        "taylor": torch.rand(shape, generator=generator),
        "fisher": torch.rand(shape, generator=generator),
        "initial_weight": torch.randn(shape, generator=generator),
        "input_norm": torch.rand(shape[1], generator=generator) * 10,
        "noise": torch.rand(shape, generator=generator),
    }
    return {key: draws[key] for key in CRITERIA[name].statistics}


def weights(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_names_are_those_of_the_recipe() -> None:
    assert set(CRITERIA) | {"sparsegpt"} == set(get_args(CriterionName))  # sparsegpt: only in prune_model
    assert {criterion.scope for criterion in CRITERIA.values()} <= set(get_args(ScopeName))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 5)])
@pytest.mark.parametrize("name", CRITERIA)
def test_equals_reference(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, given = weights(shape, dtype), statistics(name, shape)
    expected = reference.score(name, reference.array(weight), {k: reference.array(v) for k, v in given.items()})
    result = score(name, weight, given)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), torch.from_numpy(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"magnitude"}))
def test_differs_from_magnitude(name: str) -> None:
    weight = weights((16, 24))
    for scope in ("layer", "row"):
        mask, plain = (
            select([score(each, weight, statistics(each, (16, 24)))], [weight], 0.5, scope)[0]
            for each in (name, "magnitude")
        )
        assert float((mask ^ plain).float().mean()) > 0.05


@pytest.mark.parametrize("name", CRITERIA)
def test_inputs_are_not_changed(name: str) -> None:
    weight, given = weights((4, 6)), statistics(name, (4, 6))
    before = {key: value.clone() for key, value in given.items()}
    score(name, weight, given).fill_(7.0)
    assert torch.equal(weight, weights((4, 6)))
    assert all(torch.equal(given[key], before[key]) for key in given)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", sorted(name for name in CRITERIA if CRITERIA[name].statistics))
def test_scores_are_numbers(name: str, value: float) -> None:
    """NaN ranks lowest; and -inf is never a score, since it marks what is pruned already."""
    given = statistics(name, (4, 6))
    key = CRITERIA[name].statistics[0]
    given[key][..., 2] = value
    result = score(name, weights((4, 6)), given)
    assert bool(result.isfinite().all())
    others = torch.cat([result[:, :2], result[:, 3:]], dim=1)
    if value != value:
        assert float(result[:, 2].max()) < float(others.min())


@pytest.mark.parametrize("name", CRITERIA)
def test_its_statistics_are_collected(name: str) -> None:
    """What a criterion asks for is what `Statistics` knows by that name, for a plain and a transposed weight."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    targets = find_targets(model, MamaPruningConfig())
    collected = Statistics(targets, CRITERIA[name].statistics)
    assert set(collected.accumulators) == set(CRITERIA[name].statistics) - {"noise"}
    for index, target in enumerate(targets):
        given = {key: collected.read(key, index, None, step=1) for key in CRITERIA[name].statistics}
        assert score(name, target.weight, given).shape == target.weight.shape
