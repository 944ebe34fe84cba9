"""`MamaPruningCallback`: each event of the trainer is one call to the `Pruner`."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import str_to_bool
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy

from .checkpoint import describe, load_state, save_recipe_with, save_state
from .config import MamaPruningConfig
from .pruner import Pruner, unwrap_optimizer
from .report import TrainingReport
from .reward_check import RewardCheck, RewardState
from .shrink import shrink


logger = logging.getLogger(__name__)


class MamaPruningCallback(TrainerCallback):
    """
    Prunes the model while any transformers or TRL trainer trains it:
    `Trainer(..., callbacks=[MamaPruningCallback(recipe)])`.

    Logs `pruning/sparsity` (fraction of zeros in the targeted weights, or of the groups that are gone),
    `pruning/target` (what the schedule asks for) and `pruning/changed` (share of the mask that the last update
    flipped) with the trainer's own logs; with a reward check also `pruning/reward_check` (the reward it measured
    last), `pruning/rollbacks` and `pruning/held` (updates taken back and left out so far) and, at the last step,
    `pruning/restored` (1 if the last state that held the reward was put back, since the end of training had not).
    When training ends, `report` holds what came of it, and is logged as a table.

    Args:
        config (`MamaPruningConfig`): the recipe.
        resume_from (`str`, *optional*):
            Checkpoint folder to read the pruning state from when the trainer resumes. Needed only where the folder is
            not `{output_dir}/checkpoint-{step}`, as after a move.
        reward_driven (`bool`, *optional*, defaults to `False`): set by [`MamaGRPOTrainer`].
        has_teacher (`bool`, *optional*, defaults to `False`): set by trainers that distil.
        measure_reward (`Callable`, *optional*): () -> reward, for `reward_tolerance`; set by [`MamaGRPOTrainer`].
        shrink_to (`str`, *optional*):
            folder for the served form: when training ends, the model without the neurons or heads that were pruned is
            saved there, with the tokenizer.

    Raises:
        `ValueError`: before the first step, for a recipe that does not fit the run.
    """

    def __init__(
        self,
        config: MamaPruningConfig,
        resume_from: str | os.PathLike | None = None,
        reward_driven: bool = False,
        has_teacher: bool = False,
        measure_reward: Callable[[], float] | None = None,
        shrink_to: str | os.PathLike | None = None,
    ) -> None:
        if not isinstance(config, MamaPruningConfig):
            raise TypeError(f"config must be a MamaPruningConfig, not {type(config).__name__}.")
        if config.distillation_weight > 0 and not has_teacher:
            raise ValueError(
                f"distillation_weight={config.distillation_weight} needs a teacher, and a callback does not see the "
                "loss. Use MamaTrainer, MamaSFTTrainer or MamaGRPOTrainer with pruning_config= and teacher_model=."
            )
        if config.reward_tolerance is not None and measure_reward is None:
            raise ValueError(
                f"reward_tolerance={config.reward_tolerance} with final_sparsity={config.final_sparsity!r} needs a "
                "reward, which only MamaGRPOTrainer(pruning_config=...) has. Elsewhere set reward_tolerance=None and "
                "final_sparsity to a number."
            )
        if shrink_to is not None and not config.is_structured:
            raise ValueError(
                f"shrink_to={str(shrink_to)!r} needs something to cut out, and granularity={config.granularity!r} "
                'leaves zeros in single places. Set granularity="neuron" or leave shrink_to out.'
            )
        self.config, self.shrink_to = config, shrink_to
        self.resume_from = resume_from
        self.reward_driven, self.measure_reward = reward_driven, measure_reward
        self.pruner: Pruner | None = None
        self.report: TrainingReport | None = None
        self._seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._come_first(_calling_handler())
        _check_backend(args, state)
        self.pruner = Pruner(
            model,
            self.config,
            unwrap_optimizer(optimizer),
            state.max_steps,
            generation_alignment(args),
            self.reward_driven,
            args.seed,
            self._reward_check(),
        )
        _check_best_model(args, state, self.pruner)
        if state.global_step > 0:
            load_state(self.pruner, self._resume_folder(args, state), state.global_step)
        else:
            self.pruner.begin()
        self.pruner.attach(model)
        save_recipe_with(model)
        describe(model, self.config, self.pruner.sparsity)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self._timed():
            self._running().observe()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self._timed():
            self._running().hold()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pruner = self._running()
        with self._timed():
            has_changed = pruner.update(state.global_step)
        # with load_best_model_at_end, other weights are judged, after the last step
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            self._finish(kwargs["model"], state)
            control.should_log = control.should_log or pruner.is_restored
        elif has_changed:
            describe(kwargs["model"], self.config, pruner.sparsity)
        best = state.best_global_step
        if args.load_best_model_at_end and best is not None and not pruner.is_final(best):
            # a model that was not pruned to the end yet never stays the best: loading it would undo the pruning
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.pruner is None or logs is None or "loss" not in logs:
            return
        values: dict[str, Any] = {
            "pruning/sparsity": self.pruner.sparsity,
            "pruning/target": self.pruner.target_sparsity(state.global_step),
            "pruning/changed": self.pruner.changed,
        }
        if self.pruner.check is not None:
            check = self.pruner.check.state
            values |= {
                "pruning/reward_check": check.last,
                "pruning/rollbacks": check.num_rollbacks,
                "pruning/held": check.num_held,
                "pruning/restored": int(self.pruner.is_restored),
            }
        logs.update(values)
        state.log_history[-1].update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_state(args, state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a checkpoint is uploaded from inside the trainer's save, before on_save
        if self.pruner is not None and Path(checkpoint_folder(args, state)).is_dir():
            self._save_state(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pruner = self._running()
        pruner.detach()
        self._finish(kwargs["model"], state)
        if pruner.has_adapters:
            logger.warning(
                "The model is sparse in the sum of base and adapter: serve model.merge_and_unload(). The adapter by "
                "itself, loaded on the dense base, is not sparse."
            )
        asked = self.config.final_sparsity
        if not pruner.is_final(state.global_step):
            logger.warning(
                "Training stopped at step %d with %.4f of what is targeted pruned; pruning to a final sparsity of "
                "%s ends at step %d. Resume from the last checkpoint to get there.",
                state.global_step,
                pruner.sparsity,
                f"{asked:.4f}" if isinstance(asked, float) else asked,
                pruner.schedule.final_step,
            )
        elif pruner.is_short and asked != "auto":
            logger.warning(
                "The reward check stopped pruning at %.4f of the targeted weights; final_sparsity=%s was asked for. "
                "Raise reward_tolerance or train for longer.",
                pruner.sparsity,
                asked,
            )
        self._make_report(state)
        if self.shrink_to is not None and state.is_world_process_zero:
            self._save_shrunk(kwargs["model"], kwargs.get("processing_class"), self.shrink_to)

    def _finish(self, model: Any, state: TrainerState) -> None:
        """Judge the reward that training ends with, and let model and log say what came of it."""
        pruner = self._running()
        was_judged = pruner.check is None or pruner.check.state.judged_at == state.global_step
        with self._timed():
            pruner.finish(state.global_step)
        describe(model, self.config, pruner.sparsity)
        if pruner.is_restored and not was_judged:
            logger.warning("Training has restored %s.", self._restored())

    def _restored(self) -> str:
        """Which state was put back, and why."""
        pruner = self._running()
        assert pruner.check is not None, "it decides"
        return (
            f"the state of step {pruner.kept.step}, sparsity {pruner.sparsity:.4f}, because the reward of the "
            f"held-out prompts ended at {pruner.check.state.last:.4f} and had been {pruner.check.state.best:.4f} "
            f"(reward_tolerance={self.config.reward_tolerance})"
        )

    def _save_shrunk(self, model: Any, processing_class: Any, folder: str | os.PathLike) -> None:
        if self._running().num_pruned == 0:
            logger.warning("Nothing was pruned, so nothing is saved to %s.", folder)
            return
        shrink(model).save_pretrained(folder)
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def _reward_check(self) -> RewardCheck | None:
        if self.config.reward_tolerance is None:
            return None
        assert self.measure_reward is not None, "checked in __init__"
        return RewardCheck(self.config.reward_tolerance, self.measure_reward)

    def _make_report(self, state: TrainerState) -> None:
        """What came of it, with the reward of the held-out prompts, or else of the first and last training batch."""
        pruner = self._running()
        rewards: list[float | None] = [
            entry["pruning/reward"] for entry in state.log_history if "pruning/reward" in entry
        ]
        check = RewardState() if pruner.check is None else pruner.check.state
        if pruner.check is not None:
            rewards = [check.first, pruner.kept.reward if pruner.is_restored else check.last]
        self.report = TrainingReport(
            asked=self.config.final_sparsity,
            reached=pruner.sparsity,
            reward_before=rewards[0] if rewards else None,
            reward_after=rewards[-1] if rewards else None,
            stopped_by=pruner.stopped_by(state.global_step),
            restored=self._restored() if pruner.is_restored else None,
            num_rollbacks=check.num_rollbacks,
            num_held=check.num_held,
            num_checks=check.num_checks,
            seconds=self._seconds,
        )
        if state.is_world_process_zero:
            logger.info("%s", self.report)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin

    def _running(self) -> Pruner:
        assert self.pruner is not None, "the trainer calls on_train_begin first"
        return self.pruner

    def _come_first(self, handler: CallbackHandler | None) -> None:
        """
        Move to the front of the trainer's callbacks, so that what `on_log` adds is there when the trackers read it.

        The handler calls each event on its callbacks in order, with those of `report_to` first.
        """
        if handler is None:
            return
        if sum(isinstance(callback, MamaPruningCallback) for callback in handler.callbacks) > 1:
            raise ValueError(
                "There are two MamaPruningCallbacks in this trainer (MamaGRPOTrainer adds its own for "
                "pruning_config). Keep one."
            )
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)

    def _resume_folder(self, args: TrainingArguments, state: TrainerState) -> str | os.PathLike:
        if self.resume_from is not None:
            return self.resume_from
        return resume_folder(args, state)

    def _save_state(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            save_state(self._running(), checkpoint_folder(args, state), state.global_step)


def _calling_handler() -> CallbackHandler | None:
    """The handler that called the event: it hands itself to no callback, so that it is found up the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), CallbackHandler):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def generation_alignment(args: TrainingArguments) -> int:
    """
    Optimizer steps between the points where a step starts on freshly generated completions (1 without generation).

    Masks that change inside a generation batch would make the rest of it off-policy. The online trainers of TRL
    generate every `steps_per_generation * num_iterations` micro-batches.
    """
    settings = vars(args)
    if settings.get("steps_per_generation") is None:
        return 1
    generate_every = settings["steps_per_generation"] * settings["num_iterations"]
    accumulate = args.gradient_accumulation_steps
    if generate_every % accumulate and accumulate % generate_every:
        raise ValueError(
            f"steps_per_generation * num_iterations = {generate_every} and gradient_accumulation_steps = {accumulate} "
            "do not fit: one must divide the other, so that generation batches end where optimizer steps end. Change "
            "steps_per_generation or gradient_accumulation_steps."
        )
    return max(1, generate_every // accumulate)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    """Where the trainer saves this step."""
    return os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")


def resume_folder(args: TrainingArguments, state: TrainerState) -> str:
    """Where the trainer has resumed from."""
    given = args.resume_from_checkpoint
    return given if given is not None and os.path.isdir(given) else checkpoint_folder(args, state)


def _check_backend(args: TrainingArguments, state: TrainerState) -> None:
    # `accelerate launch` says it in the environment and leaves the arguments empty
    launched = {name: str_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "0")) for name in ("DEEPSPEED", "FSDP")}
    unsupported = {
        "DeepSpeed": args.deepspeed or args.deepspeed_plugin or launched["DEEPSPEED"],
        "FSDP": args.fsdp or launched["FSDP"],
        "hyperparameter_search": state.is_hyper_param_search,
    }
    for name, active in unsupported.items():
        if active:
            raise ValueError(
                f"Pruning does not work with {name} yet: weights, gradients or folders are not where masks need them. "
                "Use one process or DDP (torchrun), outside of a search."
            )


def _check_best_model(args: TrainingArguments, state: TrainerState, pruner: Pruner) -> None:
    """With `load_best_model_at_end`, an evaluation must see the fully pruned model; the last step always has one."""
    end = state.max_steps if args.eval_strategy == IntervalStrategy.STEPS else state.num_train_epochs
    if args.load_best_model_at_end and args.eval_delay > end:
        raise ValueError(
            f"load_best_model_at_end needs an evaluation once the final sparsity is reached (step "
            f"{pruner.schedule.final_step}), but eval_delay={args.eval_delay} allows none before the run ends, at "
            f"{end}. Lower eval_delay or turn load_best_model_at_end off."
        )
