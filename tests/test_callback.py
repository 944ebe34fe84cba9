"""`MamaPruningCallback` inside the trainers of transformers: what it keeps, refuses, logs, saves and resumes."""

import copy
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix6
import peft
import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from mama_hf import MamaPruningCallback, MamaPruningConfig


CRITERIA = ("mama", "magnitude", "movement", "displacement", "taylor", "fisher", "wanda", "random")
NOT_PRUNED = (
    "embed",
    "wte",
    "wpe",
    "lm_head",
    "decoder",
    "classifier",
    "score",
    "norm",
    "Norm",
    "bias",
    "ln_",
    "lora_",
    "mlp.gate.",
)
Train = Callable[..., Trainer]


def recipe(**overrides: Any) -> MamaPruningConfig:
    """A pruning phase from step 2 to step 6 of 10, with an update after each step."""
    return MamaPruningConfig(**{"final_sparsity": 0.6, "start": 2, "end": 6, "update_every": 1, **overrides})


def cubic(step: int, final: float = 0.6, start: int = 2, end: int = 6) -> float:
    """The sparsity that `recipe()` asks for after `step`."""
    if step < start:
        return 0.0
    return final - final * (1 - min(1.0, (step - start) / (end - start))) ** 3


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that "all-linear" stands for, by their names alone."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if not any(part in name for part in NOT_PRUNED)
    }


def num_zeros(tensors: dict[str, Tensor]) -> int:
    return sum(int((tensor == 0).sum()) for tensor in tensors.values())


def num_entries(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def masks(trainer: Trainer) -> dict[str, Tensor]:
    """Where the trained model's prunable weights are not zero."""
    return {name: weight != 0 for name, weight in prunable(trainer.model).items()}


def pruner(trainer: Trainer) -> Any:
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, MamaPruningCallback)]
    return callback.pruner


def statistics(trainer: Trainer, name: str) -> Tensor:
    return torch.cat([values.flatten() for values in pruner(trainer).statistics.accumulators[name]])


def logs(trainer: Trainer, but: str = "") -> list[dict[str, Any]]:
    """The log history without wall times and `train_loss`, an average over the steps since a resume."""
    parts = ["runtime", "_per_second", "train_loss"] + [but] * bool(but)
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in parts)}
        for entry in trainer.state.log_history
    ]


def optimizer_state(trainer: Trainer) -> dict[str, Any]:
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer).state_dict()


def assert_same(first: Any, second: Any) -> None:
    """Bit for bit, through dicts and lists."""
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def assert_same_run(first: Trainer, second: Trainer) -> None:
    assert_same(dict(first.model.state_dict()), dict(second.model.state_dict()))
    assert_same(optimizer_state(first)["state"], optimizer_state(second)["state"])
    assert logs(first) == logs(second)


@pytest.fixture
def make_trainer(make_dataset: Callable, training_arguments: Callable[..., TrainingArguments]) -> Train:
    """`make_trainer(model, recipe, ...)`: a `Trainer` of 10 steps that prints no logs."""

    def make(
        model: nn.Module,
        config: MamaPruningConfig | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
        trainer_class: type[Trainer] = Trainer,
        resume_from: Path | None = None,
        **overrides: Any,
    ) -> Trainer:
        ours = [] if config is None else [MamaPruningCallback(config, resume_from=resume_from)]
        keywords = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(16, seed=1)}
        names = ("optimizers", "compute_metrics", "train_dataset")
        keywords |= {name: overrides.pop(name) for name in names if name in overrides}
        args = training_arguments(**overrides)
        trainer = trainer_class(model=model, args=args, callbacks=[*callbacks, *ours], **keywords)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


@pytest.fixture
def train(make_trainer: Train) -> Train:
    """`train(model, recipe, ...)`: the trainer of `make_trainer` after training."""

    def run(*args: Any, resume: Path | None = None, **keywords: Any) -> Trainer:
        trainer = make_trainer(*args, **keywords)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    return run


# ---------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("criterion", CRITERIA)
def test_sparsity_zero_is_the_plain_trainer(make_model: Callable, train: Train, criterion: str) -> None:
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    plain = train(make_model("llama"), **settings)
    ours = train(make_model("llama"), recipe(final_sparsity=0.0, criterion=criterion), **settings)
    assert_same(dict(plain.model.state_dict()), dict(ours.model.state_dict()))
    assert_same(optimizer_state(plain)["state"], optimizer_state(ours)["state"])
    assert logs(plain) == logs(ours, but="pruning/")


