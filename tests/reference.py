"""Naive versions of what the package computes: loops over single entries, sharing no code with it.

Weights, scores and masks are numpy arrays [O, I]; a mask is True where kept.
"""

import math

import numpy as np
import torch


FLOOR = 0.1  # with global scope: share of the uniform allocation that each tensor keeps


def array(tensor: torch.Tensor) -> np.ndarray:
    """Any tensor in float64, so that fp32 and bf16 values are exact."""
    return tensor.detach().double().numpy()


# Scores. Each takes the values of one entry.


def magnitude(w: float) -> float:
    return abs(w)


def movement(w: float, movement: float) -> float:
    return movement


def displacement(w: float, initial_weight: float) -> float:
    return abs(w - initial_weight)


def taylor(w: float, taylor: float) -> float:
    return taylor


def fisher(w: float, fisher: float) -> float:
    return fisher


def wanda(w: float, input_norm: float) -> float:
    return abs(w) * input_norm


def random(w: float, noise: float) -> float:
    return noise


def mama(w: float, gradient_square: float) -> float:
    return abs(w) * math.sqrt(math.sqrt(gradient_square))


def score(name: str, weight: np.ndarray, statistics: dict[str, np.ndarray]) -> np.ndarray:
    """The scores of a weight [O, I]; a statistic [I] holds for each row."""
    statistics = {key: np.broadcast_to(value, weight.shape) for key, value in statistics.items()}
    scores = np.empty(weight.shape)
    for position in np.ndindex(weight.shape):
        scores[position] = globals()[name](
            weight[position], **{key: value[position] for key, value in statistics.items()}
        )
    return scores


# Selection.


