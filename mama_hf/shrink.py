"""A masked model made physically smaller: neurons and head groups that are wholly zero are cut out."""

import copy
import functools
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoint import save_recipe_with
from .coupling import CoupledGroups, Member, find_coupled_groups
from .modeling_mama import MODEL_CLASSES, MamaConfig, MamaPreTrainedModel, family_of, run_lengths


def shrink(model: PreTrainedModel) -> PreTrainedModel:
    """
    A new, smaller model that computes the same as `model`: FFN neurons and key-value heads that do nothing are cut.

    A neuron or head group does nothing if its columns in the down or output projection are zero, or if its rows are,
    with their biases, where those are multiplied (a gated FFN, attention). At least one stays in each layer.

    Args:
        model (`PreTrainedModel`): a native model or one of the `Mama` classes. It is left as it is.

    Returns:
        `PreTrainedModel`: of the native class if all layers come out alike and the native config can describe them,
        else `MamaForCausalLM` or the `Mama` class of the model's head. Weights keep their dtype, device and
        `requires_grad`, and the generation config and `config.mama` are kept.

    Raises:
        `ValueError`: if there is nothing to cut, with the sparsity that was found; for an architecture whose layers
            are not known, an adapter's wrapper, or quantized weights.
    """
    groups = find_coupled_groups(model, "neuron+head")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"The model is spread over {', '.join(sorted(devices))}. Load it on one device to shrink it.")
    keep = {group.name: _kept(group) for group in groups}
    if all(len(keep[group.name]) == group.num_groups for group in groups):
        raise ValueError(_nothing_to_cut(groups))
    model_class, config = _smaller(model, _layer_sizes(model, groups, keep))
    small = _build(model, model_class, config, _cut_state(model, groups, keep))
    if "mama" in vars(small.config):
        save_recipe_with(small)  # the recipe lies beside this form too
    return small


def _kept(group: CoupledGroups) -> Tensor:
    """Indices of the groups that do something; the first one if none does."""
    idle = _zero(group.writers)
    weights = [member for member in group.readers if member.parameter.ndim == 2]
    if group.kind == "head" or sum(member.index.shape[1] for member in weights) > 1:
        idle |= _zero(group.readers)
    if idle.all():
        idle[0] = False
    return (~idle).nonzero().flatten()


def _zero(members: tuple[Member, ...]) -> Tensor:
    """Bool [G]: whether all that a group has in the members is zero."""
    zero = torch.ones(len(members[0].index), dtype=torch.bool)
    for member in members:
        rows = member.parameter.detach().movedim(member.dim, 0)
        used = (rows != 0).reshape(len(rows), -1).any(dim=1).cpu()
        zero &= ~used[member.index].any(dim=1)
    return zero


def _nothing_to_cut(groups: list[CoupledGroups]) -> str:
    weights = [m.parameter for group in groups for m in (*group.readers, *group.writers) if m.parameter.ndim == 2]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    sparsity = zeros / sum(weight.numel() for weight in weights)
    return (
        f"There is nothing to cut: {sparsity:.1%} of the weights in attention and FFN are zero, but no neuron and no "
        "key-value head is zero as a whole, beyond the one that each layer keeps. Zeros in single places or N:M "
        "patterns can't be cut out; prune with granularity='neuron', 'head' or 'neuron+head'."
    )


def _layer_sizes(
    model: PreTrainedModel, groups: list[CoupledGroups], keep: dict[str, Tensor]
) -> dict[str, dict[str, int]]:
    """The `per_layer_config` after the cut."""
    lengths = run_lengths(model.config)
    sizes: dict[str, dict[str, int]] = {}
    for group in groups:
        layer, count = sizes.setdefault(str(group.layer), {}), len(keep[group.name])
        if group.kind == "neuron":
            layer["intermediate_size"] = count
        else:
            layer["num_attention_heads"] = count * lengths["q"] // lengths["k"]
            layer["num_key_value_heads"] = count
    return sizes


def _smaller(
    model: PreTrainedModel, sizes: dict[str, dict[str, int]]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """(class, config) of the cut model."""
    values = model.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map", "per_layer_config"):
        values.pop(key, None)
    base_model_type = values.pop("base_model_type", model.config.model_type)
    values.pop("format_version", None)
    config = MamaConfig(**{**values, "base_model_type": base_model_type, "per_layer_config": sizes})
    mama_class = _mama_class(model, config)
    native = _native_config(config, sizes, values)
    if native is None:
        return mama_class, config
    return mama_class.native_classes[type(native)], native


def _mama_class(model: PreTrainedModel, config: MamaConfig) -> type[MamaPreTrainedModel]:
    for mama_class in MODEL_CLASSES.values():
        native = mama_class.native_classes.get(config.native_config, None)
        if isinstance(model, mama_class) or type(model) is native:
            return mama_class
    known = ", ".join(auto_class.__name__ for auto_class in MODEL_CLASSES)
    raise ValueError(f"{type(model).__name__} can't be shrunk: it is not a model of one of the classes {known}.")


def _native_config(
    config: MamaConfig, sizes: dict[str, dict[str, int]], values: dict[str, Any]
) -> PreTrainedConfig | None:
    """The native config with these sizes; `None` if layers differ or it has no way to say how many heads there are."""
    family, first = family_of(config), sizes["0"]
    if any(layer != first for layer in sizes.values()):
        return None
    changes = {family.width: first["intermediate_size"]}
    if first["num_attention_heads"] != config.num_attention_heads:
        if not family.free_heads:
            return None  # the size of a head would follow from the number of heads
        changes |= {key: value for key, value in first.items() if key.startswith("num_")}
        changes["head_dim"] = run_lengths(config)["k"]
    assert config.native_config is not None
    try:
        return config.native_config(**{**values, **changes})
    except StrictDataclassClassValidationError:  # Llama and Gemma want hidden_size to be a multiple of the heads
        return None


def _cut_state(model: PreTrainedModel, groups: list[CoupledGroups], keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict after the cut. It shares no memory with the model."""
    members = [(member, keep[group.name]) for group in groups for member in (*group.readers, *group.writers)]
    cut = {member.name for member, _ in members}
    state = {key: value if key in cut else value.clone() for key, value in model.state_dict().items()}
    for member, kept in members:
        positions = member.index[kept].flatten().sort().values
        state[member.name] = state[member.name].index_select(member.dim, positions.to(state[member.name].device))
    return state


def _build(
    model: PreTrainedModel, model_class: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Tensor]
) -> PreTrainedModel:
    """The cut model, as from a checkpoint: its weights are not drawn first, and its buffers are made anew."""
    olds = dict(model.named_parameters())
    dtype = functools.reduce(torch.promote_types, {old.dtype for old in olds.values()})
    attention = model.config._attn_implementation
    small: Any = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation=attention
    )
    small.config.dtype = model.config.dtype
    for name, new in small.named_parameters():
        new.data = new.data.to(olds[name].dtype)
        new.requires_grad_(olds[name].requires_grad)
    if model.can_generate():
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(model.device).train(model.training)
