"""The reward check inside `MamaGRPOTrainer`: what it measures, that it leaves no trace, and what it takes back."""

import copy
import json
import logging
import math
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix6
import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_grpo import assert_same, digit_sum, logs, optimizer_state, prunable, sparsity, steps
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from mama_hf import MamaGRPOTrainer, MamaPruningCallback, MamaPruningConfig, sparsity_report
from mama_hf.heldout import HeldOutReward, hold_out


Train = Callable[..., MamaGRPOTrainer]


def recipe(**overrides: Any) -> MamaPruningConfig:
    values = {"final_sparsity": 0.6, "reward_tolerance": 1.0, "start": 2, "end": 8, "update_every": 1}
    return MamaPruningConfig(**{**values, **overrides})


def held_out(num_prompts: int = 6) -> Dataset:
    return mix6.grpo_dataset(seed=7, num_prompts=num_prompts)


def small_sum(completions: list[str], **kwargs: Any) -> list[float]:
    """`digit_sum` on a scale where tolerance 1 is never reached."""
    return [reward / 10 for reward in digit_sum(completions)]


class Scripted:
    """The given rewards on held-out prompts, one a check, the last one for ever; the digit sum while training."""

    __name__ = "scripted"

    def __init__(self, *rewards: float | None, batch: int = 6) -> None:
        self.rewards, self.batch, self.checks = list(rewards), batch, 0

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float | None]:
        if len(completions) != self.batch:
            return digit_sum(completions)
        self.checks += 1
        return [self.rewards[min(self.checks, len(self.rewards)) - 1]] * self.batch


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama", vocab_size=len(mix6.build_tokenizer()))


