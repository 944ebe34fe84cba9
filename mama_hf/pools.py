"""What competes in training: the entries of weights, or coupled groups. Both kinds of pools look alike to the Pruner.

A unit is what goes or stays as a whole: an entry, or a neuron or head group. Masks are of units, True where kept.

Shapes: O = out, I = in, G = groups of a layer.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import MamaPruningConfig
from .coupling import CoupledGroups, Member, find_coupled_groups
from .groups import alive, entry_mask, group_sum, members_of, num_kept, select_groups
from .masks import select
from .targets import Target, find_targets


logger = logging.getLogger(__name__)

Scores = Callable[[int], Tensor]  # index of a target -> the scores of its entries, fp32, in the parameter's shape


class EntryPools:
    """
    Each entry of the targeted weights is a unit.

    Args:
        model (`nn.Module`): the unwrapped model.
        config (`MamaPruningConfig`): the recipe, with an unstructured or N:M granularity.
        scope (`str`): the criterion's own scope, for a recipe that leaves it open.
    """

    def __init__(self, model: nn.Module, config: MamaPruningConfig, scope: str) -> None:
        self.n_of_m = config.n_of_m
        self.scope = "layer" if config.n_of_m else config.scope or scope
        self.targets = find_targets(model, config)  # what is scored
        self.held = self.targets  # what is masked, in the order of `expand`
        self.kinds = {"weight": list(range(len(self.targets)))}  # kind of unit -> the places of its masks
        self.movers = list(range(len(self.targets)))  # targets whose pruned values may be moved
        self.names = [target.name for target in self.targets]  # of the masks
        self.devices = [target.parameter.device for target in self.targets]
        self.num_units = sum(target.parameter.numel() for target in self.targets)

    def alive(self) -> list[Tensor]:
        """The masks of what is not zero."""
        return [target.weight != 0 for target in self.targets]

    def num_asked(self, sparsity: float) -> int:
        """Units that go at `sparsity`, by the rounding of the scope."""
        return self._asked_by_scope(sparsity)[self.scope]

    def num_asked_of(self, kind: str, sparsity: float) -> int:
        """The same of one kind: there is only one."""
        return self.num_asked(sparsity)

    def num_units_of(self, kind: str) -> int:
        """Units of one kind: there is only one."""
        return self.num_units

    def _asked_by_scope(self, sparsity: float) -> dict[str, int]:
        shapes = [target.row_shape for target in self.targets]
        return {
            "global": round(sparsity * self.num_units),
            "layer": sum(round(sparsity * rows * inputs) for rows, inputs in shapes),
            "row": sum(rows * round(sparsity * inputs) for rows, inputs in shapes),
        }

    def meets(self, masks: Sequence[Tensor], sparsity: float) -> bool:
        """
        Whether `masks`, those of what is not zero, prune what is asked for, in the pattern that is asked for: counted
        as any scope rounds it, so that what another scope has pruned to this sparsity will do.
        """
        if not 0 < min(self._asked_by_scope(sparsity).values()) <= num_pruned(masks):
            return False
        return self.n_of_m is None or all(target.keeps_to(target.weight, *self.n_of_m) for target in self.targets)

    def exceeds(self, masks: Sequence[Tensor], sparsity: float) -> bool:
        """Whether `masks` prune more than is asked for, however that is rounded."""
        return num_pruned(masks) > max(self._asked_by_scope(sparsity).values())

    def select(
        self,
        score: Scores,
        sparsity: float,
        previous: Sequence[Tensor] | None = None,
        growth: Scores | None = None,
        swap: float = 0.0,
        kinds: Iterable[str] = ("weight",),
    ) -> list[Tensor]:
        """
        Masks at `sparsity`; with global scope in one go, else target by target, to hold one score at a time.

        Args:
            previous (`Sequence[torch.Tensor]`, *optional*): masks whose zeros stay zeros, but for regrowth.
            growth (`Callable`, *optional*): the scores by which a share `swap` of the kept entries comes back.
        """
        indices = range(len(self.targets))
        masks: list[Tensor] = []
        for pool in [list(indices)] if self.scope == "global" else [[index] for index in indices]:
            members = [self.targets[index] for index in pool]
            scores = [target.to_rows(score(index)) for index, target in zip(pool, members)]
            weights = [target.to_rows(target.weight) for target in members]
            before = after = None
            if previous is not None:
                before = [target.to_rows(previous[index]) for index, target in zip(pool, members)]
                if growth is not None and swap > 0:
                    after = [target.to_rows(growth(index)).clone() for index, target in zip(pool, members)]
            chosen = select(scores, weights, sparsity, self.scope, self.n_of_m, before, after, swap)
            masks += [target.from_rows(mask) for target, mask in zip(members, chosen)]
        return masks

    def expand(self, masks: list[Tensor]) -> list[Tensor]:
        """The masks of the entries of `held`."""
        return masks


class GroupPools:
    """
    Each neuron, or key-value head with its query heads, is a unit. Neurons and heads don't compete with each other.

    Args:
        model (`nn.Module`): the unwrapped model.
        config (`MamaPruningConfig`): the recipe, with granularity "neuron", "head" or "neuron+head".
        scope (`str`): the criterion's own scope, for a recipe that leaves it open; "row" stands for "layer".

    Raises:
        `ValueError`: for a model without such groups, or of which all are frozen or excluded.
    """

    def __init__(self, model: nn.Module, config: MamaPruningConfig, scope: str) -> None:
        own = "layer" if scope == "row" else scope
        self.scope, self.multiple_of = config.scope or own, config.multiple_of
        self.groups = trainable_groups(model, config)
        weights = [member for group in self.groups for member in members_of(group) if member.parameter.ndim > 1]
        biases = [member for group in self.groups for member in members_of(group) if member.parameter.ndim == 1]
        self.targets = [member_target(model, member) for member in weights]
        self.held = self.targets + [member_target(model, member) for member in biases]
        self._members = weights + biases
        self._index = {member.name: index for index, member in enumerate(self._members)}
        self.movers = [self._index[member.name] for group in self.groups for member in group.writers]
        self.names = [group.name for group in self.groups]
        self.devices = [group.writers[0].parameter.device for group in self.groups]
        self.num_units = sum(group.num_groups for group in self.groups)
        self.kinds: dict[str, list[int]] = {}  # kind -> the places of its layers in `groups`
        for place, group in enumerate(self.groups):
            self.kinds.setdefault(group.kind, []).append(place)

    def alive(self) -> list[Tensor]:
        """The masks of what is not wholly zero."""
        return [alive(group) for group in self.groups]

    def num_asked(self, sparsity: float) -> int:
        """Groups that go at `sparsity`, rounded as `select` rounds."""
        return sum(self.num_asked_of(kind, sparsity) for kind in self.kinds)

    def meets(self, masks: Sequence[Tensor], sparsity: float) -> bool:
        """Whether `masks` prune as many groups of each kind as are asked for."""
        return self.num_asked(sparsity) > 0 and all(
            num_pruned([masks[place] for place in places]) >= self.num_asked_of(kind, sparsity)
            for kind, places in self.kinds.items()
        )

    def exceeds(self, masks: Sequence[Tensor], sparsity: float) -> bool:
        """Whether `masks` prune more groups than are asked for."""
        return num_pruned(masks) > self.num_asked(sparsity)

    def select(
        self,
        score: Scores,
        sparsity: float,
        previous: Sequence[Tensor] | None = None,
        growth: Scores | None = None,
        swap: float = 0.0,
        kinds: Iterable[str] = ("neuron", "head"),
    ) -> list[Tensor]:
        """
        The masks at `sparsity`. Nothing grows back: what is wholly zero gets no gradient, as the recipe says.

        Args:
            kinds (`Iterable[str]`, *optional*): whose masks change; the others stay as they are.
        """
        masks = dict(enumerate(self.alive() if previous is None else previous))
        for kind, places in self.kinds.items():
            if kind not in kinds:
                continue
            scores = [self._sum(self.groups[place], score) for place in places]
            sizes = [self._sum(self.groups[place], lambda index: self.targets[index].weight.abs()) for place in places]
            before = None if previous is None else [previous[place] for place in places]
            multiple = self.multiple_of if kind == "neuron" else 1
            masks |= zip(places, select_groups(scores, sizes, sparsity, self.scope, kind, multiple, before))
        return [masks[place] for place in range(len(self.groups))]

    def expand(self, masks: list[Tensor]) -> list[Tensor]:
        """The masks of the entries of `held`: views of one bool for each row or column."""
        entries = {
            member.name: entry_mask(member, kept)
            for group, kept in zip(self.groups, masks)
            for member in members_of(group)
        }
        return [entries[member.name] for member in self._members]

    def num_asked_of(self, kind: str, sparsity: float) -> int:
        """The same of one kind."""
        sizes = self._sizes(kind)
        multiple = self.multiple_of if kind == "neuron" else 1
        if self.scope == "global":
            return sum(sizes) - num_kept(sum(sizes), sparsity, multiple)
        return sum(size - num_kept(size, sparsity, multiple) for size in sizes)

    def num_units_of(self, kind: str) -> int:
        """Groups of one kind."""
        return sum(self._sizes(kind))

    def _sizes(self, kind: str) -> list[int]:
        """Groups of one kind in each layer."""
        return [self.groups[place].num_groups for place in self.kinds[kind]]

    def _sum(self, group: CoupledGroups, entries: Scores) -> Tensor:
        """Sum [G] over the entries of the group's weights."""
        parts = [
            group_sum(member, entries(self._index[member.name]).float())
            for member in members_of(group)
            if member.parameter.ndim > 1
        ]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum(dim=0)


