"""Which tensors can be pruned: the only room that knows how architectures lay out their weights.

Shapes: O = out, I = in, E = experts, r = LoRA rank.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import MamaPruningConfig


logger = logging.getLogger(__name__)

# Field of a config -> the Linears that its native class gives a bias when it is set.
_BIAS_FIELDS = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}

# Last part of the names of the Linears whose output is added to the residual stream.
_RESIDUAL_WRITERS = (
    *("o_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma, Phi-3 and most others
    *("c_proj", "out_proj"),  # GPT-2, GPT-Neo, GPT-J, OPT's attention
    *("dense", "dense_4h_to_h"),  # GPT-NeoX, Falcon, Bloom, Phi
    *("fc2", "fc_out", "w2", "wo"),
)


@dataclass(eq=False)
class Target:
    """
    One weight that can be pruned.

    Args:
        name (`str`): parameter name in the model, without PEFT's prefixes.
        module (`nn.Module`): the module that owns it (its input is the weight's input, but for experts).
        parameter (`nn.Parameter`): [O, I], [I, O] (Conv1D), [E, O, I] or [E, I, O] (experts).
        input_dim (`int`): dimension of the parameter that is I: -1 or -2.
        has_input (`bool`): whether the module is called with the weight's input x [..., I].
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    input_dim: int = -1
    has_input: bool = True

    @property
    def weight(self) -> Tensor:
        """The weight that acts in the forward pass, in the parameter's shape, without graph."""
        return self.parameter.detach()

    @property
    def gradient(self) -> Tensor | None:
        """dL/dweight of the accumulated batch, in the parameter's shape; `None` where backward has not reached it."""
        return self.parameter.grad

    @property
    def num_inputs(self) -> int:
        """I."""
        return self.parameter.shape[self.input_dim]

    @property
    def row_shape(self) -> tuple[int, int]:
        """(E * O, I)."""
        return self.parameter.numel() // self.num_inputs, self.num_inputs

    def to_rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as [E * O, I]: a view where the layout allows it."""
        return tensor.movedim(self.input_dim, -1).reshape(-1, self.num_inputs)

    def keeps_to(self, tensor: Tensor, num_keep: int, group: int) -> bool:
        """Whether each `group` of neighbours along I, of which I is a multiple, has at most `num_keep` non-zeros."""
        return int((self.to_rows(tensor).reshape(-1, group) != 0).sum(dim=1).max()) <= num_keep

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `to_rows`, contiguous."""
        shape = self.parameter.movedim(self.input_dim, -1).shape
        return rows.reshape(shape).movedim(-1, self.input_dim).contiguous()


@dataclass(eq=False)
class LoraTarget(Target):
    """
    The Linear inside a LoRA layer. What acts is W + s B A, and it is that sum which is pruned.

    The base weight W is frozen. Where the mask is False it is set to -s B A, so that the sum is exactly zero, in the
    forward pass and after PEFT's own merge. The gradient is how training moves the sum, d(s B A) = s (dB A + B dA):
    the step of gradient descent on the factors, to first order.
    """

    module: Any
    adapter: str = "default"

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach() + self._delta()

    @property
    def gradient(self) -> Tensor | None:
        factor_a, factor_b = self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight
        if factor_a.grad is None or factor_b.grad is None:
            return None
        moved = factor_b.grad @ factor_a.detach() + factor_b.detach() @ factor_a.grad
        return (moved.T if self.module.fan_in_fan_out else moved) * self.module.scaling[self.adapter]

    def apply_mask_(self, mask: Tensor) -> None:
        """Make W + s B A zero in place where `mask` (bool, the parameter's shape) is False."""
        self.parameter.data = torch.where(mask, self.parameter.data, -self._delta())

    @torch.no_grad()
    def _delta(self) -> Tensor:
        return self.module.get_delta_weight(self.adapter)


def writes_to_residual(name: str) -> bool:
    """Whether a module of this name is, in the architectures known, one whose output is added to the residual."""
    return name.rsplit(".", 1)[-1] in _RESIDUAL_WRITERS


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one weight matrix that multiplies its input."""
    return isinstance(module, nn.Linear | Conv1D)


def add_biases(model: PreTrainedModel, targets: list[Target]) -> Callable[[], None]:
    """
    Give each target a bias (zero) where the model's native class has a field for it, and set the field.

    Returns:
        `Callable`: takes the biases away again.

    Raises:
        `ValueError`: if the native class has none, by name.
    """
    fields = {_bias_field(model, target) for target in targets if target.module.bias is None}
    suffixes = [suffix for field in fields for suffix in _BIAS_FIELDS[field]]
    linears = [(name, module) for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes]
    bare: list[Any] = [module for _, module in linears if isinstance(module, nn.Linear) and module.bias is None]
    before = {field: getattr(model.config, field) for field in fields}

    def undo() -> None:
        for module in bare:
            module.bias = None
        for field, value in before.items():
            setattr(model.config, field, value)

    for module in bare:
        module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    for field in fields:
        setattr(model.config, field, True)
    with torch.device("meta"):
        native = type(model)(copy.deepcopy(model.config))
    if native.state_dict().keys() != model.state_dict().keys():
        undo()
        raise ValueError(
            f"{type(model).__name__} has no place for the biases of move_values='bias'. Use another rule."
        )
    return undo


def _bias_field(model: PreTrainedModel, target: Target) -> str:
    suffix = target.name.removesuffix(".weight").rsplit(".", 1)[-1]
    for field, suffixes in _BIAS_FIELDS.items():
        if suffix in suffixes and field in model.config.to_dict():
            return field
    raise ValueError(
        f"move_values='bias' needs a bias, and {type(model).__name__} has no place for one at {target.name}. Use "
        "move_values='least_squares', or add it to exclude_modules."
    )


def find_targets(model: nn.Module, config: MamaPruningConfig, trainable_only: bool = True) -> list[Target]:
    """
    The weights of `model` that the recipe prunes, in the model's order.

    With `"all-linear"` these are the weights of nn.Linear, transformers' Conv1D and experts held as one 3-D parameter.
    Embeddings, the output layer, tied weights and weights without a gradient are left out with a logged reason.

    Args:
        trainable_only (`bool`, *optional*, defaults to `True`): leave out weights with `requires_grad=False`.

    Raises:
        `ValueError`: if nothing matches, or for a matching module that can't be pruned (quantized, an unsupported
        adapter), by name.
    """
    targets = []
    for target in matching_targets(model, config):
        if trainable_only and not isinstance(target, LoraTarget) and not target.parameter.requires_grad:
            logger.info("%s is not pruned: it has no gradient (requires_grad=False).", target.name)
            continue
        _check_prunable(target, config)
        targets.append(target)
    if not targets:
        candidates = [name for name, _ in _candidates(model)]
        raise ValueError(
            f"No weight can be pruned: target_modules={config.target_modules!r}, exclude_modules="
            f"{config.exclude_modules!r} leave none. Modules with a weight: {', '.join(candidates) or 'none'}. "
            "Embeddings, the output layer, tied and frozen weights are never pruned."
        )
    return targets


def matching_targets(model: nn.Module, config: MamaPruningConfig) -> Iterator[Target]:
    """The weights in the recipe's modules, trainable or not, on any device; embeddings and the like are left out."""
    skipped = _untargetable(model)
    for name, target in _candidates(model):
        if not matches(name, config.target_modules) or (
            config.exclude_modules is not None and matches(name, config.exclude_modules)
        ):
            continue
        if id(target.parameter) in skipped:
            logger.info("%s is not pruned: %s.", target.name, skipped[id(target.parameter)])
            continue
        yield target