@pytest.mark.parametrize(
    "layout", ["layer", "row", "global", "2:4", "4:8", "1:4"], ids=lambda layout: layout.replace(":", "of")
)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_final_sparsity_is_exact(make_model: Callable, train: Train, criterion: str, layout: str) -> None:
    if ":" in layout:
        kept, group = map(int, layout.split(":"))
        config = recipe(criterion=criterion, granularity=layout, final_sparsity=1 - kept / group)
    else:
        config = recipe(criterion=criterion, scope=layout, final_sparsity=0.37)
    final = prunable(train(make_model("llama"), config, max_steps=7).model)
    assert len(final) == 14
    for weight in final.values():
        if ":" in layout:
            assert ((weight == 0).view(-1, group).sum(dim=1) == group - kept).all()
        elif layout == "row":
            assert ((weight == 0).sum(dim=1) == round(0.37 * weight.shape[1])).all()
        elif layout == "layer":
            assert int((weight == 0).sum()) == round(0.37 * weight.numel())
        else:
            assert weight.any(), "global scope emptied a layer"
    if layout == "global":
        assert num_zeros(final) == round(0.37 * num_entries(final))


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "magnitude"])
def test_criterion_is_not_magnitude(make_model: Callable, train: Train, criterion: str) -> None:
    ours, magnitude = (
        masks(train(make_model("llama"), recipe(criterion=name, scope="layer"))) for name in (criterion, "magnitude")
    )
    assert any(not torch.equal(ours[name], magnitude[name]) for name in ours)


class Witness(TrainerCallback):
    """Counts the zeros at each event with its own eyes, and asserts that none ever comes back."""

    def __init__(self) -> None:
        self.zeros: dict[str, Tensor] = {}
        self.sparsity: dict[int, float] = {}
        self.events: set[str] = set()

    def look(self, event: str, weights: dict[str, Tensor]) -> None:
        self.events.add(event)
        for name, weight in weights.items():
            was_zero = self.zeros.get(name)
            assert was_zero is None or not weight[was_zero].any(), f"{name} came back before {event}"
            self.zeros[name] = weight == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"].optimizer
        self.look("step", prunable(model))
        self.sparsity[state.global_step] = num_zeros(self.zeros_as_weights()) / num_entries(self.zeros)
        for name, parameter in model.named_parameters():
            for key in ("exp_avg", "momentum_buffer"):
                if name in self.zeros and key in optimizer.state[parameter]:
                    self.events.add(key)
                    assert not optimizer.state[parameter][key][self.zeros[name]].any(), (
                        f"{key} of {name} is not masked"
                    )

    def zeros_as_weights(self) -> dict[str, Tensor]:
        return {name: ~zero for name, zero in self.zeros.items()}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look("evaluate", prunable(kwargs["model"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "model.safetensors")
        self.look("save", {name: saved[name] for name in self.zeros})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look("end", prunable(kwargs["model"]))


@pytest.mark.parametrize(
    ("settings", "dtype", "momentum"),
    [
        ({"optim": "adamw_torch"}, torch.float32, "exp_avg"),
        ({"optim": "adamw_torch_fused", "gradient_accumulation_steps": 3}, torch.float32, "exp_avg"),
        ({"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}, torch.float32, "momentum_buffer"),
        ({"bf16": True}, torch.float32, "exp_avg"),
        ({"optim": "adamw_torch"}, torch.bfloat16, "exp_avg"),
        ({"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2}, torch.bfloat16, "exp_avg"),
        ({"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}, torch.bfloat16, "momentum_buffer"),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, torch.float32, "exp_avg"),
    ],
    ids=["adamw", "fused-ga3", "sgd", "autocast", "bf16", "bf16-fused-ga2", "bf16-sgd", "compile"],
)
@pytest.mark.parametrize("criterion", ["mama", "taylor"])
def test_zeros_hold_at_every_event(
    make_model: Callable, train: Train, settings: dict[str, Any], dtype: torch.dtype, momentum: str, criterion: str
) -> None:
    witness = Witness()
    often = {"weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    trainer = train(make_model("llama").to(dtype), recipe(criterion=criterion), (witness,), **often, **settings)
    assert witness.events == {"step", "evaluate", "save", "end", momentum}
    count = num_entries(witness.zeros)
    assert witness.sparsity == {step: round(cubic(step) * count) / count for step in range(1, 11)}
    assert num_zeros(prunable(trainer.model)) == round(0.6 * count)


class RecordingAdamW(torch.optim.AdamW):
    """Notes how far each of its steps moved the weights that were zero before it."""

    def step(self, closure: Any = None) -> Any:
        parameters = [each for group in self.param_groups for each in group["params"]]
        zeros = [each.detach() == 0 for each in parameters]
        super().step(closure)
        moved = [each.detach()[zero].abs().max() for each, zero in zip(parameters, zeros) if zero.any()]
        self.moved = float(max(moved, default=0.0))


def test_momentum_does_not_move_the_zeros(tiny_llama: LlamaForCausalLM, train: Train) -> None:
    """Once the gradients are zero only momentum moves weights: the kept ones, and those pruned must not have any."""

    class ZeroGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.before = torch.cat([weight.flatten() for weight in prunable(kwargs["model"]).values()])
            for parameter in kwargs["model"].parameters():
                parameter.grad.mul_(float(state.global_step < 6))

    optimizer, watch = RecordingAdamW(tiny_llama.parameters(), 1e-2), ZeroGradient()
    train(tiny_llama, recipe(), (watch,), optimizers=(optimizer, None), max_steps=7)
    after = torch.cat([weight.flatten() for weight in prunable(tiny_llama).values()])
    assert (after != watch.before).any()
    assert optimizer.moved == 0.0


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"criterion": "taylor"}, "taylor"),
        ({"criterion": "movement"}, "movement"),
        ({"criterion": "mama", "ema_decay": 0.9}, "gradient_square"),
    ],
    ids=["taylor", "movement", "mama"],
)
def test_gradient_accumulation_counts_once(
    make_model: Callable, train: Train, config: dict[str, Any], name: str
) -> None:
    """In float64, so that the order of summation doesn't decide about near ties."""
    one, eight = (
        train(
            make_model("llama").double(),
            recipe(**config),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 1)
    )
    assert int(pruner(one).statistics.num_steps) == int(pruner(eight).statistics.num_steps) == 10
    torch.testing.assert_close(statistics(one, name), statistics(eight, name), rtol=1e-4, atol=1e-9)
    assert_same(masks(one), masks(eight))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"criterion": "taylor"}, "taylor"),
        ({"criterion": "fisher"}, "fisher"),
        ({"criterion": "movement"}, "movement"),
        ({"criterion": "mama", "ema_decay": 0.9}, "gradient_square"),
        ({"criterion": "mama", "optim": "sgd"}, "gradient_square"),
    ],
    ids=["taylor", "fisher", "movement", "mama-ema", "mama-sgd"],
)
def test_clipping_does_not_distort(make_model: Callable, train: Train, config: dict[str, Any], name: str) -> None:
    """At learning rate 0 the gradients of both runs are the same but for the clipping coefficient."""
    settings = {"learning_rate": 0.0, "optim": config.pop("optim", "adamw_torch")}
    off, tiny = (
        train(make_model("llama"), recipe(**config), max_grad_norm=norm, max_steps=7, **settings)
        for norm in (0.0, 1e-4)
    )
    assert statistics(off, name).abs().max() > 0
    torch.testing.assert_close(statistics(off, name), statistics(tiny, name), rtol=1e-3, atol=1e-8)


class NanStep(Trainer):
    """Step 4 has a gradient that is not a number, which the optimizer is spared, as with fp16 scaling."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step == 3:
            next(iter(prunable_parameters(model))).grad[0, 0] = self.poison
        return loss

    poison = float("nan")


def prunable_parameters(model: nn.Module) -> list[nn.Parameter]:
    names = prunable(model)
    return [parameter for name, parameter in model.named_parameters() if name in names]


class SkipNan(TrainerCallback):
    """After our callback has seen the gradients, as GradScaler does."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if state.global_step == 3:
                parameter.grad.zero_()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "config",
    [{"criterion": name} for name in ("taylor", "fisher", "movement")] + [{"criterion": "mama", "ema_decay": 0.9}],
    ids=lambda config: config["criterion"],
)
def test_step_without_a_finite_gradient_is_skipped(
    tiny_llama: LlamaForCausalLM, train: Train, config: dict[str, Any], poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NanStep, "poison", poison)
    trainer = train(tiny_llama, recipe(scope="global", **config), (SkipNan(),), NanStep, max_grad_norm=0.0)
    seen = pruner(trainer).statistics
    assert (int(seen.num_steps), int(seen.num_skipped)) == (9, 1)
    (name,) = seen.accumulators
    assert statistics(trainer, name).isfinite().all()
    assert num_zeros(prunable(tiny_llama)) == round(0.6 * num_entries(prunable(tiny_llama)))


