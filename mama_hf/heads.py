"""How a language model makes logits of its last hidden states, and how to see those states in someone else's forward.

Shapes: H = hidden size, V = vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel


# Field of a config -> power of it that multiplies the logits, in the order native classes apply them.
_SCALE_FIELDS = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


@dataclass(frozen=True)
class OutputHead:
    """
    What turns a last hidden state [..., H] into logits [..., V]: softcap(scale * (x W^T + b)).

    Args:
        weight (`torch.Tensor` of shape [V, H]): of the output layer.
        bias (`torch.Tensor` of shape [V], *optional*): of the output layer.
        scale (`float`, *optional*, defaults to 1.0): factor of the logits (Cohere, Granite, Falcon-H1).
        softcap (`float`, *optional*): logits become `softcap * tanh(logits / softcap)` (Gemma-2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OutputHead":
        """
        The head of a causal language model, without PEFT's wrapper.

        Raises:
            `ValueError`: if the output layer is not a plain Linear.
        """
        layer = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"Distillation needs an output layer that is a plain nn.Linear, and that of {type(model).__name__} is "
                f"{type(layer).__name__}. Use a causal language model, without an adapter on its output layer."
            )
        fields = model.config.get_text_config().to_dict()
        scales = [fields[name] ** power for name, power in _SCALE_FIELDS.items() if fields.get(name) is not None]
        return cls(layer.weight, layer.bias, math.prod(scales), fields.get("final_logit_softcapping"))

    def to(self, dtype: torch.dtype) -> "OutputHead":
        """The head in another dtype; gradients reach the original."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return OutputHead(self.weight.to(dtype), bias, self.scale, self.softcap)

    def finish(self, projected: Tensor) -> Tensor:
        """x W^T + b of any shape and dtype -> logits in fp32."""
        logits = projected.float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d projected, from the logits."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)


@dataclass(frozen=True)
class BackboneCall:
    """
    One call of a model's backbone.

    Args:
        args (`tuple`): positional arguments.
        kwargs (`dict`): keyword arguments.
        hidden (`torch.Tensor` of shape [B, T, H]): the last hidden states, with their graph.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor


@contextmanager
def backbone_calls(model: PreTrainedModel) -> Iterator[list[BackboneCall]]:
    """The calls of the backbone of `model` while the context is open, in order."""
    calls: list[BackboneCall] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(BackboneCall(args, kwargs, output[0]))

    handle = model.base_model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """What runs inside draws random numbers without the run around it noticing."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """
    Compare the logits of eight tokens with what [`OutputHead`] makes of the last hidden states.

    Raises:
        `ValueError`: if they differ, so that distillation would train on other logits than the model's own.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"Distillation works with decoder-only language models, and {name} has an encoder too.")
    head = OutputHead.of(model)
    tokens = torch.arange(min(8, len(head.weight)), device=model.device).unsqueeze(0)
    with same_random_state(model.device), backbone_calls(model) as calls:
        logits = model(input_ids=tokens, use_cache=False).logits
    hidden = calls[0].hidden.to(head.weight.dtype)
    rebuilt = head.finish(linear(hidden, head.weight, head.bias))
    tolerance = 1e-4 if logits.dtype == torch.float32 else 2e-2
    if rebuilt.shape != logits.shape or (rebuilt - logits).abs().max() > tolerance * logits.abs().max():
        raise ValueError(
            f"The logits of {name} are not those of its output layer on its last hidden states: distillation does not "
            "know how they are made. Use a decoder-only causal language model."
        )
