"""What a recipe does to one layer of which the inputs' moments are known: the mask, the values and their errors.

Shapes: O = out, I = in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MamaPruningConfig
from .criteria import score
from .masks import select
from .solvers import Inputs, Moments, admm, better_rows, bias_change, least_squares, move_mean, ridge_for, sparsegpt


DEFAULT_ITERATIONS = 14

# scope where the recipe leaves it open, and there is no training
_SCOPES = {"magnitude": "layer", "random": "layer", "wanda": "row", "mama": "row", "sparsegpt": "layer"}


@dataclass
class Pruned:
    """
    Args:
        values (`torch.Tensor` of shape [O, I]): fp32, but exact in the weight's own dtype; zero where pruned.
        mask (`torch.Tensor`): bool, of the units that compete: the entries [O, I], or groups.
        error_before (`float`): relative squared output error with the kept weights as they were.
        error_after (`float`): the same after moving.
        bias (`torch.Tensor` of shape [O], *optional*): what is added to the bias.
    """

    values: Tensor
    mask: Tensor
    error_before: float
    error_after: float
    bias: Tensor | None = None


def is_joint(config: MamaPruningConfig) -> bool:
    """Whether mask and values are chosen together (ADMM)."""
    return config.criterion == "mama" and config.move_values == "least_squares"


def scope_of(config: MamaPruningConfig) -> str:
    """The scope in one-shot pruning."""
    return "layer" if config.n_of_m else config.scope or _SCOPES[config.criterion]


@torch.no_grad()
def prune_layer(
    config: MamaPruningConfig,
    weight: Tensor,
    dtype: torch.dtype,
    inputs: Inputs,
    moments: Moments,
    sparsity: float,
    iterations: int,
    seed: int,
) -> Pruned:
    """
    Prune one weight [O, I] (fp32 rows).

    Args:
        dtype (`torch.dtype`): in which the values will be stored; they are rounded once.
        inputs (`Inputs`): finished.
        moments (`Moments`): the target, on these inputs.
        sparsity (`float`): of this layer.
        iterations (`int`): steps of ADMM, or of conjugate gradients where the mask is given.
        seed (`int`): of the "random" criterion.
    """
    if config.criterion == "sparsegpt":
        moved, mask = sparsegpt(weight, inputs.gram, sparsity, scope_of(config), config.n_of_m)
    elif is_joint(config):
        system = inputs.system(ridge_for(sparsity))
        sizes = weight * system.scale

        def choose(scores: Tensor, share: float) -> Tensor:
            return select([scores], [sizes], sparsity * share, scope_of(config), config.n_of_m)[0]

        moved, mask = admm(weight, moments, choose, iterations, iterations // 2, system)
    else:
        scores = _score(config, weight, inputs.gram, seed)
        mask = select([scores], [weight], sparsity, scope_of(config), config.n_of_m)[0]
        moved = _move(config, weight, mask, inputs, moments, sparsity, iterations)
    return finish(config, weight, moved.to(dtype).float(), mask, inputs, moments)


def _score(config: MamaPruningConfig, weight: Tensor, gram: Tensor, seed: int) -> Tensor:
    if config.criterion == "random":
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
        return score("random", weight, {"noise": noise})
    if config.criterion == "magnitude":
        return score("magnitude", weight, {})
    # without gradients, the movement of "mama" is how strongly the input drives the weight: Wanda's score
    return score("wanda", weight, {"input_norm": gram.diagonal().sqrt()})


def _move(
    config: MamaPruningConfig,
    weight: Tensor,
    mask: Tensor,
    inputs: Inputs,
    moments: Moments,
    sparsity: float,
    iterations: int,
) -> Tensor:
    if config.move_values == "mean":
        return move_mean(weight, mask)
    if config.move_values == "least_squares":
        return least_squares(weight, mask, moments, iterations, inputs.system(ridge_for(sparsity)))
    return weight * mask


def finish(
    config: MamaPruningConfig, weight: Tensor, moved: Tensor, mask: Tensor, inputs: Inputs, moments: Moments
) -> Pruned:
    """Keep, row by row, the better of the moved and the unmoved values (SparseGPT stays as published)."""
    masked = weight * mask
    before = moments.relative_error(masked)
    if config.move_values == "bias":
        change = bias_change(weight, mask, inputs.mean)
        # the errors' mean goes: sum (e - mean e)^2 = sum e^2 - T (mean e)^2
        gain = moments.relative(inputs.num_tokens * change.double().square().sum())
        return Pruned(masked, mask, before, max(0.0, before - gain), change)
    if config.criterion == "sparsegpt":
        return Pruned(moved, mask, before, moments.relative_error(moved))
    if config.move_values == "none":
        return Pruned(masked, mask, before, before)
    values, gains = better_rows(masked, moved, moments)
    return Pruned(values, mask, before, max(0.0, before - moments.relative(gains.sum())))