# ---------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("scope", ["global", "row"])
@pytest.mark.parametrize("name", ["llama", "tied-llama", "qwen2", "gpt2", "bert", "mixtral"])
def test_architectures(make_model: Callable, train: Train, tmp_path: Path, name: str, scope: str) -> None:
    model = make_model(name)
    dense = {key: (value == 0).sum() for key, value in model.state_dict().items()}
    train(model, recipe(scope=scope))
    final = prunable(model)
    if scope == "global":
        assert num_zeros(final) == round(0.6 * num_entries(final))
    for key, weight in final.items():
        if scope == "row":
            inputs = 0 if name == "gpt2" else -1
            expected = round(0.6 * weight.shape[inputs])
            assert ((weight == 0).sum(dim=inputs) == expected).all(), key
    for key, value in model.state_dict().items():
        assert key in final or (value == 0).sum() <= dense[key], f"{key} must not be pruned"
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(3, 19).view(1, -1)
    with torch.no_grad():
        assert_same(again(ids).logits, model.eval()(ids).logits)


def test_classification_head(train: Train, make_dataset: Callable) -> None:
    """BERT with a fresh head, which stays dense; the pooler is a linear layer like the others."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **size))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 3} for row in make_dataset()]
    train(model, recipe(), train_dataset=rows)
    final = prunable(model)
    assert "bert.pooler.dense.weight" in final
    assert model.classifier.weight.all()
    assert num_zeros(final) == round(0.6 * num_entries(final))


# ---------------------------------------------------------------------------------------------- TRL


QUIET = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
DIGITS = [f"{number * 7919 % 10**6:06d}" for number in range(32)]
PREFERENCES = [{"prompt": f"a{d}=", "chosen": "".join(sorted(d)), "rejected": d[::-1]} for d in DIGITS]


def digit_sum(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(sum(map(int, filter(str.isdigit, each))) % 5) for each in completions]


def sft(model: PreTrainedModel, folder: str, **common: Any) -> Trainer:
    args = trl.SFTConfig(folder, max_length=32, **QUIET)
    return trl.SFTTrainer(model, args, train_dataset=Dataset.from_dict({"text": [f"a{d}" for d in DIGITS]}), **common)


def dpo(model: PreTrainedModel, folder: str, **common: Any) -> Trainer:
    args = trl.DPOConfig(folder, **QUIET)
    data = Dataset.from_list(PREFERENCES)
    return trl.DPOTrainer(model, copy.deepcopy(model), args=args, train_dataset=data, **common)


def reward(model: PreTrainedModel, folder: str, **common: Any) -> Trainer:
    return trl.RewardTrainer(
        LlamaForSequenceClassification(copy.deepcopy(model.config)),
        trl.RewardConfig(folder, **QUIET),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("chosen", "rejected")} for row in PREFERENCES]),
        **common,
    )


def rloo(model: PreTrainedModel, folder: str, **common: Any) -> Trainer:
    args = trl.RLOOConfig(folder, num_generations=2, max_completion_length=4, beta=0.0, **QUIET)
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES])
    return trl.RLOOTrainer(model, digit_sum, args, train_dataset=data, **common)


@pytest.mark.parametrize("criterion", ["mama", "wanda"])
@pytest.mark.parametrize("make", [sft, dpo, reward, rloo])
def test_trl_trainers(make_model: Callable, tmp_path: Path, make: Callable, criterion: str) -> None:
    """As in TRL's documentation, plus two lines."""
    tokenizer = mix6.build_tokenizer()
    model = make_model("llama", num_labels=1)
    callback = MamaPruningCallback(recipe(criterion=criterion, scope="global"))
    trainer = make(model, str(tmp_path), processing_class=tokenizer, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    saved = load_file(tmp_path / "final/model.safetensors")
    final = {name: saved[name] for name in prunable(trainer.model)}
    assert num_zeros(final) == round(0.6 * num_entries(final))
    sparsity = {each["step"]: each["pruning/sparsity"] for each in trainer.state.log_history if "loss" in each}
    assert sparsity == {step: pytest.approx(cubic(step), abs=1e-4) for step in range(1, 9)}


# ---------------------------------------------------------------------------------------------- LoRA


def lora(model: PreTrainedModel, **overrides: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **overrides})
    return peft.get_peft_model(model, config)


