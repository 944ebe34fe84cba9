"""From entries to coupled groups and back: scores of groups, which of them stay, and the masks of their parameters.

A group's score is the sum of its entries' scores. All groups of a kind have as many entries, so that the mean would
rank them alike. Biases are not scored; they go with their group.

Shapes: G = groups of a layer, k = positions a group has in one parameter, C = chunks of `multiple_of` groups.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .coupling import CoupledGroups, Member
from .masks import GLOBAL_FLOOR, GRANULARITIES, keep_top


def members_of(group: CoupledGroups) -> tuple[Member, ...]:
    """All that the groups of a layer consist of."""
    return (*group.readers, *group.writers)


def group_sum(member: Member, entries: Tensor) -> Tensor:
    """The sum [G] of a tensor of the parameter's shape over what each group has in it."""
    lines = entries if entries.ndim == 1 else entries.sum(dim=1 - member.dim)
    return lines[member.index.to(lines.device)].sum(dim=1)


def alive(group: CoupledGroups) -> Tensor:
    """Bool [G]: which groups have an entry that is not zero, in a weight or a bias."""
    counts = [group_sum(member, (member.parameter.detach() != 0).float()) for member in members_of(group)]
    return torch.stack([count.to(counts[0].device) for count in counts]).sum(dim=0) > 0


def entry_mask(member: Member, kept: Tensor) -> Tensor:
    """The mask of a parameter, in its shape, of which groups are `kept` (bool [G]): a view that takes no memory."""
    shape = member.parameter.shape
    lines = torch.empty(shape[member.dim], dtype=torch.bool, device=member.parameter.device)
    lines[member.index.to(lines.device)] = kept.to(lines.device).unsqueeze(1)
    return lines.view([-1 if dim == member.dim else 1 for dim in range(len(shape))]).expand(shape)


def num_kept(num_groups: int, sparsity: float, multiple_of: int = 1) -> int:
    """Groups that stay of `num_groups`: all, or the nearest multiple (of two as near, the larger), but never none."""
    kept = num_groups - round(sparsity * num_groups)
    if kept == num_groups:
        return num_groups
    nearest = (2 * kept + multiple_of) // (2 * multiple_of) * multiple_of
    return min(num_groups, max(multiple_of, nearest))


@torch.no_grad()
def select_groups(
    scores: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    sparsity: float,
    scope: str,
    kind: str,
    multiple_of: int = 1,
    previous: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """
    Which groups of each layer stay at `sparsity`, as bool [G] each. At least one does in each layer.

    Args:
        scores (`Sequence[torch.Tensor]`): [G] of each layer, fp32 without NaN; higher means keep.
        magnitudes (`Sequence[torch.Tensor]`): [G] each; break ties.
        sparsity (`float`): fraction of groups that go: of each layer, or with scope "global" of all together.
        scope (`str`): "layer" or "global".
        kind (`str`): "neuron" or "head".
        multiple_of (`int`, *optional*, defaults to 1): what each layer keeps is a multiple of it.
        previous (`Sequence[torch.Tensor]`, *optional*): masks whose zeros stay zeros.
    """
    if previous is not None:
        scores = [score.masked_fill(~kept, -torch.inf) for score, kept in zip(scores, previous)]
    if scope == "global":
        counts = share_out(scores, sparsity, multiple_of)
    else:
        counts = [num_kept(len(score), sparsity, multiple_of) for score in scores]
    pools = GRANULARITIES[kind]
    return [
        pools.from_pools(keep_top(pools.to_pools(score, 0), count, pools.to_pools(size, 0)), score.shape)
        for score, size, count in zip(scores, magnitudes, counts)
    ]


def share_out(scores: Sequence[Tensor], sparsity: float, multiple_of: int) -> list[int]:
    """
    How many groups each layer keeps when all compete, given the scores [G] of each.

    What competes are chunks of `multiple_of` groups, in the order of the scores within their layer, by their mean.
    The best ones of each layer are safe, up to a tenth of what the uniform allocation would leave it.
    """
    layers, values, sizes = [], [], []
    for layer, score in enumerate(scores):
        chunks = score.sort(descending=True).values.cpu().split(multiple_of)
        safe = math.ceil(max(1, GLOBAL_FLOOR * (1 - sparsity) * len(score)) / multiple_of)
        values += [math.inf if place < safe else float(chunk.mean()) for place, chunk in enumerate(chunks)]
        sizes += [len(chunk) for chunk in chunks]
        layers += [layer] * len(chunks)
    left = num_kept(sum(sizes), sparsity, multiple_of)
    counts = [0] * len(scores)
    for chunk in sorted(range(len(values)), key=lambda place: -values[place]):
        if values[chunk] == math.inf or sizes[chunk] <= left:
            counts[layers[chunk]] += sizes[chunk]
            left -= sizes[chunk]
    return counts