def best_first(scores: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Positions by falling score, then falling magnitude, then rising position."""
    return np.lexsort((np.arange(scores.size), -np.abs(magnitudes), -scores))


def keep_top(scores: np.ndarray, num_keep: int, magnitudes: np.ndarray) -> np.ndarray:
    """Mask of the best `num_keep` entries of one pool [G]."""
    mask = np.zeros(scores.size, dtype=bool)
    mask[best_first(scores, magnitudes)[: max(0, num_keep)]] = True
    return mask


def num_kept(size: int, sparsity: float) -> int:
    return size - round(sparsity * size)


def select_layer(scores: list[np.ndarray], weights: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    return [
        keep_top(score.ravel(), num_kept(score.size, sparsity), weight.ravel()).reshape(score.shape)
        for score, weight in zip(scores, weights)
    ]


def select_row(scores: list[np.ndarray], weights: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    masks = []
    for score, weight in zip(scores, weights):
        rows = [keep_top(one, num_kept(one.size, sparsity), other) for one, other in zip(score, weight)]
        masks.append(np.array(rows))
    return masks


def select_global(scores: list[np.ndarray], weights: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """One pool; a tensor that is left with less than its floor gets its best entries first, and all compete again."""
    sizes = [score.size for score in scores]
    kept = num_kept(sum(sizes), sparsity)
    flat_scores = [score.astype(np.float64).ravel() for score in scores]
    flat_weights = [weight.ravel() for weight in weights]
    floors = [math.ceil(FLOOR * (1 - sparsity) * size) for size in sizes]
    protected: set[int] = set()
    while True:
        for index in protected:
            order = best_first(scores[index].ravel(), flat_weights[index])
            flat_scores[index][order[: floors[index]]] = np.inf
        mask = keep_top(np.concatenate(flat_scores), kept, np.concatenate(flat_weights))
        parts = np.split(mask, np.cumsum(sizes)[:-1])
        starved = {index for index, part in enumerate(parts) if part.sum() < floors[index]} - protected
        if not starved:
            return [part.reshape(score.shape) for part, score in zip(parts, scores)]
        protected |= starved


def select_n_of_m(
    scores: list[np.ndarray], weights: list[np.ndarray], sparsity: float, kept: int, group: int
) -> list[np.ndarray]:
    """In each tensor, the `round(sparsity * size)` worst of those that are not among the best N of their group."""
    masks = []
    for score, weight in zip(scores, weights):
        flat_score, flat_weight = score.ravel(), weight.ravel()
        mask = np.ones(score.size, dtype=bool)
        candidates: list[int] = []
        for first in range(0, score.size, group):
            members = slice(first, first + group)
            candidates += [first + i for i in best_first(flat_score[members], flat_weight[members])[kept:]]
        candidates.sort()
        worst_last = best_first(flat_score[candidates], flat_weight[candidates])
        for i in worst_last[::-1][: round(sparsity * score.size)]:
            mask[candidates[i]] = False
        masks.append(mask.reshape(score.shape))
    return masks


def select(
    scores: list[np.ndarray],
    weights: list[np.ndarray],
    sparsity: float,
    scope: str,
    n_of_m: tuple[int, int] | None = None,
    previous: list[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Masks at `sparsity`; what is zero in `previous` loses to everything else, so that it stays zero."""
    if previous is not None:
        scores = [np.where(kept, score, -np.inf) for score, kept in zip(scores, previous)]
    if n_of_m is not None:
        return select_n_of_m(scores, weights, sparsity, *n_of_m)
    return {"layer": select_layer, "row": select_row, "global": select_global}[scope](scores, weights, sparsity)


def select_with_regrowth(
    score: np.ndarray, weight: np.ndarray, sparsity: float, previous: np.ndarray, growth: np.ndarray, swap: float
) -> np.ndarray:
    """One pool [G]: `swap` of the kept entries are pruned ones that come back by growth, as far as there are any."""
    dead, alive = np.flatnonzero(~previous), np.flatnonzero(previous)
    kept = num_kept(score.size, sparsity)
    num_back = min(round(swap * kept), dead.size)
    mask = np.zeros(score.size, dtype=bool)
    mask[dead[best_first(growth[dead], weight[dead])[:num_back]]] = True
    mask[alive[best_first(score[alive], weight[alive])[: kept - num_back]]] = True
    return mask


# Schedule.


def sparsity(shape: str, step: int, start: int, end: int, initial: float, final: float) -> float:
    if step < start:
        return 0.0
    if step >= end or shape == "one-shot":
        return final
    left = (end - step) / (end - start)
    return final + (initial - final) * (left**3 if shape == "cubic" else left)


# Statistics. `gradients` and `weights` hold, for each step, an array for each target.


def normalised(gradients: list[np.ndarray]) -> list[np.ndarray] | None:
    """The gradients of a step over their common norm; `None` for a step that does not count."""
    total = 0.0
    for gradient in gradients:
        for entry in gradient.ravel():
            total += entry * entry
    if not math.isfinite(total) or total == 0:
        return None
    return [gradient / math.sqrt(total) for gradient in gradients]


def statistic(
    name: str, gradients: list[list[np.ndarray]], weights: list[list[np.ndarray]], decay: float | None
) -> list[np.ndarray]:
    """A gradient statistic of each target after all steps: a moving average with `decay`, a sum without."""
    result = [np.zeros_like(weight) for weight in weights[0]]
    for step, step_gradients in enumerate(gradients):
        scaled = normalised(step_gradients)
        if scaled is None:
            continue
        for index, total in enumerate(result):
            for position in np.ndindex(total.shape):
                g, w = scaled[index][position], weights[step][index][position]
                value = {"gradient_square": g * g, "movement": -g * w, "taylor": abs(g * w), "fisher": (g * w) ** 2}
                if decay is None:
                    total[position] += value[name]
                else:
                    total[position] = decay * total[position] + (1 - decay) * value[name]
    return result


def input_norm(batches: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """L2 norm of each input feature over the tokens of all batches (inputs [B, T, I], mask [B, T]) with mask 1."""
    total = np.zeros(batches[0][0].shape[-1])
    for inputs, mask in batches:
        for row, position in np.ndindex(mask.shape):
            if mask[row, position]:
                total += inputs[row, position] ** 2
    return np.sqrt(total)