def _candidates(model: nn.Module) -> Iterator[tuple[str, Target]]:
    """(module name, target) for each module that holds a weight matrix, PEFT's prefixes removed."""
    module: Any
    for full_name, module in model.named_modules():
        name = plain_name(full_name)
        if _is_lora(module):
            base = module.get_base_layer()
            layout = -2 if isinstance(base, Conv1D) else -1
            weight = base.weight if hasattr(base, "weight") else next(base.parameters())  # refused later, by name
            adapter = module.active_adapters[0] if module.active_adapters else "default"
            yield name, LoraTarget(f"{name}.weight", module, weight, layout, adapter=adapter)
        elif full_name.endswith((".base_layer", ".original_module")) or ".lora_" in full_name:
            continue
        elif isinstance(module, nn.Linear):
            yield name, Target(f"{name}.weight", module, cast(nn.Parameter, module.weight))
        elif isinstance(module, Conv1D):
            yield name, Target(f"{name}.weight", module, module.weight, input_dim=-2)
        elif _holds_experts(module):
            # transformers 5: [E, I, O] where the module says `is_transposed`, [E, O, I] where it denies it
            layout = -2 if getattr(module, "is_transposed", False) else -1
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield name, Target(f"{name}.{key}", module, parameter, layout, has_input=False)


