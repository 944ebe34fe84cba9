"""`MamaGRPOTrainer`: a GRPOTrainer in everything, with masks that change between generation batches only."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix6
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from mama_hf import MamaGRPOTrainer, MamaPruningCallback, MamaPruningConfig


TIMES = ("runtime", "_per_second", "step_time", "train_loss")
Train = Callable[..., GRPOTrainer]


def recipe(**overrides: Any) -> MamaPruningConfig:
    return MamaPruningConfig(**{"final_sparsity": 0.6, "start": 2, "end": 6, "update_every": 1, **overrides})


def digit_sum(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward with a spread: an untrained model gets all of 0 to 4."""
    return [float(sum(map(ord, each)) % 5) for each in completions]


class AlternatingReward:
    """`digit_sum` on the calls that `pattern` marks, in turn; the same reward for all on the others."""

    __name__ = "alternating"

    def __init__(self, *pattern: bool) -> None:
        self.pattern, self.calls = pattern, 0

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        self.calls += 1
        differs = self.pattern[(self.calls - 1) % len(self.pattern)]
        return digit_sum(completions) if differs else [1.0] * len(completions)


def prunable(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in model.named_parameters() if "_proj" in name and "lora" not in name}


def sparsity(model: nn.Module) -> float:
    weights = prunable(model).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def exact(share: float, model: nn.Module) -> float:
    count = sum(weight.numel() for weight in prunable(model).values())
    return round(share * count) / count


def logs(trainer: GRPOTrainer, but: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in (*TIMES, *but))}
        for entry in trainer.state.log_history
    ]


def steps(trainer: GRPOTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def optimizer_state(trainer: GRPOTrainer) -> dict[str, Any]:
    return trainer.optimizer.state_dict()["state"]


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama", vocab_size=len(mix6.build_tokenizer()))


@pytest.fixture
def make_trainer(tmp_path: Path) -> Train:
    """`make_trainer(model, recipe, ...)`: 8 steps of 2 prompts x 4 generations."""

    def make(
        model: PreTrainedModel | str,
        config: MamaPruningConfig | None = None,
        trainer_class: type[GRPOTrainer] = MamaGRPOTrainer,
        reward: Callable = digit_sum,
        num_prompts: int = 64,
        keywords: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> GRPOTrainer:
        settings = {"max_steps": 8, "per_device_train_batch_size": 8, "num_generations": 4, "learning_rate": 1e-3}
        settings |= {"max_completion_length": 4, "disable_tqdm": True, "warmup_steps": 0}
        trainer = trainer_class(
            model=model,
            reward_funcs=reward,
            args=mix6.grpo_arguments(str(tmp_path / "run"), seed=0, **{**settings, **overrides}),
            train_dataset=mix6.grpo_dataset(seed=0, num_prompts=num_prompts),
            eval_dataset=mix6.grpo_dataset(seed=1, num_prompts=4),
            processing_class=mix6.build_tokenizer(),
            **({} if config is None else {"pruning_config": config}),
            **(keywords or {}),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


@pytest.fixture
def train(make_trainer: Train) -> Train:
    def run(*args: Any, resume: Path | None = None, **keywords: Any) -> GRPOTrainer:
        trainer = make_trainer(*args, **keywords)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    return run


# ---------------------------------------------------------------------------------------------- a GRPOTrainer


@pytest.mark.parametrize("config", [None, recipe(final_sparsity=0.0)], ids=["none", "zero"])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "num_iterations": 2}], ids=["1", "ga2"])
def test_without_pruning_it_is_grpo(
    model: PreTrainedModel, train: Train, config: MamaPruningConfig | None, settings: dict[str, Any]
) -> None:
    settings = settings | {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8}
    plain = train(copy.deepcopy(model), None, GRPOTrainer, **settings)
    ours = train(model, config, **settings)
    assert_same(dict(plain.model.state_dict()), dict(ours.model.state_dict()))
    assert_same(optimizer_state(plain), optimizer_state(ours))
    assert logs(plain) == logs(ours, but=("pruning/",) if config is not None else ())


def test_arguments_by_position(model: PreTrainedModel, tmp_path: Path) -> None:
    args = mix6.grpo_arguments(str(tmp_path), 0, max_steps=1, per_device_train_batch_size=8, disable_tqdm=True)
    data, tokenizer = mix6.grpo_dataset(0, 8), mix6.build_tokenizer()
    config = recipe(start=1, end=1)
    trainer = MamaGRPOTrainer(model, digit_sum, args, data, None, tokenizer, pruning_config=config)
    trainer.train()
    assert sparsity(model) == exact(0.6, model)