def merged(model: Any) -> dict[str, Tensor]:
    """The prunable weights that the adapted model stands for."""
    return {name: weight.clone() for name, weight in prunable(copy.deepcopy(model).merge_and_unload()).items()}


class MergedWitness(TrainerCallback):
    """What the merged model would be at each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = merged(kwargs["model"])


@pytest.mark.parametrize("criterion", ["mama", "taylor", "wanda", "displacement"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora(make_model: Callable, train: Train, name: str, criterion: str) -> None:
    witness = MergedWitness()
    model = lora(make_model(name), fan_in_fan_out=name == "gpt2")
    trainer = train(model, recipe(criterion=criterion, scope="global"), (witness,), learning_rate=1e-2)
    count = num_entries(witness.weights[1])
    assert {step: num_zeros(weights) for step, weights in witness.weights.items()} == {
        step: round(cubic(step) * count) for step in range(1, 11)
    }
    for key, last in witness.weights[10].items():
        middle = witness.weights[6][key]
        assert_same(last == 0, middle == 0)
        assert (last != middle)[last != 0].float().mean() > 0.9, f"{key} no longer learns"
    ids = torch.arange(3, 19).view(1, -1)
    with torch.no_grad():
        adapted = trainer.model.eval()(ids).logits
        torch.testing.assert_close(adapted, trainer.model.merge_and_unload()(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_alone_is_not_sparse(
    tiny_llama: LlamaForCausalLM, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What PEFT saves is the adapter, and the base it will be loaded on is dense: the user must hear of it."""
    trainer = train(lora(copy.deepcopy(tiny_llama)), recipe())
    assert [message for message in warnings_of(caplog) if "merge_and_unload" in message]
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    saved = prunable(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    assert num_zeros(saved) == round(0.6 * num_entries(saved))
    assert MamaPruningConfig.from_pretrained(tmp_path / "merged") == recipe()


def two_adapters(model: PreTrainedModel) -> Any:
    model = lora(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: lora(model, lora_dropout=0.1), "lora_dropout"),
        (lambda model: lora(model, use_dora=True), "DoRA"),
        (lambda model: lora(model.bfloat16()), "autocast_adapter_dtype=False"),
        (two_adapters, "2 active adapters"),
        (lambda model: peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM")), "No weight can be pruned"),
    ],
    ids=["dropout", "dora", "dtype", "two", "ia3"],
)
def test_adapter_is_refused(make_model: Callable, train: Train, wrap: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(wrap(make_model("llama")), recipe())


# ---------------------------------------------------------------------------------------------- the best model


class FirstIsBest:
    """A metric by which each evaluation is worse than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.calls += 1
        return {"score": -self.calls}


BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "eval_strategy": "steps",
    "save_strategy": "steps",
}


@pytest.mark.parametrize("every", [1, 2, 4, 5])
@pytest.mark.parametrize("end", [6, 7, 10])
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_best_model_is_never_denser(
    tiny_llama: LlamaForCausalLM, train: Train, every: int, end: int, strategy: str
) -> None:
    settings = BEST | {"eval_steps": every, "save_steps": every, "save_strategy": strategy}
    trainer = train(tiny_llama, recipe(end=end), compute_metrics=FirstIsBest(), **settings)
    assert trainer.state.best_global_step == min(-(-end // every) * every, 10)
    final = prunable(trainer.model)
    assert num_zeros(final) == round(0.6 * num_entries(final))
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert_same(final, {name: saved[name] for name in final})


def test_best_model_before_the_end_is_refused(tiny_llama: LlamaForCausalLM, train: Train) -> None:
    """Nothing is evaluated in this run once the final sparsity is there."""
    settings = BEST | {"eval_steps": 2, "save_steps": 2, "eval_delay": 11}
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        train(tiny_llama, recipe(), compute_metrics=FirstIsBest(), **settings)


# ---------------------------------------------------------------------------------------------- logs


class Tracker(TrainerCallback):
    """Stands where `report_to` puts the callbacks of the trackers: before those of the user."""

    seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        Tracker.seen.append({"step": state.global_step, **logs})


@pytest.mark.parametrize("added", ["with the trainer", "afterwards"])
def test_logs_reach_the_trackers(
    tiny_llama: LlamaForCausalLM, make_trainer: Train, monkeypatch: pytest.MonkeyPatch, added: str
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    monkeypatch.setattr(Tracker, "seen", [])
    first = recipe(update_every=2) if added == "with the trainer" else None
    settings = {"eval_strategy": "steps", "eval_steps": 5}
    trainer = make_trainer(tiny_llama, first, report_to=["tracker"], logging_steps=2, **settings)
    if first is None:
        trainer.add_callback(MamaPruningCallback(recipe(update_every=2)))
    assert isinstance(trainer.callback_handler.callbacks[1], Tracker)
    trainer.train()
    count = num_entries(prunable(tiny_llama))
    assert Tracker.seen == [{"step": entry["step"], **entry} for entry in trainer.state.log_history]
    steps = [entry for entry in Tracker.seen if "loss" in entry]
    assert [entry["step"] for entry in steps] == [2, 4, 6, 8, 10]
    for entry, before in zip(steps, [{"pruning/sparsity": 0.0}, *steps]):
        assert entry["pruning/sparsity"] == round(cubic(entry["step"]) * count) / count
        assert entry["pruning/target"] == pytest.approx(cubic(entry["step"]))
        if entry["step"] <= 6:
            assert entry["pruning/changed"] == pytest.approx(entry["pruning/sparsity"] - before["pruning/sparsity"])
    for entry in Tracker.seen:
        assert "loss" in entry or not any("pruning" in key for key in entry)


def test_nothing_is_printed(
    tiny_llama: LlamaForCausalLM,
    train: Train,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    disable_progress_bar()  # of transformers, when it writes weights
    train(tiny_llama, recipe(), save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5)
    enable_progress_bar()
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {"optim": "adafactor"}, "Adafactor.*exp_avg_sq_row"),
        ({"end": 11}, {}, r"step 11.*max_steps=10"),
        ({"end": 0.9}, {"max_steps": 1}, "max_steps"),
        ({"granularity": "5:7", "final_sparsity": 2 / 7}, {}, r"layers\.0\.self_attn\.q_proj"),
        ({"target_modules": ["proj_q"]}, {}, r"layers\.1\.mlp\.down_proj"),
        ({"target_modules": ["lm_head", "embed_tokens"]}, {}, "No weight"),
    ],
    ids=["adafactor", "end", "short-run", "n-of-m", "target", "output"],
)
def test_what_can_not_work_is_refused(
    tiny_llama: LlamaForCausalLM, train: Train, config: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    before = copy.deepcopy(tiny_llama.state_dict())
    if settings.get("max_steps") == 1:
        config = {"start": 0.1, "end": 2}
    with pytest.raises(ValueError, match=message):
        train(tiny_llama, recipe(**config), **settings)
    assert_same(dict(tiny_llama.state_dict()), dict(before))


@pytest.mark.parametrize("same", [True, False])
def test_two_callbacks_are_refused(tiny_llama: LlamaForCausalLM, train: Train, same: bool) -> None:
    first = MamaPruningCallback(recipe())
    second = first if same else MamaPruningCallback(recipe(final_sparsity=0.3))
    with pytest.raises(ValueError, match="two MamaPruningCallbacks"):
        train(tiny_llama, None, (first, second))


@pytest.mark.parametrize("how", ["deepspeed", "deepspeed_plugin", "fsdp", "ACCELERATE_USE_FSDP"])
def test_sharded_backends_are_refused(
    tiny_llama: LlamaForCausalLM, make_trainer: Train, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Given as an argument, or by `accelerate launch`, which leaves those arguments empty."""
    trainer = make_trainer(tiny_llama, recipe())
    if how.isupper():
        monkeypatch.setenv(how, "true")
    else:
        setattr(trainer.args, how, {"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match="FSDP" if "fsdp" in how.lower() else "DeepSpeed"):
        trainer.train()


def test_a_dict_is_not_a_recipe() -> None:
    with pytest.raises(TypeError, match="MamaPruningConfig"):
        MamaPruningCallback({"final_sparsity": 0.5})  # type: ignore[arg-type]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mama_hf") and record.levelno >= logging.WARNING
    ]


def test_a_sparser_model_keeps_its_zeros(
    tiny_llama: LlamaForCausalLM, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = train(tiny_llama, recipe(final_sparsity=0.7), max_steps=6)
    before = masks(zeros)
    assert warnings_of(caplog) == []
    trainer = train(tiny_llama, recipe(final_sparsity=0.5))
    (message,) = warnings_of(caplog)
    assert "0.7000" in message
    assert "0.5" in message
    assert_same(masks(trainer), before)
    assert trainer.state.log_history[0]["pruning/sparsity"] == pytest.approx(0.7, abs=1e-4)


def test_zeros_in_other_places_are_no_pattern(tiny_llama: LlamaForCausalLM, train: Train) -> None:
    """A model that is 50 % sparse, or more, without a pattern still gets the 2:4 pattern that was asked for."""
    train(tiny_llama, recipe(final_sparsity=0.55), max_steps=6)
    train(tiny_llama, recipe(final_sparsity=0.5, granularity="2:4"))
    for name, weight in prunable(tiny_llama).items():
        assert ((weight == 0).view(-1, 4).sum(dim=1) >= 2).all(), name


@pytest.mark.parametrize(
    ("final_sparsity", "layout"),
    [(final, {"scope": scope}) for scope in ("row", "layer", "global") for final in (0.37, 0.6)]
    + [(0.5, {"granularity": "2:4"})],
    ids=str,
)
def test_the_same_recipe_again_is_no_surprise(
    tiny_llama: LlamaForCausalLM,
    train: Train,
    caplog: pytest.LogCaptureFixture,
    final_sparsity: float,
    layout: dict[str, Any],
) -> None:
    """Training on with the recipe that a model was pruned by silently holds its zeros, however counts were rounded."""
    config = recipe(final_sparsity=final_sparsity, **layout)
    before = masks(train(tiny_llama, config, max_steps=6))
    assert_same(masks(train(tiny_llama, config)), before)
    assert warnings_of(caplog) == []


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(("step", "num_warnings"), [(3, 1), (5, 1), (6, 0), (8, 0)])
def test_early_stop_warns(
    tiny_llama: LlamaForCausalLM, train: Train, caplog: pytest.LogCaptureFixture, step: int, num_warnings: int
) -> None:
    train(tiny_llama, recipe(), (Stop(step),))
    messages = warnings_of(caplog)
    assert len(messages) == num_warnings
    assert all(f"step {step}" in message and "0.6000" in message for message in messages)


# ---------------------------------------------------------------------------------------------- saving

STOCK = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(3, 19).view(1, -1)).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
assert not any(name.startswith("mama") for name in sys.modules)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_load_without_this_package(
    tiny_llama: LlamaForCausalLM, train: Train, tmp_path: Path, dtype: torch.dtype
) -> None:
    config = recipe(criterion="taylor")
    trainer = train(tiny_llama.to(dtype), config, save_strategy="steps", save_steps=10)
    copied = copy.deepcopy(trainer.model)
    trainer.save_model(str(tmp_path / "save_model"))
    trainer.model.save_pretrained(tmp_path / "save_pretrained")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()  # a copy that saved the original would be found out
    copied.save_pretrained(tmp_path / "deepcopy")
    folders = [tmp_path / name for name in ("save_model", "save_pretrained", "deepcopy", "run/checkpoint-10")]
    subprocess.run([sys.executable, "-c", STOCK, *map(str, folders)], check=True, cwd=tmp_path)
    with torch.no_grad():
        logits = copied.eval()(torch.arange(3, 19).view(1, -1)).logits
    for folder in folders:
        assert_same(load_file(folder / "logits.safetensors")["logits"], logits)
        assert MamaPruningConfig.from_pretrained(folder) == config
        described = json.loads((folder / "config.json").read_text())["mama"]
        assert set(described) == {"recipe", "sparsity", "version"}
        assert MamaPruningConfig.from_dict(described["recipe"]) == config
        assert described["sparsity"] == pytest.approx(0.6, abs=1e-4)
        saved = load_file(folder / "model.safetensors")
        final = {name: saved[name] for name in prunable(copied)}
        assert num_zeros(final) == round(0.6 * num_entries(final))


def test_a_trained_model_can_be_pickled(tiny_llama: LlamaForCausalLM, train: Train, tmp_path: Path) -> None:
    """As by `torch.save(model)`, and where a model is handed to another process."""
    train(tiny_llama, recipe())
    again = pickle.loads(pickle.dumps(tiny_llama))
    again.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), dict(tiny_llama.state_dict()))