@pytest.fixture
def make_trainer(tmp_path: Path) -> Train:
    """`make_trainer(model, recipe, ...)`: 10 steps of 2 prompts x 4 generations, 6 held-out prompts."""

    def make(
        model: PreTrainedModel,
        config: MamaPruningConfig,
        reward: Callable = small_sum,
        keywords: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> MamaGRPOTrainer:
        settings = {"max_steps": 10, "per_device_train_batch_size": 8, "num_generations": 4, "learning_rate": 1e-3}
        settings |= {"max_completion_length": 4, "disable_tqdm": True, "warmup_steps": 0}
        checked = {} if config.reward_tolerance is None else {"pruning_eval_dataset": held_out()}
        trainer = MamaGRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=mix6.grpo_arguments(str(tmp_path / "run"), seed=0, **{**settings, **overrides}),
            processing_class=mix6.build_tokenizer(),
            pruning_config=config,
            **({"train_dataset": mix6.grpo_dataset(0, 64)} | checked | (keywords or {})),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


@pytest.fixture
def train(make_trainer: Train) -> Train:
    def run(*args: Any, resume: Path | None = None, **keywords: Any) -> MamaGRPOTrainer:
        trainer = make_trainer(*args, **keywords)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    return run


def check_state(trainer: MamaGRPOTrainer) -> Any:
    return trainer.pruning_callback.pruner.check.state


# ---------------------------------------------------------------------------------------------- measuring


def test_it_is_the_mean_reward_of_greedy_completions(model: PreTrainedModel, make_trainer: Train) -> None:
    trainer = make_trainer(model, recipe())
    prompts = list(held_out()["prompt"])
    tokenizer = mix6.build_tokenizer()
    ids = tokenizer(prompts, return_tensors="pt").input_ids
    output = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    completions = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    measured = HeldOutReward(trainer, held_out()).measure()
    assert measured == pytest.approx(np.mean(small_sum(completions)))
    assert measured == HeldOutReward(trainer, held_out()).measure()


def test_batches_of_any_size_give_the_same_mean(model: PreTrainedModel, make_trainer: Train) -> None:
    means = []
    for batch_size in (16, 4):  # all prompts at once; 4 and 2 of them
        trainer = make_trainer(model, recipe(), per_device_train_batch_size=batch_size)
        means.append(HeldOutReward(trainer, held_out()).measure())
    assert means[0] == pytest.approx(means[1])


def test_rows_without_a_reward_do_not_count(model: PreTrainedModel, make_trainer: Train) -> None:
    def some(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None] * 4 + [1.0, 3.0] if len(completions) == 6 else [None, 1.0, 2.0, 3.0][: len(completions)]

    assert HeldOutReward(make_trainer(model, recipe(), some), held_out()).measure() == 2.0
    by_batches = make_trainer(model, recipe(), lambda completions, **kwargs: [None] * len(completions))
    assert math.isnan(HeldOutReward(by_batches, held_out()).measure())


def snapshot(trainer: MamaGRPOTrainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values, tensors)."""
    values = {
        "python": random.getstate()[1],
        "numpy": [each.tolist() if isinstance(each, np.ndarray) else each for each in np.random.get_state()],
        "modes": [module.training for module in trainer.model.modules()],
        "generation": (trainer.generation_config.to_dict(), trainer.num_generations_eval),
        "model generation": trainer.model.generation_config.to_dict(),
        "step": (trainer._step, trainer.state.num_input_tokens_seen, trainer.state.global_step),
        "records": copy.deepcopy(
            [trainer._metrics, trainer._logs, trainer._pending_metrics, trainer._pending_extra_logs]
        ),
        "history": copy.deepcopy(trainer.state.log_history),
    }
    return values, {
        "torch": torch.get_rng_state(),
        "buffer": copy.deepcopy(trainer._buffered_inputs),
        "weights": copy.deepcopy(dict(trainer.model.state_dict())),
    }


def test_it_leaves_no_trace(model: PreTrainedModel, make_trainer: Train) -> None:
    def restless(
        completions: list[str], log_extra: Callable, log_metric: Callable, **kwargs: Any
    ) -> list[float | None]:
        log_metric("mine", 1.0)
        log_extra("column", ["x"] * len(completions))
        return [random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in completions]

    trainer = make_trainer(model, recipe(reward_tolerance=None), restless, steps_per_generation=2)
    meter = HeldOutReward(trainer, held_out())

    class Witness(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.model.layers[0].eval()  # a mode of its own
            before = snapshot(trainer)
            rewards = meter.measure(), meter.measure()
            assert rewards[0] == rewards[1]
            after = snapshot(trainer)
            assert before[0] == after[0]
            assert_same(before[1], after[1])

    trainer.add_callback(Witness())
    trainer.train()


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "num_iterations": 2}], ids=["1", "ga2"])
def test_a_check_that_never_triggers_changes_nothing(
    model: PreTrainedModel, train: Train, settings: dict[str, Any]
) -> None:
    plain = train(copy.deepcopy(model), recipe(reward_tolerance=None), **settings)
    checked = train(copy.deepcopy(model), recipe(), **settings)
    assert check_state(checked).num_checks > 2
    assert check_state(checked).num_rollbacks == check_state(checked).num_held == 0
    assert_same(dict(plain.model.state_dict()), dict(checked.model.state_dict()))
    assert_same(optimizer_state(plain), optimizer_state(checked))
    assert_same(plain.pruning_callback.pruner.masks, checked.pruning_callback.pruner.masks)
    check_logs = ("pruning/reward_check", "pruning/rollbacks", "pruning/held", "pruning/restored")
    assert logs(plain) == logs(checked, but=check_logs)
    assert all(key in entry for key in check_logs for entry in steps(checked))


# ---------------------------------------------------------------------------------------------- rolling back


def full_state(trainer: MamaGRPOTrainer) -> list[Any]:
    pruner = trainer.pruning_callback.pruner
    tensors, values = pruner.state_dict()
    values.pop("reward_check")
    values.pop("kept")
    values.pop("is_collecting")  # a matter of the step; and an update uses up what was collected for it
    tensors = {name: value for name, value in tensors.items() if not name.startswith(("moving.", "kept."))}
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return copy.deepcopy([weights, optimizer_state(trainer), tensors, values, pruner.sparsity])


@pytest.mark.parametrize(
    "config",
    [{}, {"criterion": "taylor"}, {"criterion": "wanda"}, {"regrowth": 0.3}, {"granularity": "2:4"}, {"scope": "row"}]
    + [{"move_values": "least_squares"}, {"move_values": "least_squares", "criterion": "displacement"}],
    ids=str,
)
def test_a_rollback_restores_all_bit_for_bit(model: PreTrainedModel, make_trainer: Train, config: dict) -> None:
    """After the third and the fourth update that is tried, the reward is 0; before the fourth it is 1."""
    rewards = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    final = 0.5 if "granularity" in config else 0.6
    trainer = make_trainer(
        model, recipe(end=10, reward_tolerance=0.05, final_sparsity=final, **config), Scripted(*rewards)
    )
    pruner_of = trainer.pruning_callback
    compared = []

    class Witness(TrainerCallback):
        """Sits between the optimizer's step and the update, and right after the update."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            update = pruner_of.pruner.update

            def watched(step: int) -> bool:
                before, rollbacks = full_state(trainer), check_state(trainer).num_rollbacks
                result = update(step)
                if check_state(trainer).num_rollbacks > rollbacks:
                    assert not result
                    assert_same(full_state(trainer), before)
                    compared.append(step)
                return result

            pruner_of.pruner.update = watched

    trainer.add_callback(Witness())
    trainer.train()
    assert len(compared) == 2
    assert steps(trainer)[-1]["pruning/rollbacks"] == 2
    assert pruner_of.pruner._before is None


def test_heads_are_taken_back_and_neurons_stay(model: PreTrainedModel, make_trainer: Train) -> None:
    """Each kind is tried and measured by itself; after the roll-back, heads hold while neurons go on."""
    rewards = [1.0, 1.0, 0.0, 1.0]  # before training; neurons and heads at step 2; from then on
    span = {"start": 2, "end": 3, "initial_sparsity": 0.25, "final_sparsity": 0.5}
    trainer = make_trainer(model, recipe(granularity="neuron+head", reward_tolerance=0.05, **span), Scripted(*rewards))
    trainer.train()
    pools, masks = trainer.pruning_callback.pruner.pools, trainer.pruning_callback.pruner.masks
    kept = {kind: torch.cat([masks[place] for place in places]).float().mean() for kind, places in pools.kinds.items()}
    assert kept == {"neuron": 0.5, "head": 1.0}
    assert (check_state(trainer).num_rollbacks, check_state(trainer).num_held) == (1, 1)


def test_a_rollback_with_lora(model: PreTrainedModel, make_trainer: Train) -> None:
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    rewards = Scripted(1.0, 1.0, 1.0, 0.0, 1.0)
    trainer = make_trainer(model, recipe(reward_tolerance=0.05), rewards, keywords={"peft_config": lora})
    seen: list[Any] = []

    class Witness(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({name: value.clone() for name, value in prunable(trainer.model).items()})

    trainer.add_callback(Witness())
    trainer.train()
    assert check_state(trainer).num_rollbacks == 1
    merged = trainer.model.merge_and_unload()
    assert sparsity(merged) >= trainer.pruning_callback.pruner.sparsity > 0
    assert trainer.pruning_callback.report["reached"] < 0.6


def test_nan_in_mid_run_skips_updates_with_a_warning(
    model: PreTrainedModel, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = train(model, recipe(), Scripted(1.0, 1.0, 1.0, None, None, 1.0))
    assert check_state(trainer).num_held >= 1
    assert "got nan from the reward functions" in caplog.text
    assert 0 < sparsity(model) == trainer.pruning_callback.pruner.sparsity


# ---------------------------------------------------------------------------------------------- putting back


class TurnsToNoise:
    """1 on held-out prompts until step 4 is done, then what is far below it; the digit sum while training."""

    __name__ = "turns_to_noise"

    def __init__(self, noise: float | None = 0.5) -> None:
        self.noise = noise

    def __call__(self, completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float | None]:
        if len(completions) != 6:
            return digit_sum(completions)
        step = trainer_state.global_step
        return [1.0 if step <= 4 or self.noise is None else self.noise + step / 100] * 6


class Recorder(TrainerCallback):
    """The weights after each step."""

    def __init__(self, trainer: MamaGRPOTrainer) -> None:
        self.model, self.weights = trainer.model, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = {name: value.clone() for name, value in self.model.state_dict().items()}


NOISY = [
    {"final_sparsity": "auto"},
    {"final_sparsity": 0.8},
    {"granularity": "neuron", "final_sparsity": "auto", "multiple_of": 1},
    {"granularity": "neuron+head", "final_sparsity": 0.75, "initial_sparsity": 0.5},
    {"move_values": "bias"},
    {"regrowth": 0.3},
]


@pytest.mark.parametrize("config", NOISY, ids=str)
def test_noise_stops_the_pruning_and_the_last_good_state_is_put_back(
    make_model: Callable[..., PreTrainedModel], make_trainer: Train, config: dict[str, Any], caplog: Any
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if "move_values" in config else {}
    model = make_model("llama", vocab_size=len(mix6.build_tokenizer()), **biases)
    config = recipe(reward_tolerance=0.1, **config)
    trainer = make_trainer(model, config, TurnsToNoise(), logging_steps=4)  # restoring logs the last step, too
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    pruner, report = trainer.pruning_callback.pruner, trainer.pruning_callback.report
    assert_same(recorder.weights[4], dict(model.state_dict()))
    assert 0 < pruner.sparsity == report["reached"] == model.config.mama["sparsity"] < pruner.schedule.final_sparsity
    found = sparsity_report(model)
    kinds = (
        found["groups"].values() if config.is_structured else [found["targets"] | {"groups": pruner.pools.num_units}]
    )
    zeros = sum(row["zeros"] for row in kinds)
    assert zeros == pruner.num_pruned if config.regrowth == 0 else zeros > pruner.num_pruned  # regrowth starts from 0
    assert (report["reward_after"], report["stopped_by"]) == (1.0, "the reward check")
    assert [entry["pruning/restored"] for entry in steps(trainer)] == [0, 0, 1]
    message = f"the state of step 4, sparsity {pruner.sparsity:.4f}, because the reward of the held-out prompts ended"
    assert report["restored"].startswith(f"{message} at 0.6000 and had been 1.0000")
    assert caplog.text.count(message) == 1
    assert all((tensor[~mask] == 0).all() for tensor, mask in zip(held_momenta(trainer), pruner._entry_masks))


def held_momenta(trainer: MamaGRPOTrainer) -> list[torch.Tensor]:
    pruner = trainer.pruning_callback.pruner
    return [pruner.optimizer.state[target.parameter]["exp_avg"] for target in pruner.pools.held]


def test_noise_from_the_start_gives_the_model_back(model: PreTrainedModel, train: Train) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, recipe(reward_tolerance=0.1), Scripted(1.0, 0.0))
    assert_same(before, dict(model.state_dict()))
    assert trainer.pruning_callback.pruner.masks is None
    assert "state of step 0, sparsity 0.0000" in trainer.pruning_callback.report["restored"]


def test_what_is_put_back_has_the_running_best(model: PreTrainedModel, make_trainer: Train) -> None:
    """A check before an update that raises the best keeps the state, though the update is then taken back."""
    trainer = make_trainer(model, recipe(reward_tolerance=0.1, end=9), Scripted(0.5, 0.5, 0.0, 1.0, 0.0, 0.5))
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()  # kept at step 3; taken back at 4 and, after 1.0 before it, at 7
    assert trainer.pruning_callback.pruner.kept.step == 7
    assert_same(recorder.weights[7], dict(model.state_dict()))
    assert trainer.pruning_callback.report["reward_after"] == 1.0


def test_no_reward_at_the_end_puts_back_too(model: PreTrainedModel, make_trainer: Train) -> None:
    trainer = make_trainer(model, recipe(reward_tolerance=0.1), TurnsToNoise(math.nan))
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    assert_same(recorder.weights[4], dict(model.state_dict()))


def test_stopping_early_puts_back_too(model: PreTrainedModel, make_trainer: Train) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 6

    trainer = make_trainer(model, recipe(reward_tolerance=0.1), TurnsToNoise(), keywords={"callbacks": [Stop()]})
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    assert_same(recorder.weights[4], dict(model.state_dict()))
    assert "state of step 4" in trainer.pruning_callback.report["restored"]


def test_lora_is_put_back_with_its_base(model: PreTrainedModel, make_trainer: Train) -> None:
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(model, recipe(reward_tolerance=0.1), TurnsToNoise(), keywords={"peft_config": lora})
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    assert_same(recorder.weights[4], dict(trainer.model.state_dict()))
    assert sparsity(trainer.model.merge_and_unload()) >= trainer.pruning_callback.report["reached"] > 0


@pytest.mark.parametrize("config", [{}, {"granularity": "neuron", "multiple_of": 1}], ids=str)
def test_resume_under_noise_equals_uninterrupted(
    model: PreTrainedModel, train: Train, tmp_path: Path, config: dict[str, Any]
) -> None:
    """What is kept comes from the checkpoint: it is older than that."""
    config = recipe(reward_tolerance=0.1, final_sparsity="auto", **config)
    settings = {"save_strategy": "steps", "save_steps": 3}
    full = train(copy.deepcopy(model), config, TurnsToNoise(), **settings)
    assert "state of step 4" in full.pruning_callback.report["restored"]
    for step in (6, 9):
        folder = tmp_path / f"run/checkpoint-{step}"
        resumed = train(copy.deepcopy(model), config, TurnsToNoise(), resume=folder, **settings)
        assert_same(dict(full.model.state_dict()), dict(resumed.model.state_dict()))
        assert_same(full.pruning_callback.pruner.masks, resumed.pruning_callback.pruner.masks)
        assert check_state(full) == check_state(resumed)
        assert logs(full) == logs(resumed)
        reports = [trainer.pruning_callback.report for trainer in (full, resumed)]
        assert {**reports[0], "seconds": 0} == {**reports[1], "seconds": 0}


# ---------------------------------------------------------------------------------------------- auto, the report


def test_auto_reaches_what_the_reward_allows(model: PreTrainedModel, train: Train, caplog: Any) -> None:
    fine = [1.0] * 4  # before training, then after each update
    with caplog.at_level(logging.INFO, logger="mama_hf"):
        trainer = train(model, recipe(final_sparsity="auto", reward_tolerance=0.05), Scripted(*fine, 0.0, 1.0))
    pruner, report = trainer.pruning_callback.pruner, trainer.pruning_callback.report
    assert 0 < pruner.sparsity < 0.95
    assert report["asked"] == "auto"
    assert report["reached"] == pruner.sparsity == sparsity(model) == model.config.mama["sparsity"]
    assert report["stopped_by"] == "the reward check"
    assert (report["reward_before"], report["reward_after"], report["restored"]) == (1.0, 1.0, None)
    assert report["num_rollbacks"] == 1
    assert report["seconds"] > 0
    assert pruner.is_final(8)
    assert str(report) in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sparsity_report(model)["targets"]["sparsity"] == pruner.sparsity
    assert model.config.mama["recipe"]["final_sparsity"] == "auto"


def test_auto_stops_at_its_ceiling(model: PreTrainedModel, train: Train, tmp_path: Path) -> None:
    trainer = train(model, recipe(final_sparsity="auto"))
    assert trainer.pruning_callback.pruner.sparsity == pytest.approx(0.95, abs=1e-4)
    assert trainer.pruning_callback.report["stopped_by"] == "the ceiling of 'auto'"
    trainer.save_model(str(tmp_path / "saved"))
    assert MamaPruningConfig.from_pretrained(tmp_path / "saved").final_sparsity == "auto"
    assert sparsity_report(tmp_path / "saved")["targets"]["sparsity"] == pytest.approx(0.95, abs=1e-4)


def test_stopping_early_with_auto_warns(model: PreTrainedModel, make_trainer: Train, caplog: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    trainer = make_trainer(model, recipe(final_sparsity="auto"), keywords={"callbacks": [Stop()]})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Training stopped at step 4" in caplog.text
    assert "final sparsity of auto ends at step 8" in caplog.text
    assert trainer.pruning_callback.report["stopped_by"] == "training, at step 4 of the 8 that pruning takes"


def test_the_report_without_a_check(model: PreTrainedModel, train: Train) -> None:
    trainer = train(model, recipe(reward_tolerance=None))
    report, rewards = trainer.pruning_callback.report, [entry["reward"] for entry in steps(trainer)]
    assert (report["reward_before"], report["reward_after"]) == (rewards[0], rewards[-1])
    assert report["stopped_by"] == "the final sparsity"
    assert "reward before" in str(report)


# ---------------------------------------------------------------------------------------------- resuming, vLLM


def test_resume_in_a_hold_equals_uninterrupted(model: PreTrainedModel, train: Train, tmp_path: Path) -> None:
    """The first update is taken back, and the next two are left out."""

    def rewards(done: int = 0) -> Scripted:
        script = Scripted(1.0, 1.0, 0.0, 1.0)
        script.checks = done
        return script

    config = recipe(reward_tolerance=0.05, final_sparsity="auto")
    settings = {"save_strategy": "steps", "save_steps": 1}
    full = train(copy.deepcopy(model), config, rewards(), **settings)
    held = [entry["pruning/held"] for entry in steps(full)]
    assert held[3] == 0 < held[4] == 1 < held[5] == 2
    for step in (4, 5):
        done = steps(full)[step - 1]
        folder = tmp_path / f"run/checkpoint-{step}"
        resumed = train(copy.deepcopy(model), config, rewards(3), resume=folder, **settings)
        assert done["pruning/rollbacks"] == 1
        assert_same(dict(full.model.state_dict()), dict(resumed.model.state_dict()))
        assert_same(optimizer_state(full), optimizer_state(resumed))
        assert_same(full.pruning_callback.pruner.masks, resumed.pruning_callback.pruner.masks)
        assert check_state(full) == check_state(resumed)
        assert logs(full) == logs(resumed)


class StubVLLM:
    """The part of TRL's vLLM generation that a step uses; it generates with the model as it was at the last sync."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.temperature, self.syncs = model, 1.0, 0
        self.used: list[tuple[float, bool]] = []

    def sync_weights(self) -> None:
        self.syncs += 1
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}

    def generate(self, prompts: list, num_generations: int, **kwargs: Any) -> tuple:
        is_current = all(torch.equal(self.weights[name], value) for name, value in self.model.state_dict().items())
        self.used.append((self.temperature, is_current))
        completions = [[5 + index % 7, 6, 7, 2] for index in range(len(prompts))]
        return prompts, completions, [[[0.0]] * 4 for _ in prompts], None


def test_vllm_gets_the_weights_anew(model: PreTrainedModel, make_trainer: Train) -> None:
    """Before each check, and after a roll-back within the same step."""
    trainer = make_trainer(model, recipe(reward_tolerance=0.05), Scripted(1.0, 1.0, 1.0, 1.0, 0.0, 1.0))
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, StubVLLM(model), -1
    trainer.vllm_importance_sampling_correction = False
    trainer.train()
    assert check_state(trainer).num_rollbacks == 1
    stub = trainer.vllm_generation
    assert all(is_current for _, is_current in stub.used)
    assert [temperature for temperature, _ in stub.used].count(0.0) == check_state(trainer).num_checks
    assert [temperature for temperature, _ in stub.used].count(1.0) == 10
    assert stub.temperature == 1.0


# ---------------------------------------------------------------------------------------------- held-out prompts


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "expected"),
    [(4800, 256, 64), (4800, 32, 16), (4800, 160, 40), (400, 256, 20), (20, 8, 1)],
)
def test_the_last_rows_are_held_out(num_rows: int, batch_size: int, expected: int) -> None:
    rows = Dataset.from_dict({"prompt": [str(index) for index in range(num_rows)]})
    left, held = hold_out(rows, batch_size)
    assert held["prompt"] == [str(index) for index in range(num_rows - expected, num_rows)]
    assert left["prompt"] == [str(index) for index in range(num_rows - expected)]


def test_held_out_rows_are_not_trained_on(model: PreTrainedModel, make_trainer: Train) -> None:
    seen: set[str] = set()

    def spy(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        if trainer.model.training:
            seen.update(prompts)
        return digit_sum(completions)

    data = mix6.grpo_dataset(0, 40)
    trainer = make_trainer(
        model, recipe(), spy, keywords={"pruning_eval_dataset": None, "train_dataset": data}, max_steps=60
    )
    trainer.train()
    assert seen == set(data["prompt"][:-2])


@pytest.mark.parametrize(
    ("config", "keywords", "message"),
    [
        ({}, {"pruning_eval_dataset": []}, "pruning_eval_dataset is empty"),
        ({}, {"pruning_eval_dataset": Dataset.from_dict({"prompt": []})}, "pruning_eval_dataset is empty"),
        ({}, {"pruning_eval_dataset": held_out().to_iterable_dataset()}, "IterableDataset.*must be"),
        ({}, {"pruning_eval_dataset": None, "train_dataset": mix6.grpo_dataset(0, 19)}, "none of its 19 rows"),
        (
            {},
            {"pruning_eval_dataset": None, "train_dataset": mix6.grpo_dataset(0, 64).to_iterable_dataset()},
            "IterableDataset can't be split. Give them as pruning_eval_dataset",
        ),
        ({"reward_tolerance": None}, {"pruning_eval_dataset": held_out()}, "set reward_tolerance"),
    ],
)
def test_bad_held_out_prompts_are_refused(
    model: PreTrainedModel, make_trainer: Train, config: dict[str, Any], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(model, recipe(**config), keywords=keywords)


@pytest.mark.parametrize("reward", [None, math.nan])
def test_a_reward_that_gives_nothing_is_refused_before_training(
    model: PreTrainedModel, make_trainer: Train, reward: float | None
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model, recipe(), lambda completions, **kwargs: [reward] * len(completions))
    with pytest.raises(ValueError, match="gave nan as mean reward"):
        trainer.train()
    assert_same(before, dict(model.state_dict()))


def test_the_callback_refuses_a_tolerance(
    make_dataset: Callable, training_arguments: Callable, tiny_llama: Any
) -> None:
    for final in ("auto", 0.5):
        with pytest.raises(ValueError, match=rf"reward_tolerance=0\.1 with final_sparsity={final!r}.*MamaGRPOTrainer"):
            MamaPruningCallback(recipe(reward_tolerance=0.1, final_sparsity=final))
    callback = MamaPruningCallback(recipe(reward_tolerance=None))
    trainer = Trainer(tiny_llama, training_arguments(), train_dataset=make_dataset(), callbacks=[callback])
    trainer.train()
    assert callback.report["reward_before"] is None
    assert callback.report["reached"] == pytest.approx(0.6, abs=1e-4)


# ---------------------------------------------------------------------------------------------- two processes


def run_rank(rank: int, port: int, folder: str, model: PreTrainedModel) -> None:
    """One of two processes: 5 held-out prompts, so that one rank has fewer, and checks that differ between updates."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    trainer = MamaGRPOTrainer(
        model=model,
        reward_funcs=digit_sum,
        args=mix6.grpo_arguments(folder, 0, ddp_backend="gloo", disable_tqdm=True, learning_rate=1e-2, **settings),
        train_dataset=mix6.grpo_dataset(0, 64),
        pruning_eval_dataset=held_out(5),
        processing_class=mix6.build_tokenizer(),
        pruning_config=recipe(final_sparsity="auto", reward_tolerance=0.3),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    state = trainer.pruning_callback.pruner.check.state_dict()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(state))
    save_file(dict(model.state_dict()), f"{folder}/{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # without the teardown of gloo, in which one process may wait for ever for the other


def test_two_processes_decide_alike(model: PreTrainedModel, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = torch.multiprocessing.spawn(run_rank, (port, str(tmp_path), model), nprocs=2, join=False, daemon=True)
    deadline = time.monotonic() + 120
    while not ranks.join(timeout=5):
        assert time.monotonic() < deadline, "the processes wait for each other"
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["num_rollbacks"] + first["num_held"] > 0
    assert_same(load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors"))
