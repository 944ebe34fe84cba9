"""Solvers over a Gram matrix: pure tensor code, which sees neither a model nor a recipe.

A layer with inputs X [T, I] shall give Y [T, O]. All that is needed of the tokens are the moments H = X^T X (`gram`),
C = Y^T X (`cross`) and |Y|^2 of each output: |X W'^T - Y|^2 = |Y|^2 - 2 <W', C> + <W' H, W'>. With the target of plain
pruning, Y = X W^T, C is W H.

Shapes: O = out, I = in, T = tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


DAMPING = 0.01  # of the mean diagonal of H
# Of each input's own diagonal entry, for moving values: new values are pulled towards the dense ones. Without it they
# fit the calibration too closely: on SmolLM2 at 2:4, 1.0 brings the perplexity of other text of the same kind from
# 42.3 to 38.5, and that of Python source from 171 to 61.
RIDGE = 1.0
# The same in one-shot pruning, up to half of the weights; see `ridge_for`. Among 0.3, 1, 2 and 4 it is the best at 0.5
# on ARC-Easy (acc_norm 0.366, 0.382, 0.386, 0.378); WikiText's perplexity is 31.03, 30.99, 31.41, 31.92.
ONE_SHOT_RIDGE = 2.0
# ADMM's rho, for a Gram matrix scaled to a unit diagonal. A smaller one gives smaller errors on the calibration data,
# and a larger perplexity on other text: it fits the calibration too closely.
PENALTY = 1.0
SPARSEGPT_BLOCK = 128
_GRAM_BLOCK = 384

Selection = Callable[[Tensor, float], Tensor]  # (scores [O, I], share of the final sparsity) -> mask [O, I]


class Inputs:
    """
    The moments of a layer's inputs, collected batch by batch: all weights that read the same input share them.

    Args:
        num_inputs (`int`): I.
        device (`torch.device`): where the sums are kept, in fp32.
    """

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_inputs, num_inputs, device=device)
        self.total = torch.zeros(num_inputs, device=device)
        self.num_tokens: int | Tensor = 0
        self._system: System | None = None

    def add(self, x: Tensor, num_tokens: int | Tensor | None = None) -> None:
        """
        Take in the inputs x [T, I], fp32. Only the upper blocks of x^T x are computed.

        Args:
            num_tokens (`int` or `torch.Tensor`, *optional*): how many of the T rows are tokens; the others are zero.
        """
        for start in range(0, x.shape[1], _GRAM_BLOCK):
            stop = start + _GRAM_BLOCK
            self.gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.total += x.sum(dim=0)
        self.num_tokens = self.num_tokens + (x.shape[0] if num_tokens is None else num_tokens)

    def finish(self) -> None:
        """Complete the lower blocks."""
        for start in range(_GRAM_BLOCK, self.gram.shape[0], _GRAM_BLOCK):
            stop = start + _GRAM_BLOCK
            self.gram[start:stop, :start] = self.gram[:start, start:stop].T

    @property
    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return bool(torch.isfinite(self.gram.sum()))

    @property
    def mean(self) -> Tensor:
        """E[x] [I]."""
        return self.total / torch.as_tensor(self.num_tokens, device=self.total.device).clamp(min=1)

    def system(self, ridge: float = RIDGE) -> "System":
        """The damped system of the Gram matrix, made once for all weights that ask for the same `ridge`."""
        if self._system is None or self._system.ridge != ridge:
            self._system = System(self.gram, ridge=ridge)
        return self._system


def ridge_for(sparsity: float) -> float:
    """
    The ridge of one-shot pruning: `ONE_SHOT_RIDGE` x kept / pruned weights, from half of them on. The more is pruned,
    the further what stays has to move (0.8: 0.3 gives 67.2, 1.0 gives 73.1).
    """
    return ONE_SHOT_RIDGE * min(1.0, (1 - sparsity) / max(sparsity, 0.5))


@dataclass
class Moments:
    """
    What a solver knows of the tokens.

    Args:
        gram (`torch.Tensor` of shape [I, I]): H = X^T X, fp32.
        cross (`torch.Tensor` of shape [O, I]): C = Y^T X, fp32.
        target_square (`torch.Tensor` of shape [O]): |Y|^2 of each output over all tokens, fp32.
    """

    gram: Tensor
    cross: Tensor
    target_square: Tensor

    @classmethod
    def plain(cls, weight: Tensor, gram: Tensor) -> "Moments":
        """The target of plain pruning: the outputs of `weight` [O, I] on the same inputs."""
        cross = weight @ gram
        return cls(gram, cross, (cross * weight).sum(dim=1))

    def square_error(self, weight: Tensor) -> Tensor:
        """|X W'^T - Y|^2 of each output [O], for W' = `weight` [O, I]."""
        product = weight @ self.gram
        error = self.target_square.double() + (weight * (product - 2 * self.cross)).sum(dim=1, dtype=torch.float64)
        return error.clamp_(min=0).float()

    def relative_error(self, weight: Tensor) -> float:
        """|X W'^T - Y|^2 / |Y|^2 over all outputs."""
        return self.relative(self.square_error(weight).double().sum())

    def relative(self, error: Tensor) -> float:
        """A squared error as a share of |Y|^2."""
        scale = self.target_square.double().sum()
        return max(0.0, float(error / scale)) if scale > 0 else float(error > 0)


