"""A model as a sequence of blocks: found, called with what the model's own forward calls them with, and replayed.

Shapes: B = sequences in a batch, T = tokens in a sequence, D = hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import Batch
from .targets import is_linear


_PROBE_TOKENS = 8


class Call(NamedTuple):
    """What a block is called with beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Record(NamedTuple):
    """One call of a module inside a block."""

    module: nn.Module
    input: Tensor
    output: Tensor


class _Reached(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    def __init__(self, value: Tensor) -> None:
        self.value = value


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """
    The decoder (or encoder) layers: the `nn.ModuleList` of the base model with the most parameters, and its name.

    Raises:
        `ValueError`: for an encoder-decoder, or if there is none.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; prune_model needs one sequence of blocks.")
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for _, module in lists]
    if not lists or max(sizes) == 0:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of layers, so its blocks can't be found.")
    return lists[sizes.index(max(sizes))]


@contextmanager
def inference_mode_of(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no cache and no gradients; everything is put back afterwards."""
    training = {module: module.training for module in model.modules()}
    use_cache = getattr(model.config, "use_cache", None)
    model.eval()
    model.config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        if use_cache is None:
            del model.config.use_cache
        else:
            model.config.use_cache = use_cache


def capture(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """
    The first block's hidden states [B, T, D] of each batch, and the calls of each batch's blocks.

    The calls come from the model's own forward, in which every block only hands its input on. Whether blocks called
    in this way give what the model gives is checked on a few tokens.

    Raises:
        `ValueError`: for a model whose blocks are more than a sequence.
    """
    probe = {name: value[:1, :_PROBE_TOKENS] for name, value in batches[0].items()}
    probe["attention_mask"] = torch.ones_like(probe["attention_mask"])
    is_tuple, expected = _own_outputs(model, blocks, probe)
    hidden, calls = _capture_batch(model, blocks, probe, is_tuple)
    for block, call, output in zip(blocks, calls, expected):
        hidden = run(block, hidden, call)
        if not torch.allclose(hidden, output, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"The layers of {type(model).__name__} can't be run one by one: a layer called on its own gives "
                "something else than inside the model. This architecture is not supported by prune_model."
            )
    captured = [_capture_batch(model, blocks, batch, is_tuple) for batch in batches]
    return [hidden for hidden, _ in captured], [calls for _, calls in captured]


def _own_outputs(model: PreTrainedModel, blocks: nn.ModuleList, batch: Batch) -> tuple[list[bool], list[Tensor]]:
    """Each block's output in the model's forward, and whether it is the first of a tuple."""
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    try:
        _forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) != len(blocks):
        raise ValueError(f"{type(model).__name__} called {len(outputs)} of its {len(blocks)} layers: not supported.")
    return [isinstance(output, tuple) for output in outputs], [_first(output) for output in outputs]


def _capture_batch(
    model: PreTrainedModel, blocks: nn.ModuleList, batch: Batch, is_tuple: Sequence[bool]
) -> tuple[Tensor, list[Call]]:
    first: list[Tensor] = []
    calls: list[Call] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        calls.append(Call(args[1:], kwargs))
        first.append(hidden)
        return (hidden,) if is_tuple[len(calls) - 1] else hidden

    with replaced(dict.fromkeys(blocks, stub)):
        _forward(model, batch)
    return first[0], calls


def _forward(model: PreTrainedModel, batch: Batch) -> None:
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    model.base_model(**{name: value.to(device) for name, value in batch.items()})


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules whose `forward` is another function meanwhile."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, replacement in forwards.items():
        module.forward = replacement
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def run(block: nn.Module, hidden: Tensor, call: Call, outputs: Mapping[nn.Module, Any] | None = None) -> Tensor:
    """
    The block's output hidden state [B, T, D].

    Args:
        outputs (`Mapping`, *optional*): modules that are not computed, as their output is known.
    """
    with replaced({module: _constant(output) for module, output in (outputs or {}).items()}):
        return _first(block(hidden, *call.args, **call.kwargs))


def run_to(module: nn.Module, block: nn.Module, hidden: Tensor, call: Call, outputs: dict[nn.Module, Any]) -> Tensor:
    """
    The input of `module` in the block; what comes after it is not computed.

    Args:
        outputs (`dict`): of modules that are not computed, as their output is known. A child of the block (as the
            attention) whose linear modules are all among them takes their place once it has been passed.
    """

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    passed: dict[nn.Module, Any] = {}
    hooks = [module.register_forward_pre_hook(stop)]
    for child in _known_children(block, outputs):
        hooks.append(child.register_forward_hook(lambda module, args, output: passed.__setitem__(module, output)))
    try:
        run(block, hidden, call, outputs)
    except _Reached as reached:
        for child, output in passed.items():
            for inner in child.modules():
                outputs.pop(inner, None)
            outputs[child] = output
        return reached.value
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("the module was called in the dense pass")


def _known_children(block: nn.Module, outputs: Mapping[nn.Module, Any]) -> list[nn.Module]:
    """The block's children that are not known themselves, but all linear modules in them (at least one) are."""
    found = []
    for child in block.children():
        linears = [module for module in child.modules() if is_linear(module)]
        if child not in outputs and linears and all(module in outputs for module in linears):
            found.append(child)
    return found


def record(
    modules: Mapping[nn.Module, str], block: nn.Module, hidden: Tensor, call: Call
) -> tuple[Tensor, list[Record]]:
    """
    The block's output, and the calls of `modules` (module -> name) in their order.

    Raises:
        `ValueError`: for a module that is not called exactly once, or whose tensors are changed in place.
    """
    records: list[Record] = []
    versions: list[tuple[int, int]] = []

    def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        records.append(Record(module, args[0], output))
        versions.append((args[0]._version, output._version))

    hooks = [module.register_forward_hook(take) for module in modules]
    try:
        output = run(block, hidden, call)
    finally:
        for hook in hooks:
            hook.remove()
    called = [entry.module for entry in records]
    for module, name in modules.items():
        if called.count(module) != 1:
            raise ValueError(
                f"{name} is called {called.count(module)} times in a pass of its layer; prune_model needs exactly "
                "one. Put it into exclude_modules."
            )
    for entry, seen in zip(records, versions):
        if (entry.input._version, entry.output._version) != seen:
            raise ValueError(
                f"The input or output of {modules[entry.module]} is changed in place inside its layer, so that it "
                "can't be read. This architecture is not supported by prune_model."
            )
    return output, records


def group_by_input(records: Sequence[Record]) -> list[list[nn.Module]]:
    """The modules in the order of their calls, those that read the same tensor together."""
    groups: list[tuple[Tensor, list[nn.Module]]] = []
    for entry in records:
        for value, members in groups:
            if value is entry.input:
                members.append(entry.module)
                break
        else:
            groups.append((entry.input, [entry.module]))
    return [members for _, members in groups]


def flatten(tensor: Tensor, tokens: Tensor) -> Tensor:
    """[B, T, n] or [B * T, n] -> the rows that `tokens` (bool [B * T]) selects, fp32."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return (rows if bool(tokens.all()) else rows[tokens.to(tensor.device)]).float()  # without padding, no copy


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Call):
        return Call(to_device(value.args, device), to_device(value.kwargs, device))
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(entry, device) for entry in value)
    return value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