def test_each_checkpoint_tells_its_own_sparsity(tiny_llama: LlamaForCausalLM, train: Train, tmp_path: Path) -> None:
    train(tiny_llama, recipe(), save_strategy="steps", save_steps=1)
    for step in range(1, 11):
        folder = tmp_path / f"run/checkpoint-{step}"
        saved = load_file(folder / "model.safetensors")
        weights = {name: saved[name] for name in prunable(tiny_llama)}
        achieved = json.loads((folder / "config.json").read_text())["mama"]["sparsity"]
        assert achieved == num_zeros(weights) / num_entries(weights)
        assert achieved == pytest.approx(cubic(step), abs=1e-4)


def test_an_upload_holds_the_state(tiny_llama: LlamaForCausalLM, train: Train, tmp_path: Path) -> None:
    """The trainer pushes a checkpoint before `on_save`."""
    trainer = train(tiny_llama, recipe(), save_strategy="steps", save_steps=10)
    state_file = tmp_path / "run/checkpoint-10/pruning_state.safetensors"
    written = state_file.read_bytes()
    state_file.unlink()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert state_file.read_bytes() == written


# ---------------------------------------------------------------------------------------------- resuming

RESUMABLE: dict[str, dict[str, Any]] = {
    "mama-adam": {},
    "mama-ema": {"ema_decay": 0.9},
    "taylor": {"criterion": "taylor"},
    "displacement": {"criterion": "displacement"},
    "wanda": {"criterion": "wanda"},
    "random": {"criterion": "random"},
    "regrowth-adam": {"regrowth": 0.2},
    "regrowth-fisher": {"criterion": "fisher", "regrowth": 0.2, "scope": "layer"},
    "2of4": {"granularity": "2:4", "final_sparsity": 0.5},
    "neuron-adam": {"granularity": "neuron"},
    "neuron-taylor": {"granularity": "neuron", "criterion": "taylor", "scope": "layer"},
    "neuron+head-wanda": {"granularity": "neuron+head", "criterion": "wanda"},
    "neuron-displacement-least-squares": {
        **{"granularity": "neuron", "criterion": "displacement", "move_values": "least_squares", "update_every": 3},
    },
    "least-squares": {"move_values": "least_squares"},
    "displacement-least-squares": {"move_values": "least_squares", "criterion": "displacement", "update_every": 3},
}
SAVING = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, "fp32") for name in RESUMABLE] + [("mama-adam", "bf16"), ("mama-adam", "sgd"), ("taylor", "lora")],
)
def test_resume_equals_uninterrupted(
    make_model: Callable,
    train: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    variant: str,
) -> None:
    def make() -> nn.Module:
        model = make_model("llama", attention_dropout=0.1)
        return {"lora": lora, "bf16": lambda each: each.bfloat16()}.get(variant, lambda each: each)(model)

    settings = SAVING | ({"optim": "sgd", "optim_args": "momentum=0.9"} if variant == "sgd" else {})
    config = recipe(start=4, end=8, **RESUMABLE[name])
    full = train(make(), config, **settings)
    for step in (9, 6, 3):  # after, in and before the pruning phase
        resumed = train(make(), config, resume=tmp_path / f"run/checkpoint-{step}", **settings)
        assert_same_run(full, resumed)
        assert_same(pruner(full).masks, pruner(resumed).masks)
        assert_same(pruner(full).state_dict(), pruner(resumed).state_dict())
    assert [message for message in warnings_of(caplog) if "merge_and_unload" not in message] == []


