"""What a weight is worth. A score is fp32, in the weight's own shape; higher means keep.

A new criterion is one function here and one line in `CRITERIA` (and its name in `config.CriterionName`).

Symbols: w the weight, w0 its value before training, g the gradient of the loss at an optimizer step, x its input.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Criterion(NamedTuple):
    """
    Args:
        score (`Callable`): (weight, \\*\\*statistics) -> score, all fp32 in the weight's shape; a new tensor.
        statistics (`tuple[str, ...]`): what the function takes beside the weight; only that is collected.
        scope (`str`): the scope used when the recipe leaves it open.
    """

    score: Callable[..., Tensor]
    statistics: tuple[str, ...] = ()
    scope: str = "layer"


def magnitude(weight: Tensor) -> Tensor:
    """|w|."""
    return weight.abs()


def movement(weight: Tensor, movement: Tensor) -> Tensor:
    """-sum_t g_t w_t: positive where training moves the weight away from zero (Sanh et al. 2020, eq. 3)."""
    return movement.clone()


def displacement(weight: Tensor, initial_weight: Tensor) -> Tensor:
    """|w - w0|."""
    return (weight - initial_weight).abs_()


def taylor(weight: Tensor, taylor: Tensor) -> Tensor:
    """sum_t |w_t g_t|: first-order change of the loss when w goes (Molchanov et al. 2017)."""
    return taylor.clone()


def fisher(weight: Tensor, fisher: Tensor) -> Tensor:
    """sum_t (w_t g_t)^2: second-order change of the loss under the empirical Fisher (Theis et al. 2018)."""
    return fisher.clone()


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w| ||x||_2, the norm over the tokens seen, per input feature (Sun et al. 2023, eq. 1)."""
    return weight.abs().mul_(input_norm)


def random(weight: Tensor, noise: Tensor) -> Tensor:
    """Uniform noise: the floor that every other criterion has to beat."""
    return noise.clone()


def mama(weight: Tensor, gradient_square: Tensor) -> Tensor:
    """
    Magnitude x movement: |w| E[g^2]^(1/4) = |w| RMS(g)^(1/2).

    Movement is how strongly training pulls at the weight. Under the GRPO loss g is the advantage-weighted gradient of
    the log-probabilities, so that the reward decides what is kept. The exponent 1/2 was the best of those measured.
    """
    return gradient_square.sqrt().sqrt_().mul_(weight.abs())


CRITERIA: dict[str, Criterion] = {
    "mama": Criterion(mama, ("gradient_square",), scope="global"),
    "magnitude": Criterion(magnitude),
    "movement": Criterion(movement, ("movement",)),
    "displacement": Criterion(displacement, ("initial_weight",)),
    "taylor": Criterion(taylor, ("taylor",), scope="global"),
    "fisher": Criterion(fisher, ("fisher",), scope="global"),
    "wanda": Criterion(wanda, ("input_norm",), scope="row"),
    "random": Criterion(random, ("noise",)),
}


def score(name: str, weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    """
    The score of a weight, fp32 and finite: NaN counts as the lowest. -inf is left to what is pruned already.

    Args:
        weight (`torch.Tensor`): any floating dtype.
        statistics (`dict`): the tensors that `CRITERIA[name].statistics` names.
    """
    scores = CRITERIA[name].score(weight.float(), **statistics)
    return torch.nan_to_num_(scores, nan=torch.finfo(torch.float32).min)