class System:
    """
    A damped Gram matrix, scaled to a unit diagonal, with its factors: shared by all weights that read the same input.

    In its coordinates a weight is w * scale, so that its square is the (damped) Wanda score.

    Args:
        gram (`torch.Tensor` of shape [I, I]): symmetric, fp32; it is not changed.
        damping (`float`): share of the mean diagonal that is added to the diagonal. A dead input keeps that share.
        ridge (`float`): share of its own that is added to each diagonal entry.
    """

    def __init__(self, gram: Tensor, damping: float = DAMPING, ridge: float = RIDGE) -> None:
        diagonal = gram.diagonal()
        mean = diagonal.double().mean()
        self.ridge = ridge
        self.damp = ridge * diagonal + (float(damping * mean) if mean > 0 else 1.0)  # [I]
        self.scale = (diagonal + self.damp).sqrt()
        self.gram = gram / self.scale.unsqueeze(1) / self.scale
        self.gram.diagonal().fill_(1.0)
        self._inverse: Tensor | None = None

    def inverse(self) -> Tensor:
        """(H + rho)^-1 in the scaled coordinates."""
        if self._inverse is None:
            shifted = self.gram.clone()
            shifted.diagonal().add_(PENALTY)
            self._inverse = torch.cholesky_inverse(cholesky(shifted)[0])
        return self._inverse

    def cross(self, weight: Tensor, cross: Tensor) -> Tensor:
        """The right-hand side with the damping's pull towards `weight`, in the scaled coordinates."""
        return (cross + self.damp * weight) / self.scale


