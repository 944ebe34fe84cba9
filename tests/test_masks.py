"""Tests of `mama_hf.masks`: every mask equals the naive one in `reference.py`, entry for entry."""

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from mama_hf import GRANULARITIES, masks
from mama_hf.masks import keep_top, keep_top_jointly, select


SHAPES = [(1, 1), (1, 7), (3, 5), (8, 8), (5, 9), (16, 1), (2, 33), (7, 64)]
PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 5)]
KINDS = ["distinct", "ties", "equal scores", "all equal", "infinite", "all lowest"]


def draw(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(scores, weights) of a shape; the kinds differ in how many of them tie."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    weights = torch.randn(shape, generator=generator)
    if kind == "ties":
        scores, weights = scores.round(), weights.mul(2).round()
    elif kind in ("equal scores", "all lowest"):
        scores, weights = torch.full(shape, -torch.inf if kind == "all lowest" else 0.5), weights.mul(2).round()
    elif kind == "all equal":
        scores, weights = torch.ones(shape), torch.full(shape, -0.25)
    elif kind in ("infinite", "extreme"):
        limit = torch.inf if kind == "infinite" else torch.finfo(torch.float32).max
        scores[scores > 0.5], scores[scores < -0.5] = limit, -limit
    return scores, weights.to(dtype)


def arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [reference.array(tensor) for tensor in tensors]


def assert_equal(masks: list[Tensor], expected: list[np.ndarray]) -> None:
    assert [mask.dtype for mask in masks] == [torch.bool] * len(expected)
    assert [mask.tolist() for mask in masks] == [mask.tolist() for mask in expected]


def num_zeros(masks: list[Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks)


@contextmanager
def no_hang(seconds: int = 3) -> Iterator[None]:
    """Turns an endless loop into a failure."""

    def stop(*_: object) -> None:
        raise AssertionError("the selection does not end")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_keep_top(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    scores, weights = draw(shape, kind, dtype)
    for num_keep in {0, 1, shape[1] // 3, shape[1] // 2, shape[1] - 1, shape[1], shape[1] + 1}:
        expected = [reference.keep_top(one, num_keep, w) for one, w in zip(*arrays([scores, weights]))]
        assert_equal([keep_top(scores, num_keep, weights)], [np.array(expected)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_keep_top_jointly(kind: str, dtype: torch.dtype) -> None:
    pairs = [draw(shape, kind, dtype, seed) for seed, shape in enumerate(SHAPES)]
    scores, weights = [list(part) for part in zip(*pairs)]
    flat_scores, flat_weights = (np.concatenate([a.ravel() for a in arrays(part)]) for part in (scores, weights))
    for num_keep in (-1, 0, 1, 100, 300, flat_scores.size - 1, flat_scores.size, flat_scores.size + 1):
        flat = torch.cat([mask.flatten() for mask in keep_top_jointly(scores, num_keep, weights)])
        assert_equal([flat], [reference.keep_top(flat_scores, num_keep, flat_weights)])


def test_without_magnitudes_position_breaks_ties() -> None:
    first, second = keep_top_jointly([torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0], [2.0]])], 3)
    assert (first.tolist(), second.tolist()) == ([True, False, True], [[False], [True]])


def test_inputs_are_not_changed() -> None:
    scores, weights = draw((6, 12), "ties")
    before = scores.clone(), weights.clone()
    keep_top(scores, 5, weights)
    keep_top_jointly([scores], 20, [weights])
    assert torch.equal(scores, before[0])
    assert torch.equal(weights, before[1])


# Pools that are large enough for the sampled bracket.


def large(kind: str, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores, weights = torch.rand(size, generator=generator), torch.randn(size, generator=generator)
    if kind == "constant":
        scores.fill_(0.25)
    elif kind == "ascending":
        scores = torch.arange(size, dtype=torch.float32)
    elif kind == "descending":
        scores = torch.arange(size, 0, -1, dtype=torch.float32)
    elif kind == "two values":
        scores = (scores < 0.3).float()
    elif kind == "few values":
        scores, weights = (scores * 50).round(), weights.round()
    elif kind == "sample sees the best":  # the sample takes each `stride`-th entry
        scores[:: size // masks._SAMPLE | 1] += 5
    elif kind == "sample sees the worst":
        scores[:: size // masks._SAMPLE | 1] -= 5
    elif kind == "mostly pruned":
        scores[scores < 0.9] = -torch.inf
    elif kind == "one outlier":
        scores.fill_(0.0)[size // 2 + 1] = 1.0
    return scores, weights


LARGE = [
    *("random", "constant", "ascending", "descending", "two values", "few values"),
    *("sample sees the best", "sample sees the worst", "mostly pruned", "one outlier"),
]


def check_large(kind: str, size: int, shares: tuple[float, ...]) -> None:
    scores, weights = large(kind, size)
    order = reference.best_first(scores.numpy(), weights.numpy())
    for share in shares:
        num_keep = min(size - 1, max(1, round(share * size)))
        expected = np.zeros(size, dtype=bool)
        expected[order[:num_keep]] = True
        parts = [size // 7, size // 3, size - size // 7 - size // 3]
        chosen = torch.cat(keep_top_jointly(scores.split(parts), num_keep, weights.split(parts)))
        assert np.array_equal(chosen.numpy(), expected), num_keep


@pytest.mark.parametrize("size", [1025, 4999])
@pytest.mark.parametrize("kind", LARGE)
def test_sampled_bracket(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_SAMPLE", 256)
    check_large(kind, size, (0.0, 0.001, 0.1, 0.3, 0.5, 0.501, 0.9, 0.999, 1.0))


@pytest.mark.parametrize("kind", ["random", "constant", "ascending", "two values", "sample sees the best"])
def test_sampled_bracket_at_its_real_size(kind: str) -> None:
    size = (1 << 20) + 3
    assert size > 4 * masks._SAMPLE
    check_large(kind, size, (0.3,))


def test_the_bracket_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection proper sees a small part of a large pool."""
    sizes = []
    kthvalue = Tensor.kthvalue
    monkeypatch.setattr(Tensor, "kthvalue", lambda self, *args: sizes.append(self.numel()) or kthvalue(self, *args))
    scores, weights = large("random", 4 * masks._SAMPLE + 1)
    keep_top_jointly([scores], 10_000, [weights])
    assert 0 < max(sizes) < masks._SAMPLE // 4


# Selection at a sparsity.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal", "extreme"])
@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9, 0.99])
def test_select(sparsity: float, scope: str, kind: str, dtype: torch.dtype) -> None:
    pairs = [draw(shape, kind, dtype, seed) for seed, shape in enumerate([(8, 8), (5, 9), (2, 33), (7, 64)])]
    scores, weights = [list(part) for part in zip(*pairs)]
    expected = reference.select(arrays(scores), arrays(weights), sparsity, scope)
    assert_equal(select(scores, weights, sparsity, scope), expected)


def test_scopes_differ() -> None:
    scores, weights = zip(*[draw((6, 10), "distinct", seed=seed) for seed in range(2)])
    chosen = [
        torch.cat(select([one * (1 + i) for i, one in enumerate(scores)], weights, 0.5, scope)).tolist()
        for scope in ("layer", "row", "global")
    ]
    assert all(one != other for one, other in itertools.combinations(chosen, 2))


@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal", "extreme"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("n_of_m", PATTERNS)
def test_n_of_m(n_of_m: tuple[int, int], share: float, kind: str) -> None:
    kept, group = n_of_m
    sparsity = share * (1 - kept / group)
    scores, weights = [list(part) for part in zip(*[draw((6, 40), kind, seed=seed) for seed in range(2)])]
    expected = reference.select(arrays(scores), arrays(weights), sparsity, "layer", n_of_m)
    chosen = select(scores, weights, sparsity, "layer", n_of_m)
    assert_equal(chosen, expected)
    for mask in chosen:
        in_group = mask.reshape(-1, group).sum(dim=1)
        assert int(in_group.min()) >= kept
        assert share < 1 or bool((in_group == kept).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize(
    ("scope", "n_of_m"), [("layer", None), ("row", None), ("global", None), *[("layer", pair) for pair in PATTERNS]]
)
def test_ramp_never_regrows(scope: str, n_of_m: tuple[int, int] | None, kind: str, dtype: torch.dtype) -> None:
    final = 0.9 if n_of_m is None else 1 - n_of_m[0] / n_of_m[1]
    _, weights = [list(part) for part in zip(*[draw((6, 40), kind, dtype, seed) for seed in range(2)])]
    previous = None
    for step in range(1, 9):
        scores = [draw((6, 40), kind, seed=10 * step + index)[0] for index in range(2)]
        masked = None if previous is None else [mask.numpy() for mask in previous]
        expected = reference.select(arrays(scores), arrays(weights), final * step / 8, scope, n_of_m, masked)
        chosen = select(scores, weights, final * step / 8, scope, n_of_m, previous)
        assert_equal(chosen, expected)
        assert previous is None or not any(bool((new & ~old).any()) for new, old in zip(chosen, previous))
        weights = [weight * mask for weight, mask in zip(weights, chosen)]
        previous = chosen


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_pruned_entries_lose_to_every_live_one(scope: str) -> None:
    """Even where a live entry has the lowest finite score and the value 0."""
    previous = [torch.tensor([[False, True, False, True], [True, False, True, False]])]
    scores = [torch.full((2, 4), torch.finfo(torch.float32).min)]
    chosen = select(scores, [torch.zeros(2, 4)], 0.5, scope, previous=previous)
    assert torch.equal(chosen[0], previous[0])


# Regrowth.


@pytest.mark.parametrize("swap", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("pruned", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_regrowth(scope: str, pruned: float, swap: float) -> None:
    """Also where fewer entries are pruned than could come back: the count stays exact."""
    scores, weights = [list(part) for part in zip(*[draw((6, 50), "distinct", seed=seed) for seed in range(2)])]
    growth = [draw((6, 50), "distinct", seed=5 + seed)[0] for seed in range(2)]
    previous = select([score.clone() for score in scores], weights, pruned, scope)
    parts = [arrays(part) for part in (scores, weights, growth)] + [[mask.numpy() for mask in previous]]
    if scope == "global":
        pools = [[np.concatenate(part).ravel()] for part in parts]
    elif scope == "layer":
        pools = [[tensor.ravel() for tensor in part] for part in parts]
    else:
        pools = [[row for tensor in part for row in tensor] for part in parts]
    expected = [
        reference.select_with_regrowth(score, weight, pruned + 0.1, kept, grown, swap)
        for score, weight, grown, kept in zip(*pools)
    ]
    with no_hang():
        chosen = select(scores, weights, pruned + 0.1, scope, previous=previous, growth=growth, swap=swap)
    assert torch.cat(chosen).flatten().tolist() == np.concatenate(expected).tolist()


def test_no_swap_is_no_regrowth() -> None:
    scores, weights = draw((6, 50), "distinct")
    previous = select([scores.clone()], [weights], 0.4, "layer")
    plain, same = (
        select([scores.clone()], [weights], 0.5, "layer", previous=previous, growth=growth, swap=0.0)
        for growth in (None, [torch.rand(6, 50)])
    )
    assert torch.equal(plain[0], same[0])
    assert not bool((same[0] & ~previous[0]).any())


@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 4)])
def test_regrowth_keeps_to_the_pattern(n_of_m: tuple[int, int]) -> None:
    """While entries come back, no group of M falls below N; and none comes back at the last update."""
    kept, group = n_of_m
    final, previous = 1 - kept / group, None
    for step in range(1, 11):
        scores, weights = draw((6, 40), "distinct", seed=step)
        sparsity, swap = final * (1 - (1 - step / 10) ** 3), 0.3 * (1 - step / 10)
        growth = [draw((6, 40), "distinct", seed=50 + step)[0]]
        chosen = select([scores], [weights], sparsity, "layer", n_of_m, previous, growth, swap)
        in_group = chosen[0].reshape(-1, group).sum(dim=1)
        assert num_zeros(chosen) == round(sparsity * 240)
        assert int(in_group.min()) >= kept
        previous, before = chosen, previous
    assert bool((in_group == kept).all())
    assert before is not None
    assert not bool((previous[0] & ~before[0]).any())


def test_regrowth_into_one_group_takes_no_place_of_another() -> None:
    """Three grow in the first group, which keeps one: the others can't push out what came back elsewhere before."""
    previous = [torch.eye(4, dtype=torch.bool).repeat(1, 4)[:1]]  # 1:4, the first of each group
    growth = [-torch.arange(16.0).reshape(1, 16)]
    chosen = select([torch.ones(1, 16)], [torch.zeros(1, 16)], 0.75, "layer", (1, 4), previous, growth, swap=0.75)
    assert chosen[0].reshape(4, 4).sum(dim=1).tolist() == [1, 1, 1, 1]
    assert int((chosen[0] & ~previous[0]).sum()) == 1


# The floor of the global scope.


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_global_scope_empties_no_layer(sparsity: float) -> None:
    scores = [torch.rand(20, 30), torch.rand(20, 30) * 1e-6, torch.rand(10, 30) * 1e-3, torch.rand(50, 60)]
    weights = [torch.randn_like(score) for score in scores]
    expected = reference.select(arrays(scores), arrays(weights), sparsity, "global")
    chosen = select(scores, weights, sparsity, "global")
    assert_equal(chosen, expected)
    total = sum(score.numel() for score in scores)
    assert num_zeros(chosen) == round(sparsity * total)
    assert all(int(mask.sum()) >= reference.FLOOR * (1 - sparsity) * mask.numel() for mask in chosen)
    assert int(chosen[1].sum()) < 0.5 * (1 - sparsity) * chosen[1].numel()  # the floor binds: uniform would keep more


def test_global_scope_with_fewer_entries_than_layers() -> None:
    scores = [torch.rand(4, 4) * 10.0**-index for index in range(10)]
    with no_hang():
        chosen = select([score.clone() for score in scores], scores, 0.97, "global")
    assert sum(int(mask.sum()) for mask in chosen) == 160 - round(0.97 * 160) == 5


def test_granularities_invert() -> None:
    rows = torch.arange(24.0).reshape(3, 8)
    shapes = {"layer": (1, 24), "row": (3, 8), "n:m": (6, 4), "neuron": (1, 24), "head": (1, 24)}
    assert set(GRANULARITIES) == set(shapes)
    for name, granularity in GRANULARITIES.items():
        pools = granularity.to_pools(rows, 4)
        assert tuple(pools.shape) == shapes[name]
        assert torch.equal(granularity.from_pools(pools, rows.shape), rows)