# ---------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("settings", [{}, {"logging_steps": 3}], ids=["each-step", "each-3"])
@pytest.mark.parametrize("criterion", ["mama", "magnitude", "taylor", "wanda"])
def test_prunes_and_logs(
    model: PreTrainedModel, train: Train, criterion: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    evaluations = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8}
    trainer = train(model, recipe(criterion=criterion, scope="global"), **settings, **evaluations)
    assert sparsity(model) == exact(0.6, model)
    for entry in steps(trainer):
        step = entry["step"]
        target = 0.0 if step < 2 else 0.6 - 0.6 * (1 - min(1.0, (step - 2) / 4)) ** 3
        assert entry["pruning/target"] == pytest.approx(target)
        assert entry["pruning/sparsity"] == exact(target, model)
        assert 0 <= entry["pruning/changed"] <= 0.6
        assert entry["pruning/reward"] == entry["reward"]
        assert entry["pruning/signal"] == pytest.approx(1 - entry["frac_reward_zero_std"])
    assert any(entry["pruning/changed"] > 0 for entry in steps(trainer))
    (evaluation, _) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert not any("pruning" in key for key in evaluation)
    trainer.save_model(str(tmp_path / "final"))
    assert MamaPruningConfig.from_pretrained(tmp_path / "final") == trainer.pruning_callback.config


