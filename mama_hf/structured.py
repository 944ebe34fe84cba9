"""
Neurons and head groups in `prune_model`: which go, and how the columns that stay make up for them.

The groups of a layer are columns of its writer, the down or output projection. What goes is chosen there; rows of the
readers and their biases follow. With `move_values="least_squares"` and criterion "mama" choice and values belong
together: groups go in some rounds, in each those that are cheapest to lose given that all other columns are refitted
(optimal brain surgeon, on blocks of columns), and the end is the exact least-squares solution on what stays.

Shapes: O = out, I = in, G = groups of a layer, k = columns of a group.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import MamaPruningConfig
from .coupling import CoupledGroups, find_coupled_groups
from .groups import entry_mask, group_sum, members_of, num_kept, select_groups, share_out
from .pools import member_target
from .rules import Pruned, finish, is_joint
from .solvers import Inputs, Moments, System, cholesky, move_mean
from .targets import Target


ROUNDS = 32
# Share of each diagonal entry of H by which a column is drawn to its old value. Without it the exact solution fits the
# calibration too closely: 25 % of the neurons of SmolLM2-135M ended at a perplexity of 32.03, with it at 31.15.
RIDGE = 0.1


class StructuredRule:
    """
    A recipe with granularity "neuron", "head" or "neuron+head", applied to one weight after another.

    Args:
        model (`PreTrainedModel`): the dense model.
        recipe (`MamaPruningConfig`): the recipe.

    Raises:
        `ValueError`: for an architecture whose groups are not known, or of which all are excluded.
    """

    def __init__(self, model: PreTrainedModel, recipe: MamaPruningConfig) -> None:
        self.recipe = recipe
        groups = find_coupled_groups(model, recipe.granularity, recipe.exclude_modules)
        if not groups:
            raise ValueError(f"exclude_modules={recipe.exclude_modules!r} leaves no {recipe.granularity} to prune.")
        self.groups = {group.writer_module: group for group in groups}
        self.targets = [member_target(model, group.writers[0]) for group in groups]
        members = [member for group in groups for member in members_of(group) if member.parameter.ndim > 1]
        self.changed = [member_target(model, member) for member in members]  # all that changes, with its bias
        self._num_kept = {
            group.writer_module: num_kept(group.num_groups, self._sparsity, self._multiple(group.kind))
            for group in groups
        }

    @property
    def _sparsity(self) -> float:
        return float(self.recipe.final_sparsity)  # type: ignore[arg-type]

    def _multiple(self, kind: str) -> int:
        return self.recipe.multiple_of if kind == "neuron" else 1

    def share_out(self, squares: Iterable[dict[nn.Module, Tensor]]) -> None:
        """
        With global scope: how many groups each layer keeps. Layers compete by the share that a group has in what its
        layer writes, so that the growing scale of the residual stream plays no part.

        Args:
            squares (`Iterable[dict]`): sum of squares [I] of what comes into each writer of the dense model.
        """
        scores = {}
        for found in squares:
            for module, square in found.items():
                if module in self.groups:
                    score = self._score(self.groups[module], self._rows(module), square, 0)
                    scores[module] = score / score.sum().clamp(min=torch.finfo(score.dtype).tiny)
        for kind in {group.kind for group in self.groups.values()}:
            modules = [module for module, group in self.groups.items() if group.kind == kind]
            counts = share_out([scores[module] for module in modules], self._sparsity, self._multiple(kind))
            self._num_kept |= zip(modules, counts)

    def prune(
        self, target: Target, dtype: torch.dtype, inputs: Inputs, moments: Moments, seed: int
    ) -> tuple[Pruned, list[tuple[nn.Parameter, Tensor]]]:
        """
        Which groups of a writer go, and its new values.

        Returns:
            `tuple`: what is pruned, with a mask [G], and new values of the readers' parameters.
        """
        weight = target.to_rows(target.weight).float()
        group = self.groups[target.module]
        index = group.writers[0].index.to(weight.device)
        number, system = self._num_kept[target.module], inputs.system(RIDGE)
        if is_joint(self.recipe):
            kept = choose_groups(weight, moments, index, number, system)
        else:
            scores = self._score(group, weight, inputs.gram.diagonal(), seed)
            kept = select_groups([scores], [scores], 1 - number / len(index), "layer", group.kind)[0]
        mask = torch.empty(weight.shape[1], dtype=torch.bool, device=weight.device)
        mask[index] = kept.unsqueeze(1)
        moved = weight * mask
        if self.recipe.move_values == "least_squares":
            moved = fit_columns(weight, moments, mask, system)
        elif self.recipe.move_values == "mean":
            moved = move_mean(weight, mask.expand(weight.shape))
        result = finish(self.recipe, weight, moved.to(dtype).float(), mask.expand(weight.shape), inputs, moments)
        result.mask = kept
        return result, [
            (member.parameter, member.parameter.detach() * entry_mask(member, kept)) for member in group.readers
        ]

    def _rows(self, module: nn.Module) -> Tensor:
        return next(target.to_rows(target.weight).float() for target in self.targets if target.module is module)

    def _score(self, group: CoupledGroups, weight: Tensor, square: Tensor, seed: int) -> Tensor:
        """
        Score [G] without refitting: the energy E[x_j^2] |w_j|^2 that a group's columns write; for "magnitude" the sum
        of |w| over all that the group has.
        """
        if self.recipe.criterion == "random":
            return torch.rand(group.num_groups, generator=torch.Generator().manual_seed(seed)).to(weight.device)
        if self.recipe.criterion == "magnitude":
            members = [member for member in members_of(group) if member.parameter.ndim > 1]
            return torch.stack([group_sum(member, member.parameter.detach().float().abs()) for member in members]).sum(
                0
            )
        energy = weight.square().sum(dim=0) * square
        return energy[group.writers[0].index.to(energy.device)].sum(dim=1)


@torch.no_grad()
def fit_columns(weight: Tensor, moments: Moments, mask: Tensor, system: System) -> Tensor:
    """The weight [O, I] that comes closest to the target with the columns of `mask` (bool [I]), the others zero."""
    columns = mask.nonzero().squeeze(1)
    factor = cholesky(system.gram[columns][:, columns])[0]
    cross = system.cross(weight, moments.cross)[:, columns]
    values = torch.zeros_like(weight)
    values[:, columns] = torch.cholesky_solve(cross.T, factor).T
    return values / system.scale


@torch.no_grad()
def choose_groups(weight: Tensor, moments: Moments, index: Tensor, number: int, system: System) -> Tensor:
    """
    Mask [G] of the `number` groups to keep.

    With B = H^-1 and W the solution on all columns, losing the columns b costs tr(W_b (B_bb)^-1 W_b^T) when all others
    are refitted. The cheapest go, W and B are updated to what is left, and so on for `ROUNDS` rounds.

    Args:
        index (`torch.Tensor`): int64 [G, k], the columns of each group.
    """
    inverse = torch.cholesky_inverse(cholesky(system.gram)[0])
    values = system.cross(weight, moments.cross) @ inverse
    left = torch.arange(len(index), device=index.device)
    for turn in range(ROUNDS, 0, -1):
        num_lost = -(-(len(left) - number) // turn)
        if num_lost == 0:
            continue
        lost = _costs(values, inverse, index[left]).topk(num_lost, largest=False).indices
        columns = index[left[lost]].flatten()
        update = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # [columns, I]
        values -= values[:, columns] @ update
        inverse -= inverse[:, columns] @ update
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[lost] = False
        left = left[stays]
    kept = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    kept[left] = True
    return kept


def _costs(values: Tensor, inverse: Tensor, index: Tensor) -> Tensor:
    """What losing each of the groups `index` [G, k] would cost [G]."""
    own = inverse[index.unsqueeze(2), index.unsqueeze(1)]  # [G, k, k]
    columns = values.T[index]  # [G, k, O]
    return (columns * torch.linalg.solve(own, columns)).sum(dim=(1, 2))
