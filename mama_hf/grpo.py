"""`MamaGRPOTrainer`: TRL's GRPOTrainer with a pruner that hears of the rewards."""

import os
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOTrainer

from .callback import MamaPruningCallback
from .config import MamaPruningConfig
from .distillation import DistillationMixin
from .heldout import HeldOutReward, check_rows, hold_out
from .targets import LoraTarget, find_targets


class MamaGRPOTrainer(DistillationMixin, GRPOTrainer):
    """
    Prunes while GRPO trains; the rewards decide what is kept.

    The only changes with respect to [`~trl.GRPOTrainer`] are those of [`DistillationMixin`], which adds a
    [`MamaPruningCallback`] and, with a teacher, its loss; and `_generate_and_score_completions`, which tells the
    pruner how the batch was rewarded. Masks change on generation boundaries. With `pruning_config=None` it is a
    GRPOTrainer, bit for bit.

    Logs beside the callback's `pruning/sparsity`, `pruning/target` and `pruning/changed`: `pruning/reward`, the mean
    reward of the generation batch, and `pruning/signal`, the share of its groups whose rewards differ (the others have
    zero advantage). Steps on a batch with signal 0 leave the pruning statistics as they are.

    Args:
        pruning_config (`MamaPruningConfig`, *optional*): the recipe.
        pruning_eval_dataset (`Dataset` or `list[dict]`, *optional*):
            held-out prompts for `reward_tolerance`, with the columns of the train set. `None`: its last rows, taken
            out of training (5 %, at most 16 to 64; see `hold_out`).
        teacher_model (*optional*): as in [`DistillationMixin`]; the completions' tokens are distilled.
        shrink_to (`str`, *optional*): as in [`MamaPruningCallback`].
        args, kwargs: as in [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: for a second pruning callback, LoRA with `beta > 0`, a teacher that does not fit, or held-out
            prompts that can't be had.
    """

    _tag_names = ["trl", "grpo", "mama"]

    def __init__(
        self,
        *args: Any,
        pruning_config: MamaPruningConfig | None = None,
        pruning_eval_dataset: Dataset | list[dict[str, Any]] | None = None,
        teacher_model: Any = None,
        shrink_to: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        if pruning_eval_dataset is not None and (pruning_config is None or pruning_config.reward_tolerance is None):
            raise ValueError(
                "pruning_eval_dataset is for the reward check: set reward_tolerance in pruning_config, or drop it."
            )
        self._pruning_eval_dataset = pruning_eval_dataset
        super().__init__(
            *args, pruning_config=pruning_config, teacher_model=teacher_model, shrink_to=shrink_to, **kwargs
        )

    def make_pruning_callback(
        self, config: MamaPruningConfig, shrink_to: str | os.PathLike | None
    ) -> MamaPruningCallback:
        """The callback that hears of the rewards, and measures them where the recipe asks for a check."""
        assert isinstance(self.model, nn.Module)
        targets = find_targets(self.model, config)
        if self.beta != 0 and any(isinstance(target, LoraTarget) for target in targets):
            raise ValueError(
                f"beta={self.beta} does not go with pruning through LoRA: TRL's reference is the model with the "
                "adapter switched off, and pruning rewrites that base. Set beta=0 or train without LoRA."
            )
        measure = None if config.reward_tolerance is None else self._held_out_reward(self._pruning_eval_dataset)
        return MamaPruningCallback(
            config,
            reward_driven=True,
            has_teacher=self.teacher is not None,
            measure_reward=measure,
            shrink_to=shrink_to,
        )

    def _held_out_reward(self, dataset: Dataset | list[dict[str, Any]] | None) -> Callable[[], float]:
        if dataset is None:
            self.train_dataset, dataset = hold_out(self.train_dataset, vars(self.args)["generation_batch_size"])
        check_rows(dataset)
        return HeldOutReward(self, dataset).measure

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor | Any]:
        outputs = super()._generate_and_score_completions(inputs)
        pruner = None if self.pruning_callback is None else self.pruning_callback.pruner
        if pruner is not None and self.model.training:  # type: ignore[union-attr]
            metrics = self._metrics["train"]
            signal = 1.0 - metrics["frac_reward_zero_std"][-1]
            metrics["pruning/reward"].append(metrics["reward"][-1])
            metrics["pruning/signal"].append(signal)
            pruner.observe_rewards(signal)
        return outputs

    def token_weights(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """[B, T - 1]: what the policy loss multiplies each token's term with, by `loss_type`; 0 in prompts."""
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).float()
        accumulated = self.current_gradient_accumulation_steps
        assert accumulated is not None, "the trainer sets it before a step"
        if self.loss_type in ("grpo", "sapo"):
            weights = mask / mask.sum(dim=-1, keepdim=True).clamp(min=1) / (len(mask) * accumulated)
        elif self.loss_type == "bnpo":
            weights = mask / (mask.sum().clamp(min=1) * accumulated)
        elif self.loss_type == "dr_grpo":
            weights = mask / (len(mask) * self.max_completion_length * accumulated)  # type: ignore[operator]
        elif self.loss_type == "luspo":
            weights = mask / (len(mask) * accumulated)
        elif self.loss_type in ("cispo", "dapo", "vespo"):
            # TRL's count is of the whole generation batch and of all processes
            num_tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            share = accumulated / self.args.steps_per_generation  # type: ignore[attr-defined]
            weights = mask / (num_tokens * share)
        else:
            raise ValueError(f"Distillation does not know how loss_type={self.loss_type!r} weighs tokens. Use 'dapo'.")
        return nn.functional.pad(weights, (inputs["prompt_ids"].shape[1] - 1, 0))
