"""How sparsity is shared among blocks: pure functions of their scores."""

from collections.abc import Iterable, Sequence

from torch import Tensor


OUTLIER_FACTOR = 5.0  # an outlier's score is above this multiple of its weight's mean (OWL's M)
OWL_RANGE = 0.08  # a block's sparsity differs from the mean by at most this much (OWL's lambda)


def outlier_ratio(scores: Iterable[Tensor]) -> float:
    """Share of the entries of a block's weights whose score |w| ||x|| is above 5 times its weight's mean."""
    outliers = total = 0
    for score in scores:
        outliers += int((score > OUTLIER_FACTOR * score.mean()).count_nonzero())
        total += score.numel()
    return outliers / max(1, total)


def owl_sparsities(ratios: Sequence[float], sparsity: float) -> list[float]:
    """
    OWL (Yin et al. 2023, arXiv 2310.05175): blocks with more outliers are pruned less, by at most `OWL_RANGE`.

    Args:
        ratios (`Sequence[float]`): each block's `outlier_ratio`.
        sparsity (`float`): the mean of the result.
    """
    low, high = min(ratios), max(ratios)
    if high == low:
        return [sparsity] * len(ratios)
    width = min(OWL_RANGE, sparsity / 2, (1 - sparsity) / 2)
    kept = [(ratio - low) / (high - low) * 2 * width for ratio in ratios]
    mean = sum(kept) / len(kept)
    return [sparsity + mean - value for value in kept]