def test_regrowth_brings_weights_back(tiny_llama: LlamaForCausalLM, train: Train) -> None:
    """And the final count is exact all the same."""

    class Came(TrainerCallback):
        back = 0
        zeros: dict[str, Tensor] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = {name: weight == 0 for name, weight in prunable(kwargs["model"]).items()}
            self.back += sum(int((self.zeros[name] & ~now[name]).sum()) for name in self.zeros)
            self.zeros = now

    came = Came()
    train(tiny_llama, recipe(regrowth=0.3, criterion="taylor"), (came,))
    final = prunable(tiny_llama)
    assert came.back > 0
    assert num_zeros(final) == round(0.6 * num_entries(final))


@pytest.fixture
def checkpoint(make_model: Callable, train: Train, tmp_path: Path) -> Path:
    """Of step 6, the last of its run, beside that of step 3."""
    train(make_model("llama"), recipe(), (Stop(6),), **SAVING)
    return tmp_path / "run/checkpoint-6"


def test_missing_state_is_refused(make_model: Callable, train: Train, checkpoint: Path) -> None:
    (checkpoint / "pruning_state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6.pruning_state\.safetensors is missing.*checkpoint-3"):
        train(make_model("llama"), recipe(), resume=checkpoint, **SAVING)
    shutil.rmtree(checkpoint.with_name("checkpoint-3"))
    with pytest.raises(ValueError, match=r"is missing.*resume_from"):
        train(make_model("llama"), recipe(), resume=checkpoint, **SAVING)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_state_is_refused(make_model: Callable, train: Train, checkpoint: Path, size: int) -> None:
    path = checkpoint / "pruning_state.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"damaged or truncated.*checkpoint-3"):
        train(make_model("llama"), recipe(), resume=checkpoint, **SAVING)


