"""From scores to masks: the pools in which weights compete, and the one exact selection. A mask is True where kept.

Shapes: P = pools, G = groups in a pool (the entries that compete), O = out, I = in, N = entries of a flat pool.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Granularity(NamedTuple):
    """How scores ([O, I], or [G] of the neurons or heads of a layer) fall into pools [P, G], and back."""

    to_pools: Callable[[Tensor, int], Tensor]
    from_pools: Callable[[Tensor, torch.Size], Tensor]


GRANULARITIES: dict[str, Granularity] = {
    # all entries of a weight compete: [1, O * I]
    "layer": Granularity(lambda rows, size: rows.reshape(1, -1), lambda pools, shape: pools.reshape(shape)),
    # the entries of each output row compete: [O, I]
    "row": Granularity(lambda rows, size: rows, lambda pools, shape: pools),
    # M neighbours along the input dimension compete: [O * I / M, M]
    "n:m": Granularity(lambda rows, size: rows.reshape(-1, size), lambda pools, shape: pools.reshape(shape)),
    # the neurons, or the head groups, of a layer compete: [1, G]
    "neuron": Granularity(lambda scores, size: scores.reshape(1, -1), lambda pools, shape: pools.reshape(shape)),
    "head": Granularity(lambda scores, size: scores.reshape(1, -1), lambda pools, shape: pools.reshape(shape)),
}

# With global scope every weight keeps at least this share of what the uniform allocation would leave it, so that no
# layer is emptied: a network with one dead layer is dead, however good its other layers are.
GLOBAL_FLOOR = 0.1

_SMALL_POOL = 8  # up to this G, ranking by comparing all pairs is faster than a selection
_SAMPLE = 1 << 15  # entries that the threshold of a large flat pool is estimated from


@torch.no_grad()
def keep_top(scores: Tensor, num_keep: int, magnitudes: Tensor) -> Tensor:
    """
    Mask of the `num_keep` best entries of each pool. Ties go to the larger magnitude, then to the earlier position.

    Args:
        scores (`torch.Tensor` of shape [P, G]): fp32 without NaN; higher means keep.
        num_keep (`int`): entries kept in each pool, exactly.
        magnitudes (`torch.Tensor` of shape [P, G]): weights; their absolute values break ties.

    Returns:
        `torch.Tensor` of shape [P, G], bool.
    """
    if num_keep <= 0 or num_keep >= scores.shape[1]:
        return torch.full_like(scores, num_keep > 0, dtype=torch.bool)
    if scores.shape[0] == 1:
        return keep_top_jointly([scores], num_keep, [magnitudes])[0]
    if scores.shape[1] <= _SMALL_POOL:
        return _keep_top_by_rank(scores, num_keep, magnitudes)
    return _keep_top_by_row(scores, num_keep, magnitudes)


@torch.no_grad()
def keep_top_jointly(
    scores: Sequence[Tensor], num_keep: int, magnitudes: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """
    As `keep_top`, for one pool that is spread over several tensors, which are neither copied nor joined.

    Args:
        scores (`Sequence[torch.Tensor]`): fp32 without NaN, any shapes.
        num_keep (`int`): entries kept in all tensors together, exactly.
        magnitudes (`Sequence[torch.Tensor]`, *optional*): tensors of the same shapes; `None`: position breaks ties.
    """
    total = sum(score.numel() for score in scores)
    if num_keep <= 0 or num_keep >= total:
        return [torch.full_like(score, num_keep > 0, dtype=torch.bool) for score in scores]
    scores = [score.contiguous() for score in scores]
    low, high = _bracket(scores, num_keep)
    masks, inside, num_open = _between(scores, low, high, num_keep)
    if not 0 < num_open <= sum(map(len, inside)):  # the sample misled
        masks, inside, num_open = _between(scores, -math.inf, math.inf, num_keep)
    sizes = [len(part) for part in inside]

    def magnitudes_of(ties: Tensor) -> Tensor | None:
        if magnitudes is None:
            return None
        parts = [part[tie.to(part.device)] for part, tie in zip(inside, ties.split(sizes))]
        return _join([value.reshape(-1)[part].abs().float() for value, part in zip(magnitudes, parts)])

    values = _join([score.view(-1)[part] for score, part in zip(scores, inside)])
    kept = _keep_in_vector(values, num_open, magnitudes_of).split(sizes)
    for mask, part, chosen in zip(masks, inside, kept):
        mask.view(-1)[part] = chosen.to(mask.device)
    return masks


def select(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    sparsity: float,
    scope: str,
    n_of_m: tuple[int, int] | None = None,
    previous: Sequence[Tensor] | None = None,
    growth: Sequence[Tensor] | None = None,
    swap: float = 0.0,
) -> list[Tensor]:
    """
    The masks at `sparsity`. With scope "global" the tensors form one pool, else each tensor is pruned alone.

    Args:
        scores (`Sequence[torch.Tensor]`): [O, I] each, fp32; changed in place.
        weights (`Sequence[torch.Tensor]`): [O, I] each; break ties by magnitude.
        sparsity (`float`): fraction of zeros; each pool gets exactly `round(sparsity * G)`.
        scope (`str`): "layer", "row" or "global".
        n_of_m (`tuple[int, int]`, *optional*):
            zeros are taken only from the M - N worst entries of each group of M, so that a rising sparsity ends in
            the exact N:M pattern.
        previous (`Sequence[torch.Tensor]`, *optional*): masks whose zeros stay zeros, but for regrowth.
        growth (`Sequence[torch.Tensor]`, *optional*): [O, I] each: the score by which pruned entries come back.
        swap (`float`, *optional*, defaults to 0.0): share of the kept entries that come back by `growth`.
    """
    if previous is not None:
        for score, kept in zip(scores, previous):
            score.sub_(kept.float().reciprocal_().sub_(1))  # -inf where pruned; masked_fill_ takes three times as long
        if growth is not None and swap > 0:
            _put_first_what_comes_back_(scores, weights, sparsity, scope, previous, growth, swap)
    if n_of_m is not None:
        pools = GRANULARITIES["n:m"]
        for score, weight in zip(scores, weights):
            best = keep_top(pools.to_pools(score, n_of_m[1]), n_of_m[0], pools.to_pools(weight, n_of_m[1]))
            score.masked_fill_(pools.from_pools(best, score.shape), torch.inf)
    if scope == "global":
        return _select_globally(scores, weights, sparsity)
    sizes = [GRANULARITIES[scope].to_pools(score, 0).shape[1] for score in scores]
    return [
        _keep_in_pools(score, weight, scope, _kept(size, sparsity))
        for score, weight, size in zip(scores, weights, sizes)
    ]


def _put_first_what_comes_back_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    sparsity: float,
    scope: str,
    previous: Sequence[Tensor],
    growth: Sequence[Tensor],
    swap: float,
) -> None:
    """A share `swap` of each pool's kept entries, or all the pruned ones if fewer, are those of best growth."""
    for grown, kept in zip(growth, previous):
        grown.masked_fill_(kept, -torch.inf)
    if scope == "global":
        total = sum(kept.numel() for kept in previous)
        number = min(round(swap * _kept(total, sparsity)), total - _count(previous))
        back = keep_top_jointly(growth, number, weights)
    else:
        back = []
        for grown, weight, kept in zip(growth, weights, previous):
            pool = GRANULARITIES[scope].to_pools(kept, 0)
            number = min(round(swap * _kept(pool.shape[1], sparsity)), int((~pool).sum(dim=1).min()))
            back.append(_keep_in_pools(grown, weight, scope, number))
    for score, mask in zip(scores, back):
        # below the best N of each group, which are set to infinity
        score.masked_fill_(mask, torch.finfo(score.dtype).max)


