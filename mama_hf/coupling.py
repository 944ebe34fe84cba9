"""
Which parts of a model can only go together: FFN neurons, and key-value heads with their query heads.

A neuron is its rows in the gate and up projections, with their biases, and its column of the down projection. A head
group is the rows of its queries, key and value and its columns of the output projection. The layouts are data, in
`modeling_mama.FAMILIES`: which modules, fused or interleaved how. Here they become positions in parameters.

Shapes: G = groups of a layer, k = positions a group has in one parameter.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modeling_mama import Coupling, blocks, family_of, run_lengths
from .targets import is_linear, matches


KINDS: dict[str, tuple[Literal["neuron", "head"], ...]] = {
    "neuron": ("neuron",),
    "head": ("head",),
    "neuron+head": ("neuron", "head"),
}


@dataclass(frozen=True, eq=False)
class Member:
    """
    What the groups of a layer have in one parameter.

    Args:
        name (`str`): parameter name in the model.
        parameter (`nn.Parameter`): a weight in its own layout ([O, I], or [I, O] of Conv1D), or a bias [O].
        dim (`int`): dimension of the parameter along which the groups lie.
        index (`Tensor`): int64 [G, k], on the CPU: the positions along `dim` of each group. They partition it.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class CoupledGroups:
    """
    The neurons, or the head groups, of one layer.

    Args:
        kind (`str`): `"neuron"` or `"head"`.
        layer (`int`): index of the layer.
        name (`str`): name of the writer, which is unique.
        num_groups (`int`): G.
        readers (`tuple[Member, ...]`): rows of gate and up, or of query, key and value, with biases.
        writers (`tuple[Member, ...]`): columns of the down or output projection. Its bias belongs to no group.
        writer_module (`nn.Module`): the module of the writers; its input [..., I] is what the groups put out.
    """

    kind: Literal["neuron", "head"]
    layer: int
    name: str
    num_groups: int
    readers: tuple[Member, ...]
    writers: tuple[Member, ...]
    writer_module: nn.Module


def find_coupled_groups(
    model: nn.Module, granularity: str, exclude_modules: str | list[str] | None = None
) -> list[CoupledGroups]:
    """
    The groups of each layer of `model`, in the model's order.

    Args:
        granularity (`str`): `"neuron"`, `"head"` or `"neuron+head"`.
        exclude_modules (`str` or `list[str]`, *optional*):
            as in [`MamaPruningConfig`]. Groups of which one module matches are left out as a whole.

    Raises:
        `ValueError`: for an unknown granularity or architecture, with those that are known; for a model in an
            adapter's wrapper or with quantized weights.
    """
    if granularity not in KINDS:
        raise ValueError(f"granularity={granularity!r} has no coupled groups. Use one of {', '.join(KINDS)}.")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"The neurons and heads of a {type(model).__name__} are not known. Give the transformers model itself; an "
            "adapter must be merged first (merge_and_unload)."
        )
    family, lengths = family_of(model.config), run_lengths(model.config)
    layers: Any = model.base_model.get_submodule(family.layers)
    names = {id(module): name for name, module in model.named_modules()}
    groups = []
    for index, layer in enumerate(layers):
        for kind in KINDS[granularity]:
            coupling: Coupling = getattr(family, kind)
            modules = [f"{names[id(layer)]}.{path}" for path in (*coupling.readers, coupling.writer)]
            if exclude_modules is None or not any(matches(name, exclude_modules) for name in modules):
                groups.append(_groups(kind, index, layer, names[id(layer)], coupling, lengths))
    return groups


def _groups(
    kind: Literal["neuron", "head"],
    index: int,
    layer: nn.Module,
    prefix: str,
    coupling: Coupling,
    lengths: dict[str, int],
) -> CoupledGroups:
    module, weight, dim = _linear(layer, coupling.writer, prefix)
    length = lengths["n" if kind == "neuron" else "q"]
    num_groups = weight.shape[1 - dim] // length
    name = f"{prefix}.{coupling.writer}"
    readers = []
    for path, layout in coupling.readers.items():
        readers += _rows(layer, path, prefix, group_index(num_groups, blocks(layout, lengths)))
    writer = _member(f"{name}.weight", weight, 1 - dim, group_index(num_groups, [length]))
    return CoupledGroups(kind, index, name, num_groups, tuple(readers), (writer,), module)


def _rows(layer: nn.Module, path: str, prefix: str, index: Tensor) -> list[Member]:
    module, weight, dim = _linear(layer, path, prefix)
    members = [_member(f"{prefix}.{path}.weight", weight, dim, index)]
    if module.bias is not None:
        members.append(_member(f"{prefix}.{path}.bias", module.bias, 0, index))
    return members


def _member(name: str, parameter: nn.Parameter, dim: int, index: Tensor) -> Member:
    if parameter.shape[dim] != index.numel():
        raise ValueError(
            f"{name} has {parameter.shape[dim]} features, but its config and the layer's other weights make "
            f"{index.numel()}. The config does not describe this model."
        )
    return Member(name, parameter, dim, index)


def _linear(layer: nn.Module, path: str, prefix: str) -> tuple[Any, nn.Parameter, int]:
    """(module, its weight, the weight's dimension of output features)."""
    module: Any = layer.get_submodule(path)
    if not is_linear(module) or not module.weight.is_floating_point():
        raise ValueError(
            f"{prefix}.{path} is a {type(module).__name__}, whose rows and columns can't be cut. Merge adapters "
            "first (merge_and_unload), and load the model without quantization."
        )
    return module, module.weight, 1 if isinstance(module, Conv1D) else 0


def group_index(num_groups: int, lengths: list[int]) -> Tensor:
    """
    Positions [G, k] of groups in a dimension made of blocks, each of which holds a run of every group in turn.

    Args:
        lengths (`list[int]`): length of a run, for each block. k is their sum.
    """
    parts, start = [], 0
    for length in lengths:
        parts.append(torch.arange(start, start + num_groups * length).view(num_groups, length))
        start += num_groups * length
    return torch.cat(parts, dim=1)