def test_a_file_of_something_else_is_refused(make_model: Callable, train: Train, checkpoint: Path) -> None:
    save_file({"x": torch.zeros(1)}, checkpoint / "pruning_state.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        train(make_model("llama"), recipe(), resume=checkpoint, **SAVING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_sparsity": 0.7}, r"final_sparsity was 0\.6 and is 0\.7"),
        ({"criterion": "magnitude", "end": 7}, r"end was 6 and is 7; criterion was 'mama' and is 'magnitude'"),
    ],
)
def test_another_recipe_is_refused(
    make_model: Callable, train: Train, checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(make_model("llama"), recipe(**change), resume=checkpoint, **SAVING)


def test_another_step_is_refused(make_model: Callable, train: Train, checkpoint: Path) -> None:
    name = "pruning_state.safetensors"
    shutil.copy(checkpoint.with_name("checkpoint-3") / name, checkpoint / name)
    with pytest.raises(ValueError, match="is of step 3, but the trainer resumes at step 6"):
        train(make_model("llama"), recipe(), resume=checkpoint, **SAVING)


def test_another_model_is_refused(make_model: Callable, train: Train, checkpoint: Path) -> None:
    name = "pruning_state.safetensors"
    deep, output_dir = make_model("llama", num_hidden_layers=3), str(checkpoint.parent / "deep")
    train(deep, recipe(), (Stop(6),), output_dir=output_dir, **SAVING)
    folder = Path(output_dir) / "checkpoint-6"
    shutil.copy(checkpoint / name, folder / name)
    with pytest.raises(ValueError, match="does not fit this model"):
        train(deep, recipe(), resume=folder, output_dir=output_dir, **SAVING)


def test_a_moved_checkpoint_resumes(make_model: Callable, train: Train, checkpoint: Path, tmp_path: Path) -> None:
    full = train(make_model("llama"), recipe(), **SAVING)
    moved = tmp_path / "elsewhere/copy"
    shutil.copytree(checkpoint, moved)
    shutil.rmtree(checkpoint.parent)
    with pytest.raises(ValueError, match=r"is missing.*resume_from"):
        train(make_model("llama"), recipe(), resume=moved, **SAVING)
    resumed = train(make_model("llama"), recipe(), resume=moved, resume_from=moved, **SAVING)
    assert_same_run(full, resumed)


def test_a_wrong_resume_from_is_refused(make_model: Callable, train: Train, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        train(make_model("llama"), recipe(), resume=checkpoint, resume_from=Path("nowhere"), **SAVING)


# ---------------------------------------------------------------------------------------------- two processes


def run_rank(
    rank: int,
    port: int,
    folder: str,
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    configs: dict[str, MamaPruningConfig],
) -> None:
    """One of two processes: trains with each recipe, then once more from the checkpoint of step 5."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    for name, config in configs.items():
        for resume in (None, f"{folder}/{name}/checkpoint-5"):
            args = TrainingArguments(
                output_dir=f"{folder}/{name}",
                use_cpu=True,
                ddp_backend="gloo",
                max_steps=10,
                per_device_train_batch_size=2,
                save_steps=5,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            callbacks = [MamaPruningCallback(config)]
            trainer = Trainer(copy.deepcopy(model), args, train_dataset=rows, callbacks=callbacks)
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=resume)
            masks = dict(zip(pruner(trainer).pools.names, pruner(trainer).masks))
            tensors = dict(trainer.model.state_dict()) | {f"mask.{key}": mask for key, mask in masks.items()}
            save_file(tensors, f"{folder}/{name}-{resume is not None}-{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # without the teardown of gloo, in which one process may wait for ever for the other


def test_two_processes_agree(tiny_llama: LlamaForCausalLM, make_dataset: Callable, tmp_path: Path) -> None:
    configs = {
        "mama": recipe(),
        "taylor": recipe(criterion="taylor", regrowth=0.1),
        "wanda": recipe(criterion="wanda", end=8),
        "random": recipe(criterion="random"),
        "moved": recipe(move_values="least_squares", start=3, update_every=3),
        "neurons": recipe(granularity="neuron", criterion="wanda", final_sparsity=0.5),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = list(make_dataset())
    ranks = torch.multiprocessing.spawn(
        run_rank, (port, str(tmp_path), tiny_llama, rows, configs), nprocs=2, join=False, daemon=True
    )
    deadline = time.monotonic() + 180
    while not ranks.join(timeout=5):
        assert time.monotonic() < deadline, "the processes wait for each other"
    for name in configs:
        first, second, resumed, resumed_second = (
            load_file(tmp_path / f"{name}-{again}-{rank}.safetensors") for again in (False, True) for rank in (0, 1)
        )
        assert_same(first, second)
        assert_same(resumed, resumed_second)
        assert_same(first, resumed)
        if name == "neurons":
            assert [int(mask.sum()) for key, mask in first.items() if key.startswith("mask.")] == [32, 32]
            continue
        final = {key: first[key] for key in prunable(tiny_llama)}
        if name != "wanda" and name != "random":
            assert num_zeros(final) == round(0.6 * num_entries(final))
        for key, weight in final.items():
            assert_same(weight != 0, first[f"mask.{key}"])