def cholesky(matrix: Tensor, damp: float = 0.0) -> tuple[Tensor, float]:
    """
    Lower Cholesky factor of a positive semi-definite matrix + `damp`, and the damping that it took.

    The damping is doubled until the factorisation succeeds.

    Raises:
        `ValueError`: for a matrix with NaN or infinite entries.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("The Gram matrix has NaN or infinite entries: the calibration activations overflow.")
    step = max(damp, DAMPING * float(matrix.diagonal().mean()), torch.finfo(matrix.dtype).tiny)
    while True:
        shifted = matrix.clone()
        shifted.diagonal().add_(damp)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return factor, damp
        damp = max(step, 2 * damp)


@torch.no_grad()
def least_squares(
    weight: Tensor, mask: Tensor, moments: Moments, steps: int = 20, system: System | None = None
) -> Tensor:
    """
    New values of the kept weights, so that the outputs come closest to Y: min over W' = mask * W' of |X W'^T - Y|^2.

    Conjugate gradients on all rows at once, in the coordinates in which H has a unit diagonal. They start from the
    values in `weight`; the damping pulls towards those.

    Args:
        weight (`torch.Tensor` of shape [O, I]): fp32.
        mask (`torch.Tensor` of shape [O, I]): bool, True where kept.
        steps (`int`, *optional*, defaults to 20): iterations; each costs one product [O, I] x [I, I].
        system (`System`, *optional*): of `moments.gram`, where it is shared.

    Returns:
        `torch.Tensor` of shape [O, I], zero where `mask` is False.
    """
    system = system or System(moments.gram)
    start = weight * mask * system.scale
    return _conjugate_gradients(start, mask, system.cross(weight, moments.cross), system.gram, steps) / system.scale


def _conjugate_gradients(values: Tensor, mask: Tensor, cross: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Minimise <v gram, v> / 2 - <v, cross> over v supported on `mask`, row by row."""
    residual = (cross - values @ gram).mul_(mask)
    direction = residual.clone()
    square = residual.square().sum(dim=1, keepdim=True)
    rounding = torch.finfo(square.dtype)
    solved = square * rounding.eps**2 + rounding.tiny  # no more than that is left of a solved row
    for _ in range(steps):
        product = (direction @ gram).mul_(mask)
        curvature = (direction * product).sum(dim=1, keepdim=True)
        step = torch.where((square > solved) & (curvature > 0), square / curvature, 0.0)
        values = torch.addcmul(values, step, direction)
        residual.addcmul_(step, product, value=-1)
        previous, square = square, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(previous > solved, square / previous, 0.0)).add_(residual)
    return values