def _kept(size: int, sparsity: float) -> int:
    return size - round(sparsity * size)


def _keep_in_pools(score: Tensor, weight: Tensor, scope: str, num_keep: int) -> Tensor:
    pools = GRANULARITIES[scope]
    return pools.from_pools(keep_top(pools.to_pools(score, 0), num_keep, pools.to_pools(weight, 0)), score.shape)


def _select_globally(scores: Sequence[Tensor], weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """All tensors are one pool, but one that falls below its floor gets its best entries first."""
    total = _kept(sum(score.numel() for score in scores), sparsity)
    floors = [math.ceil(GLOBAL_FLOOR * (1 - sparsity) * score.numel()) for score in scores]
    protected: set[int] = set()
    while True:
        masks = keep_top_jointly(scores, total, weights)
        starved = {index for index, mask in enumerate(masks) if _count([mask]) < floors[index]} - protected
        if not starved:
            return masks
        for index in starved:
            score, weight = scores[index], weights[index]
            best = keep_top(score.reshape(1, -1), floors[index], weight.reshape(1, -1)).reshape(score.shape)
            score.masked_fill_(best, torch.inf)
        protected |= starved


def _keep_top_by_rank(scores: Tensor, num_keep: int, magnitudes: Tensor) -> Tensor:
    """For few entries a pool: an entry is kept if fewer than `num_keep` others beat it. No sort, no sync."""
    columns, sizes = scores.T.contiguous(), magnitudes.abs().T.contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=scores.device)
    for first in range(columns.shape[0]):
        for second in range(first + 1, columns.shape[0]):
            wins = columns[first] > columns[second]
            wins |= (columns[first] == columns[second]) & (sizes[first] >= sizes[second])
            rank[second] += wins
            rank[first] += ~wins
    return (rank < num_keep).T.contiguous()