def make_pools(model: nn.Module, config: MamaPruningConfig, scope: str) -> EntryPools | GroupPools:
    """The pools of a recipe's granularity."""
    return (GroupPools if config.is_structured else EntryPools)(model, config, scope)


def trainable_groups(model: nn.Module, config: MamaPruningConfig) -> list[CoupledGroups]:
    """The coupled groups of the recipe of which every parameter trains. Raises `ValueError` if there are none."""
    found = find_coupled_groups(model, config.granularity, config.exclude_modules)
    groups = [group for group in found if all(member.parameter.requires_grad for member in members_of(group))]
    for group in found:
        if group not in groups:
            logger.info("The %ss of %s are not pruned: a part has no gradient.", group.kind, group.name)
    if not groups:
        raise ValueError(
            f"No {config.granularity} can be pruned: exclude_modules={config.exclude_modules!r} and frozen parameters "
            "(requires_grad=False) leave none."
        )
    return groups


def member_target(model: nn.Module, member: Member) -> Target:
    """A member as a target: rows are along the output, whatever the groups lie along."""
    module = model.get_submodule(member.name.rpartition(".")[0])
    if member.parameter.ndim == 1:
        return Target(member.name, module, member.parameter, has_input=False)
    return Target(member.name, module, member.parameter, -2 if isinstance(module, Conv1D) else -1)


def num_pruned(masks: Sequence[Tensor]) -> int:
    """Units that masks prune."""
    return sum(mask.numel() - int(mask.count_nonzero()) for mask in masks)