@torch.no_grad()
def admm(
    weight: Tensor,
    moments: Moments,
    select: Selection,
    steps: int = 20,
    polish: int = 10,
    system: System | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Mask and values chosen together: ADMM on |X W'^T - Y|^2 with a growing mask (Boza 2024, arXiv 2401.02938), then
    conjugate gradients on the mask that it found.

    The sparsity of the mask grows by the cubic rule over the first three quarters of the steps. What is pruned at a
    step is what |W' + U| says, in the coordinates in which H has a unit diagonal; a pruned weight may come back.

    Args:
        weight (`torch.Tensor` of shape [O, I]): fp32.
        select (`Callable`): (scores [O, I], share in (0, 1] of the final sparsity) -> mask. Called with 1.0 last.
        steps (`int`, *optional*, defaults to 20): each costs one product [O, I] x [I, I].
        polish (`int`, *optional*, defaults to 10): steps of conjugate gradients; each costs the same.

    Returns:
        `tuple`: values [O, I], zero where the mask is False, and the mask.
    """
    system = system or System(moments.gram)
    cross, inverse = system.cross(weight, moments.cross), system.inverse()
    kept = weight * system.scale
    dual = torch.zeros_like(kept)
    growing = max(1, round(0.75 * steps))
    mask = torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, steps + 1):
        solved = torch.addmm(dual, torch.add(cross, kept - dual, alpha=PENALTY), inverse)  # W' + U
        if step <= growing:
            mask = select(solved.abs(), 1 - (1 - step / growing) ** 3)
        kept = solved * mask
        dual = solved - kept
    return _conjugate_gradients(kept, mask, cross, system.gram, polish) / system.scale, mask


@torch.no_grad()
def better_rows(first: Tensor, second: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """
    Of two weights [O, I], the one with the smaller output error, row by row; `first` where they are equal.

    Returns:
        `tuple`: the rows [O, I], and by how much each row's squared error is below that of `first` [O], fp64.
    """
    # the difference of the errors is exact even where both are small beside |Y|^2
    change = second - first
    slope = (first + second) @ moments.gram - 2 * moments.cross
    gain = (change * slope).sum(dim=1, dtype=torch.float64)
    return torch.where((gain < 0).unsqueeze(1), second, first), gain.clamp(max=0).neg()


@torch.no_grad()
def move_mean(weight: Tensor, mask: Tensor) -> Tensor:
    """
    The paper's rule done right: the sum of a row's pruned values is spread evenly over its kept ones.

    (The published code zeroes the weights before it sums them, so that it moves nothing.)
    """
    pruned = (weight * ~mask).sum(dim=1, keepdim=True)
    return (weight + pruned / mask.sum(dim=1, keepdim=True).clamp(min=1)) * mask


@torch.no_grad()
def bias_change(weight: Tensor, mask: Tensor, mean_input: Tensor) -> Tensor:
    """What the pruned weights add to the outputs on average [O]: W_pruned E[x], with E[x] = `mean_input` [I]."""
    return (weight * ~mask) @ mean_input


@torch.no_grad()
def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, scope: str = "layer", n_of_m: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """
    SparseGPT (Frantar & Alistarh 2023): blocks of 128 columns; in each the mask by w^2 / diag(H^-1)^2, then column by
    column the error of the pruned entries is made good by the columns to the right.

    Args:
        weight (`torch.Tensor` of shape [O, I]): fp32.
        gram (`torch.Tensor` of shape [I, I]): fp32.
        sparsity (`float`): each block of columns (with scope "row", each row in it) takes its share, such that the
            layer (the row) ends with exactly `round(sparsity * n)` zeros.
        n_of_m (`tuple[int, int]`, *optional*): (N, M): N kept in each M neighbours instead.

    Returns:
        `tuple`: values [O, I] and the mask [O, I].
    """
    weight = weight.clone()
    dead = gram.diagonal() == 0
    factor = _inverse_factor(gram, dead)
    mask = torch.ones_like(weight, dtype=torch.bool)
    size = SPARSEGPT_BLOCK if n_of_m is None else SPARSEGPT_BLOCK // n_of_m[1] * n_of_m[1] or n_of_m[1]
    for start in range(0, weight.shape[1], size):
        stop = min(start + size, weight.shape[1])
        block, local = weight[:, start:stop].T.contiguous(), factor[start:stop, start:stop]
        kept = torch.ones_like(block, dtype=torch.bool)  # [columns, O], so that a column is contiguous
        if n_of_m is None:
            score = _obs_score(block, local, dead[start:stop])
            kept = _keep_block(score, sparsity, scope, start, stop)
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            if n_of_m is not None and column % n_of_m[1] == 0:
                end = column + n_of_m[1]
                score = _obs_score(
                    block[column:end], local[column:end, column:end], dead[start + column : start + end]
                )
                worst = score.topk(n_of_m[1] - n_of_m[0], dim=0, largest=False).indices
                kept[column:end].scatter_(0, worst, False)
            lost = block[column] * ~kept[column]
            errors[column] = lost / local[column, column]
            block[column] -= lost
            block[column + 1 :].addr_(local[column, column + 1 :], errors[column], alpha=-1)
        weight[:, start:stop], mask[:, start:stop] = block.T, kept.T
        weight[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    return weight * mask, mask


def _inverse_factor(gram: Tensor, dead: Tensor) -> Tensor:
    """Upper Cholesky factor of (H + damping)^-1. Dead inputs get a unit diagonal."""
    gram = gram.clone()
    gram.diagonal()[dead] = 1.0
    factor = cholesky(gram, DAMPING * float(gram.diagonal().mean()))[0]
    inverse = torch.cholesky_inverse(factor)
    return cholesky(inverse)[0].T.contiguous()


def _obs_score(block: Tensor, local: Tensor, dead: Tensor) -> Tensor:
    """w^2 / diag(H^-1)^2 of columns [columns, O]; those of dead inputs go first."""
    return (block / local.diagonal().unsqueeze(1)).square_().masked_fill_(dead.unsqueeze(1), -1.0)


def _keep_block(score: Tensor, sparsity: float, scope: str, start: int, stop: int) -> Tensor:
    """The mask of a block of columns [columns, O]. Cumulative rounding makes the counts of all blocks add up."""
    pools = score.T.reshape(1, -1) if scope == "layer" else score.T
    width = score.shape[1] if scope == "layer" else 1
    number = round(sparsity * width * stop) - round(sparsity * width * start)
    kept = torch.ones_like(pools, dtype=torch.bool)
    kept.scatter_(1, pools.argsort(dim=1, stable=True)[:, :number], False)
    return kept.reshape(score.shape[1], -1).T
