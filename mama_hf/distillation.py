"""Distillation while a trainer prunes: `MamaTrainer`, `MamaSFTTrainer`, and the mixin that `MamaGRPOTrainer` uses too.

Shapes: B = sequences, T = tokens of one.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl import SFTTrainer

from .callback import MamaPruningCallback
from .config import MamaPruningConfig
from .divergence import divergence
from .heads import BackboneCall, OutputHead, backbone_calls
from .teacher import TeacherCallback, unwrap


# What a backbone is called with that is no input of the teacher's: the student's cache, and the loss's denominator.
_STUDENT_ONLY = ("past_key_values", "num_items_in_batch", "use_cache")


class DistillationMixin(Trainer):
    """
    Adds the divergence from a frozen teacher, over the whole vocabulary, to the loss of any trainer of causal language
    models. It costs one forward pass of the teacher's backbone, and none of the student.

    The only changes are `__init__`; `compute_loss`, where the student's hidden states are seen in the forward pass
    that the trainer runs anyway; and `log`, which adds `pruning/distillation_loss`, the divergence per token, and
    `pruning/teacher_agreement`, the share of tokens at which both find the same token the likeliest. Evaluation losses
    are the task's alone. Without a teacher it is the plain trainer, bit for bit.

    Args:
        pruning_config (`MamaPruningConfig`, *optional*): the recipe.
        teacher_model (`PreTrainedModel`, `str` or `os.PathLike`, *optional*):
            a model, a path or Hub id, `"initial"` (the model before training) or `"snapshot"` (a copy taken when
            pruning starts; there is no distillation before). Goes with `distillation_weight > 0` in the recipe.
        shrink_to (`str`, *optional*): as in [`MamaPruningCallback`].
        args, kwargs: as in the trainer.

    Raises:
        `ValueError`: for a teacher without weight or a weight without teacher, and for a teacher that does not fit.
    """

    teacher: TeacherCallback | None = None

    def __init__(
        self,
        *args: Any,
        pruning_config: MamaPruningConfig | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike | None = None,
        shrink_to: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        if shrink_to is not None and pruning_config is None:
            raise ValueError("shrink_to does nothing without pruning_config.")
        super().__init__(*args, **kwargs)
        self.pruning_callback: MamaPruningCallback | None = None
        self.set_teacher(pruning_config, teacher_model)
        if pruning_config is None:
            return
        if any(isinstance(callback, MamaPruningCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("Give either pruning_config or a MamaPruningCallback, not both.")
        self.pruning_callback = self.make_pruning_callback(pruning_config, shrink_to)
        self.add_callback(self.pruning_callback)

    def make_pruning_callback(
        self, config: MamaPruningConfig, shrink_to: str | os.PathLike | None
    ) -> MamaPruningCallback:
        """The callback that prunes in this trainer."""
        return MamaPruningCallback(config, has_teacher=self.teacher is not None, shrink_to=shrink_to)

    def set_teacher(self, config: MamaPruningConfig | None, teacher_model: Any) -> None:
        """Check that recipe and teacher go together, and get the teacher."""
        weight = 0.0 if config is None else config.distillation_weight
        if teacher_model is None and weight == 0:
            return
        if teacher_model is None:
            raise ValueError(
                f'distillation_weight={weight} needs a teacher. Set teacher_model to a model, a path, "initial" or '
                '"snapshot".'
            )
        if config is None or weight == 0:
            raise ValueError(
                "teacher_model does nothing without distillation_weight. Set pruning_config="
                "MamaPruningConfig(distillation_weight=1.0, ...), or leave teacher_model out."
            )
        _check_arguments(self.args)
        self.teacher = TeacherCallback(teacher_model, config, self.model, self.processing_class)  # type: ignore[arg-type]
        self.distilled = torch.zeros(3, device=self.args.device)  # divergence, agreeing tokens, tokens
        self.add_callback(self.teacher)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.teacher is None or self.teacher.model is None or not self.model.training:  # type: ignore[union-attr]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = self.token_weights(inputs, num_items_in_batch)
        with backbone_calls(unwrap(self.model)) as calls:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # a trainer may call the model again, without gradient, for its metrics: the first call is the one that trains
        added = self.teacher.config.distillation_weight * self._divergence(calls[0], weights)
        return (result[0] + added, result[1]) if return_outputs else result + added

    def token_weights(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """
        [B, T - 1]: what the loss multiplies each token's term with, from the second token on; 0 where it has none.

        By default that is [`~transformers.Trainer`]'s mean over the labels that are not -100.
        """
        if "labels" not in inputs:
            raise ValueError("Distillation is on the tokens that have labels, and the batch has no `labels`.")
        mask = (inputs["labels"][:, 1:] != -100).float()
        if num_items_in_batch is None:
            return mask / mask.sum().clamp(min=1)
        # the number counts the tokens of all processes then, and DDP averages their gradients
        num_shares = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return mask * num_shares / num_items_in_batch

    def _divergence(self, call: BackboneCall, weights: Tensor) -> Tensor:
        assert self.teacher is not None
        assert self.teacher.model is not None
        teacher, config = self.teacher.model, self.teacher.config
        kwargs = {key: value for key, value in call.kwargs.items() if key not in _STUDENT_ONLY and value is not None}
        chosen = weights != 0
        with self.accelerator.autocast():
            with torch.no_grad():
                hidden = teacher.base_model(*call.args, **kwargs, use_cache=False)[0]
            loss, total, agreeing = divergence(
                call.hidden[:, :-1][chosen],
                OutputHead.of(unwrap(self.model)),
                hidden[:, :-1][chosen],
                OutputHead.of(teacher),
                weights[chosen],
                config.distillation_direction,
                config.distillation_temperature,
            )
        self.distilled += torch.stack([total, agreeing, chosen.sum()])
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.teacher is not None and "loss" in logs:
            divergence, agreeing, count = self.accelerator.reduce(self.distilled).tolist()
            self.distilled.zero_()
            if count > 0:
                logs |= {
                    "pruning/distillation_loss": divergence / count,
                    "pruning/teacher_agreement": agreeing / count,
                }
        super().log(logs, start_time)


class MamaTrainer(DistillationMixin):
    """[`~transformers.Trainer`] that prunes by `pruning_config` and learns from `teacher_model`."""


class MamaSFTTrainer(DistillationMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] that prunes by `pruning_config` and learns from `teacher_model`."""

    _tag_names = ["trl", "sft", "mama"]


def _check_arguments(args: TrainingArguments) -> None:
    refused = {
        "use_liger_kernel": args.use_liger_kernel,
        "torch_compile": args.torch_compile,
        "n_gpu > 1 without torchrun": args.n_gpu > 1,
    }
    for name, active in refused.items():
        if active:
            raise ValueError(
                f"Distillation does not work with {name}, where hidden states can't be seen from outside. Turn it off."
            )