def _holds_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts")


def plain_name(name: str) -> str:
    """A parameter's or module's name without what PEFT's wrappers add to it."""
    return re.sub(r"^base_model\.model\.|\.modules_to_save\.[^.]+|\.base_layer", "", name)


def _is_lora(module: Any) -> bool:
    """PEFT is optional, so that its layers are told by their parts."""
    is_layer = hasattr(module, "lora_A") and hasattr(module, "get_base_layer")
    return is_layer and not isinstance(module.get_base_layer(), nn.Embedding)


def _untargetable(model: Any) -> dict[int, str]:
    """id of a parameter -> why it is never pruned."""
    reasons: dict[int, str] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            owner = f"{name}.{key}"
            if isinstance(module, nn.Embedding):
                reasons[id(parameter)] = "it is an embedding"
            elif id(parameter) in owners and owners[id(parameter)] != owner:
                reasons.setdefault(id(parameter), f"it is tied to {owners[id(parameter)]}")
            owners.setdefault(id(parameter), owner)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper
    if isinstance(inner, PreTrainedModel):
        # lm_head, classifier, score, qa_outputs: what stands beside the base model
        outputs = [inner.get_output_embeddings(), *(child for child in inner.children() if type(child) is nn.Linear)]
        for output in filter(None, outputs):
            for parameter in output.parameters():
                reasons.setdefault(id(parameter), "it is the output layer")
    return reasons


def matches(name: str, pattern: str | list[str]) -> bool:
    """Whether a module of this name is meant by a recipe's `target_modules` or `exclude_modules`."""
    if pattern == "all-linear":
        return True
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def _check_prunable(target: Target, config: MamaPruningConfig) -> None:
    name, parameter = target.name, target.parameter
    if (
        parameter.is_meta
        or not parameter.is_floating_point()
        or type(target.module).__name__ in ("Linear4bit", "Linear8bitLt")
    ):
        raise ValueError(
            f"{name} is {parameter.dtype} on {parameter.device} in a {type(target.module).__name__}: quantized or not "
            "materialized base weights can't be masked. Load the model in float32 or bfloat16."
        )
    if _holds_experts(target.module) and not hasattr(target.module, "is_transposed"):
        raise ValueError(
            f"{name} holds the experts of a {type(target.module).__name__}, which does not say which dimension is the "
            "input. Add it to exclude_modules."
        )
    if config.n_of_m is not None and target.num_inputs % config.n_of_m[1]:
        raise ValueError(
            f"granularity={config.granularity!r} needs an input dimension divisible by {config.n_of_m[1]}, but {name} "
            f"has {target.num_inputs}. Add it to exclude_modules or choose another pattern."
        )
    if config.criterion == "wanda" and not target.has_input:
        raise ValueError(
            f"criterion='wanda' needs the input of each weight, and {name} holds all experts of its layer in one "
            "parameter whose inputs are not visible. Use 'mama' or 'magnitude', or exclude it."
        )
    if isinstance(target, LoraTarget):
        _check_adapter(target)


def _check_adapter(target: LoraTarget) -> None:
    layer, problem = target.module, None
    if len(layer.active_adapters) != 1:
        problem = f"{len(layer.active_adapters)} active adapters (activate exactly one)"
    elif layer.merged:
        problem = "an adapter that is merged already (unmerge it before training)"
    elif layer.lora_variant.get(target.adapter) is not None or type(layer).__name__ not in ("Linear",):
        problem = f"the adapter type {type(layer).__name__} or a LoRA variant such as DoRA (use plain LoRA on Linear)"
    elif not isinstance(layer.lora_dropout[target.adapter], nn.Identity):
        problem = "lora_dropout > 0, which lets pruned weights act as noise (set lora_dropout=0)"
    elif layer.lora_A[target.adapter].weight.dtype != target.parameter.dtype:
        problem = (
            f"a base weight in {target.parameter.dtype} and an adapter in "
            f"{layer.lora_A[target.adapter].weight.dtype}, which would not merge to exact zeros (load the base in the "
            "adapter's dtype, or pass autocast_adapter_dtype=False)"
        )
    if problem is not None:
        raise ValueError(f"{target.name} can't be pruned through LoRA: it has {problem}.")