class MaskWitness(TrainerCallback):
    """Notes at how many micro-batches of training the zeros changed."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.zeros: Tensor | None = None
        self.changes: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        zeros = torch.cat([weight.flatten() == 0 for weight in prunable(kwargs["model"]).values()])
        if self.zeros is not None and not torch.equal(zeros, self.zeros):
            self.changes.append(self.trainer._step)
        self.zeros = zeros


@pytest.mark.parametrize("ours", [True, False], ids=["MamaGRPOTrainer", "GRPOTrainer"])
@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "num_prompts"),
    [(1, 1, 1, 64), (1, 2, 2, 64), (2, 2, 1, 64), (2, 4, 1, 64), (4, 2, 1, 64), (2, 2, 2, 64), (4, 2, 1, 12)],
)
def test_masks_change_between_generations(
    model: PreTrainedModel,
    make_trainer: Train,
    ours: bool,
    accumulation: int,
    per_generation: int,
    iterations: int,
    num_prompts: int,
) -> None:
    """Also where epochs end within a step (with 12 prompts: after 6 micro-batches)."""
    witness, config = MaskWitness(), recipe(start=3, end=12, update_every=None)
    callbacks = [witness] if ours else [MamaPruningCallback(config), witness]
    witness.trainer = make_trainer(
        model,
        config if ours else None,
        MamaGRPOTrainer if ours else GRPOTrainer,
        num_prompts=num_prompts,
        keywords={"callbacks": callbacks},
        max_steps=14,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
    )
    witness.trainer.train()
    assert len(witness.changes) >= 2
    assert [step % (per_generation * iterations) for step in witness.changes] == [0] * len(witness.changes)
    assert sparsity(model) == exact(0.6, model)


@pytest.mark.parametrize("trainer_class", [MamaGRPOTrainer, GRPOTrainer])
def test_generations_that_no_step_boundary_meets_are_refused(
    model: PreTrainedModel, train: Train, trainer_class: type[GRPOTrainer]
) -> None:
    """With 3 micro-batches a generation and 2 a step, the step at which both end depends on how epochs end."""
    ours = trainer_class is MamaGRPOTrainer
    keywords = {} if ours else {"callbacks": [MamaPruningCallback(recipe())]}
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 3}
    with pytest.raises(ValueError, match="steps_per_generation"):
        train(model, recipe() if ours else None, trainer_class, keywords=keywords, **settings)


# ---------------------------------------------------------------------------------------------- the signal


@pytest.fixture
def path(model: PreTrainedModel, tmp_path: Path) -> str:
    """A saved model: with beta > 0 TRL loads the reference from there, and the KL term gives a gradient always."""
    model.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


KL = {"beta": 0.5, "weight_decay": 0.1}


@pytest.mark.parametrize("config", [{}, {"criterion": "taylor"}, {"criterion": "wanda"}, {"regrowth": 0.1}], ids=str)
def test_without_signal_statistics_stay(path: str, train: Train, config: dict[str, Any]) -> None:
    trainer = train(path, recipe(scope="global", **config), reward=AlternatingReward(False), **KL)
    assert [entry["pruning/signal"] for entry in steps(trainer)] == [0.0] * 8
    assert steps(trainer)[-1]["grad_norm"] > 0
    statistics = trainer.pruning_callback.pruner.statistics
    assert int(statistics.num_steps) == 0
    assert not any(values.any() for name in statistics.accumulators for values in statistics.accumulators[name])
    assert sparsity(trainer.model) == exact(0.6, trainer.model)
    assert sparsity(trainer.ref_model) == 0.0


@pytest.mark.parametrize(
    ("pattern", "settings", "expected"),
    [
        ((True, False), {}, 4),  # each step has its own generation batch
        ((True, False), {"steps_per_generation": 2}, 4),  # a batch lasts for two steps
        ((True, False), {"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 8),  # a step learns from two
        ((False, True), {"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 8),
        ((False, False, True, True), {"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 4),
    ],
    ids=["alternating", "two-steps", "first-of-two", "second-of-two", "both-of-two"],
)
def test_only_steps_with_signal_count(
    path: str, train: Train, pattern: tuple[bool, ...], settings: dict[str, Any], expected: int
) -> None:
    trainer = train(path, recipe(criterion="taylor"), reward=AlternatingReward(*pattern), **KL, **settings)
    assert int(trainer.pruning_callback.pruner.statistics.num_steps) == expected


def test_evaluation_is_no_signal(path: str, train: Train) -> None:
    """Rewards that are all equal at an evaluation say nothing about the batch in training."""
    evaluations = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16}
    pattern = AlternatingReward(True, False, True, False)  # training and evaluation in turn
    trainer = train(path, recipe(criterion="taylor"), reward=pattern, steps_per_generation=1, **evaluations, **KL)
    assert [entry["eval_frac_reward_zero_std"] for entry in logs(trainer) if "eval_loss" in entry] == [1.0] * 8
    assert int(trainer.pruning_callback.pruner.statistics.num_steps) == 8


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "config",
    [{}, {"criterion": "taylor"}, {"criterion": "wanda"}, {"regrowth": 0.2}, {"granularity": "neuron+head"}],
    ids=str,
)
def test_resume_equals_uninterrupted(
    model: PreTrainedModel, train: Train, tmp_path: Path, config: dict[str, Any]
) -> None:
    """From before, in and after the pruning phase, each time at the start of a generation batch."""
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 10}
    settings |= {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    full_recipe = recipe(start=4, end=6, **config)
    full = train(copy.deepcopy(model), full_recipe, **settings)
    for step in (8, 4, 2):
        folder = tmp_path / f"run/checkpoint-{step}"
        resumed = train(copy.deepcopy(model), full_recipe, resume=folder, **settings)
        assert_same(dict(full.model.state_dict()), dict(resumed.model.state_dict()))
        assert_same(optimizer_state(full), optimizer_state(resumed))
        assert_same(full.pruning_callback.pruner.masks, resumed.pruning_callback.pruner.masks)
        assert logs(full) == logs(resumed)


# ---------------------------------------------------------------------------------------------- refusals, LoRA


def test_two_callbacks_are_refused(model: PreTrainedModel, make_trainer: Train) -> None:
    with pytest.raises(ValueError, match="not both"):
        make_trainer(model, recipe(), keywords={"callbacks": [MamaPruningCallback(recipe())]})
    trainer = make_trainer(model, recipe())
    trainer.add_callback(MamaPruningCallback(recipe()))
    with pytest.raises(ValueError, match="two MamaPruningCallbacks"):
        trainer.train()


def test_no_target_is_refused_at_once(model: PreTrainedModel, make_trainer: Train) -> None:
    with pytest.raises(ValueError, match="No weight can be pruned"):
        make_trainer(model, recipe(target_modules=["nothing"]))


def lora() -> dict[str, Any]:
    return {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}


def test_lora_with_a_reference_is_refused(path: str, make_trainer: Train) -> None:
    with pytest.raises(ValueError, match=r"beta=0\.5.*LoRA"):
        make_trainer(path, recipe(), keywords=lora(), **KL)


@pytest.mark.parametrize("criterion", ["mama", "taylor"])
def test_lora(model: PreTrainedModel, train: Train, criterion: str) -> None:
    trainer = train(model, recipe(criterion=criterion), keywords=lora())
    merged = trainer.model.merge_and_unload()
    assert sparsity(merged) == exact(0.6, merged)