def _keep_top_by_row(scores: Tensor, num_keep: int, magnitudes: Tensor) -> Tensor:
    """For many pools of many entries: one selection a row; only rows with more ties than room are sorted."""
    threshold = scores.kthvalue(scores.shape[1] - num_keep + 1, dim=1, keepdim=True).values
    mask, ties = scores > threshold, scores == threshold
    num_open = num_keep - mask.sum(dim=1)
    crowded = (ties.sum(dim=1) > num_open).nonzero().squeeze(1)
    mask |= ties
    if crowded.numel():
        sizes = torch.where(ties[crowded], magnitudes[crowded].abs().float(), -1.0)
        order = sizes.argsort(dim=1, descending=True, stable=True)
        within = torch.arange(scores.shape[1], device=scores.device) < num_open[crowded].unsqueeze(1)
        kept = torch.zeros_like(within).scatter_(1, order, within)
        mask[crowded] = (scores[crowded] > threshold[crowded]) | kept
    return mask


def _bracket(scores: Sequence[Tensor], k: int) -> tuple[float, float]:
    """
    Bounds between which the k-th largest entry of all tensors together almost surely lies, from a sample.

    Only the entries between them need a selection: two cheap passes instead of a copy and a selection of everything.
    The tensors may be on several devices.
    """
    total = sum(score.numel() for score in scores)
    if total <= 4 * _SAMPLE:
        return -math.inf, math.inf
    stride = total // _SAMPLE | 1
    sample = _join([score.flatten()[::stride] for score in scores]).sort(descending=True).values
    center = k / total * sample.numel()
    margin = 4 * math.sqrt(max(1.0, center * (1 - k / total))) + 8
    high = float(sample[max(0, math.floor(center - margin))])
    return float(sample[min(sample.numel() - 1, math.ceil(center + margin))]), high


def _between(
    scores: Sequence[Tensor], low: float, high: float, num_keep: int
) -> tuple[list[Tensor], list[Tensor], int]:
    """(masks of the entries above, flat positions of those between the bounds, how many of these are kept)."""
    above = [score > high for score in scores]
    inside = [(score >= low).logical_xor_(mask).view(-1).nonzero().squeeze(1) for score, mask in zip(scores, above)]
    return above, inside, num_keep - _count(above)


def _keep_in_vector(values: Tensor, num_keep: int, magnitudes_of: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Mask of the `num_keep` largest of `values` [N]; ties go to the larger magnitude, then to the earlier one."""
    threshold = values.kthvalue(values.numel() - num_keep + 1).values
    kept, ties = values > threshold, values == threshold
    num_open = num_keep - int(kept.count_nonzero())
    if int(ties.count_nonzero()) == num_open:
        return kept | ties
    sizes = magnitudes_of(ties)
    if sizes is None:
        kept[ties.nonzero().squeeze(1)[:num_open]] = True
    else:
        kept[ties] = _keep_in_vector(sizes, num_open, lambda _: None)
    return kept


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.to(parts[0].device) for part in parts])


def _count(masks: Sequence[Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks)
