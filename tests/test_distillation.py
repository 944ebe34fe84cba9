"""The trainers that distil, against trainers that run both models in full; and what a teacher may not change."""

import copy
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix6
import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_divergence import DIRECTIONS, naive
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mama_hf import (
    MamaGRPOTrainer,
    MamaPruningCallback,
    MamaPruningConfig,
    MamaSFTTrainer,
    MamaTrainer,
    prune_model,
    sparsity_report,
)


TIMES = ("runtime", "_per_second", "step_time", "train_loss")
TOKENIZER = mix6.build_tokenizer()
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}
KINDS = ["trainer", "sft", "grpo"]
Make = Callable[..., Any]


def recipe(**overrides: Any) -> MamaPruningConfig:
    values = {"final_sparsity": 0.6, "start": 2, "end": 4, "update_every": 1, "distillation_weight": 0.7}
    return MamaPruningConfig(**{**values, **overrides})


def pad(side: str) -> Callable[[list[dict[str, list[int]]]], dict[str, Tensor]]:
    """A collator that pads ids, and with -100 labels, on one side."""

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            missing = length - len(row["input_ids"])
            for key, filler, values in (
                ("input_ids", 0, row["input_ids"]),
                ("attention_mask", 0, [1] * len(row["input_ids"])),
                ("labels", -100, row["labels"]),
            ):
                fill = [filler] * missing
                batch[key].append(fill + values if side == "left" else values + fill)
        return {key: torch.tensor(values) for key, values in batch.items()}

    return collate


def token_rows() -> Dataset:
    """Rows of 3 to 12 tokens; the first two have no loss."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 23, (3 + index % 10,), generator=generator).tolist() for index in range(48)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 2 + row[2:] for row in rows]})


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"?{'48291'[: index % 5]}=" for index in range(48)]})


def digit_sum(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(sum(map(ord, each)) % 5) for each in completions]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(kind, model, trainer_class, padding, **settings)`: a trainer of 6 steps of 4 rows."""

    def build(
        kind: str, model: Any, trainer_class: type, padding: str = "right", keywords: Any = None, **settings: Any
    ) -> Any:
        settings = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, **SETTINGS, **settings}
        given = {"model": model, **(keywords or {})}
        if kind == "trainer":
            given |= {"args": TrainingArguments(**settings), "train_dataset": token_rows()}
            given |= {"data_collator": pad(padding), "processing_class": TOKENIZER}
        elif kind == "sft":
            given |= {"args": SFTConfig(**settings), "train_dataset": token_rows()}
            given |= {"data_collator": pad(padding), "processing_class": TOKENIZER}
        else:
            settings = {"num_generations": 4, "max_completion_length": 5, "warmup_steps": 0, **settings}
            given |= {"args": GRPOConfig(**settings), "train_dataset": prompts(), "reward_funcs": digit_sum}
            given |= {"processing_class": TOKENIZER}
        trainer = trainer_class(**given)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build


OURS = {"trainer": MamaTrainer, "sft": MamaSFTTrainer, "grpo": MamaGRPOTrainer}
PLAIN = {"trainer": Trainer, "sft": SFTTrainer, "grpo": GRPOTrainer}


@pytest.fixture
def student(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama", vocab_size=len(TOKENIZER))


@pytest.fixture
def teacher(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Another architecture, width and depth, with the same vocabulary, and sure of itself."""
    model = make_model("gpt2", vocab_size=len(TOKENIZER), n_embd=48, n_layer=1)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
    return model


def logs(trainer: Trainer, but: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in (*TIMES, *but))}
        for entry in trainer.state.log_history
    ]


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def sparsity(model: nn.Module) -> float:
    targets = sparsity_report(model)["targets"]
    assert targets["zeros"] == round(0.6 * targets["parameters"])
    return targets["sparsity"]


# ---------------------------------------------------------------------------------------------- the gradient


class Gradients(TrainerCallback):
    """The gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.steps.append({name: each.grad.clone() for name, each in parameters if each.grad is not None})


def two_forwards(kind: str, teacher: PreTrainedModel, direction: str) -> type:
    """The plain trainer, with the logits of all tokens of both models in its loss."""

    class TwoForwards(PLAIN[kind]):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            if kind == "grpo":
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
                seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
                mask = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1) == 1
                count = inputs["num_items_in_batch"] / 2  # two accumulation windows in a generation batch
            else:
                ids, seen = inputs["input_ids"], inputs["attention_mask"]
                mask, count = inputs["labels"] != -100, num_items_in_batch
            for row, keep in enumerate(mask):
                ours = model(input_ids=ids, attention_mask=seen).logits[row, :-1][keep[1:]]
                theirs = teacher(input_ids=ids, attention_mask=seen).logits[row, :-1][keep[1:]].detach()
                if len(ours):
                    loss = loss + 0.7 * naive(ours, theirs, direction, 1.5).sum() / count
            return loss

    return TwoForwards


# TRL 1.16 switches checkpointing off and on around generation by the old names
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("kind", "padding"), [("trainer", "left"), ("trainer", "right"), ("sft", "right"), ("grpo", "both")]
)
def test_gradient_equals_two_forwards(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    make: Make,
    kind: str,
    padding: str,
    checkpointing: bool,
    direction: Any,
) -> None:
    """With gradient accumulation; in GRPO prompts are padded on the left and completions on the right."""
    settings = {"gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing, "max_steps": 2}
    settings |= {"learning_rate": 0.0, "max_grad_norm": 0.0}
    settings |= {"steps_per_generation": 4} if kind == "grpo" else {}
    expected, got = Gradients(), Gradients()
    config = recipe(final_sparsity=0.0, start=1, end=1, distillation_temperature=1.5, distillation_direction=direction)
    keywords = {"callbacks": [expected]}
    two = two_forwards(kind, copy.deepcopy(teacher).eval(), direction)
    plain = make(kind, copy.deepcopy(student), two, padding, keywords, **settings)
    plain.train()
    keywords = {"callbacks": [got], "pruning_config": config, "teacher_model": teacher}
    ours = make(kind, student, OURS[kind], padding, keywords, **settings)
    ours.train()
    assert ours.model.is_activation_checkpointing == checkpointing
    assert len(got.steps) == len(expected.steps) == 2
    for first, second in zip(got.steps, expected.steps):
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5)
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in plain.state.log_history if "loss" in entry], abs=1e-5)
    assert [entry["pruning/distillation_loss"] > 0.01 for entry in logs(ours) if "loss" in entry] == [True, True]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("per_generation", [1, 4])
def test_tokens_weigh_what_they_weigh_in_the_policy_loss(
    student: PreTrainedModel, make: Make, loss_type: str, per_generation: int
) -> None:
    """TRL's loss is linear in per-token advantages while the ratio is 1, with the weights as slopes."""
    pairs = []

    class Probe(MamaGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            probe = {key: value for key, value in inputs.items() if key != "old_per_token_logps"}
            probe["advantages"] = torch.randn(inputs["completion_mask"].shape)
            weights = self.token_weights(inputs, None)
            completions = weights[:, -inputs["completion_mask"].shape[1] :]
            assert not weights[:, : -completions.shape[1]].any()
            assert weights.shape[1] == inputs["prompt_mask"].shape[1] + completions.shape[1] - 1
            pairs.append(
                (super()._compute_loss(model, probe).item(), -(completions * probe["advantages"]).sum().item())
            )
            return super()._compute_loss(model, inputs)

    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": per_generation, "max_steps": 2}
    make("grpo", student, Probe, loss_type=loss_type, **settings).train()
    assert len(pairs) == 4
    for loss, ours in pairs:
        assert loss == pytest.approx(ours, rel=1e-4, abs=1e-6)


def first_gradient(
    model: PreTrainedModel, teacher: PreTrainedModel, folder: str, batch_size: int
) -> dict[str, Tensor]:
    """Of a step on 8 rows in two batches, from all processes together."""
    witness, settings = Gradients(), {**SETTINGS, "max_steps": 1, "max_grad_norm": 0.0, "output_dir": folder}
    settings |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2}
    settings |= {"ddp_backend": "gloo"} if batch_size == 2 else {}
    trainer = MamaTrainer(
        copy.deepcopy(model),
        TrainingArguments(**settings),
        pad("left"),
        token_rows(),
        callbacks=[witness],
        pruning_config=recipe(start=1, end=1),
        teacher_model=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    entry = trainer.state.log_history[0]
    metrics = {key: torch.tensor(entry[key]) for key in ("pruning/distillation_loss", "pruning/teacher_agreement")}
    return witness.steps[0] | metrics


def run_rank(rank: int, port: int, folder: str, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    save_file(first_gradient(model, teacher, folder, batch_size=2), f"{folder}/{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # without the teardown of gloo, in which one process may wait for ever for the other


def test_two_processes_get_the_gradient_of_one(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, str(tmp_path), student, teacher)
    ranks = torch.multiprocessing.spawn(run_rank, given, nprocs=2, join=False, daemon=True)
    expected = first_gradient(student, teacher, str(tmp_path), batch_size=4)
    deadline = time.monotonic() + 120
    while not ranks.join(timeout=5):
        assert time.monotonic() < deadline, "the processes wait for each other"
    for rank in (0, 1):
        got = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the runs


@pytest.mark.parametrize("kind", KINDS)
def test_without_teacher_it_is_the_plain_trainer(student: PreTrainedModel, make: Make, kind: str) -> None:
    plain = make(kind, copy.deepcopy(student), PLAIN[kind])
    plain.train()
    ours = make(kind, student, OURS[kind])
    ours.train()
    assert_same(dict(ours.model.state_dict()), dict(plain.model.state_dict()))
    assert logs(ours) == logs(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_callback_prunes_the_same(student: PreTrainedModel, make: Make, kind: str) -> None:
    config = recipe(distillation_weight=0.0, ema_decay=0.9)
    plain = make(kind, copy.deepcopy(student), PLAIN[kind], keywords={"callbacks": [MamaPruningCallback(config)]})
    plain.train()
    ours = make(kind, student, OURS[kind], keywords={"pruning_config": config})
    ours.train()
    assert_same(dict(ours.model.state_dict()), dict(plain.model.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["model", "initial", "snapshot"])
def test_teachers_reach_the_exact_sparsity(
    student: PreTrainedModel, teacher: PreTrainedModel, make: Make, kind: str, source: str
) -> None:
    before = copy.deepcopy(student.state_dict())
    theirs = copy.deepcopy(teacher.state_dict())
    keywords = {"pruning_config": recipe(), "teacher_model": teacher if source == "model" else source}
    trainer = make(kind, student, OURS[kind], keywords=keywords)
    trainer.train()
    sparsity(trainer.model)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    with_teacher = [entry["step"] for entry in entries if "pruning/distillation_loss" in entry]
    assert with_teacher == ([3, 4, 5, 6] if source == "snapshot" else [1, 2, 3, 4, 5, 6])
    last = entries[-1]
    assert last["pruning/distillation_loss"] > 0
    assert 0 <= last["pruning/teacher_agreement"] <= 1
    if source == "model":
        assert_same(theirs, teacher.state_dict())
    elif source == "initial":
        assert entries[0]["pruning/distillation_loss"] == pytest.approx(0, abs=1e-6)
        assert entries[0]["pruning/teacher_agreement"] == 1.0
        assert_same(before, dict(trainer.teacher.model.state_dict()))
    else:
        assert not any((weight == 0).all() for weight in trainer.teacher.model.state_dict().values())
        assert sparsity_report(trainer.teacher.model)["targets"]["zeros"] == 0


def test_distillation_pulls_towards_the_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, make: Make
) -> None:
    ends = []
    for weight in (0.01, 5.0):
        keywords = {"pruning_config": recipe(distillation_weight=weight), "teacher_model": teacher}
        trainer = make("trainer", copy.deepcopy(student), MamaTrainer, keywords=keywords, max_steps=20)
        trainer.train()
        ends.append(trainer.state.log_history[-2]["pruning/distillation_loss"])
    assert ends[1] < 0.9 * ends[0]


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_evaluation_is_the_task_alone(
    student: PreTrainedModel, teacher: PreTrainedModel, make: Make, kind: str
) -> None:
    keywords = {"pruning_config": recipe(), "teacher_model": teacher, "eval_dataset": token_rows()}
    trainer = make(kind, student, OURS[kind], keywords=keywords)
    plain = make(kind, copy.deepcopy(student), PLAIN[kind], keywords={"eval_dataset": token_rows()})
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_mixed_precision_and_a_bf16_teacher(student: PreTrainedModel, teacher: PreTrainedModel, make: Make) -> None:
    values = []
    for half in (False, True):
        keywords = {"pruning_config": recipe(), "teacher_model": teacher.to(torch.bfloat16 if half else torch.float32)}
        trainer = make("sft", copy.deepcopy(student), MamaSFTTrainer, keywords=keywords, bf16=half)
        trainer.train()
        assert trainer.teacher.model.dtype == (torch.bfloat16 if half else torch.float32)
        sparsity(trainer.model)
        values.append(trainer.state.log_history[0]["pruning/distillation_loss"])
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.02)


@pytest.mark.parametrize("source", ["initial", "snapshot"])
def test_lora(student: PreTrainedModel, make: Make, source: str) -> None:
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    keywords = {"pruning_config": recipe(), "teacher_model": source, "peft_config": lora}
    trainer = make("sft", student, MamaSFTTrainer, keywords=keywords)
    trainer.train()
    assert trainer.state.log_history[-2]["pruning/distillation_loss"] > 0
    sparsity(trainer.model.merge_and_unload())
    assert sparsity_report(trainer.teacher.model)["targets"]["zeros"] == 0


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("source", ["initial", "snapshot"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_uninterrupted(
    student: PreTrainedModel, make: Make, tmp_path: Path, kind: str, source: str
) -> None:
    """From before the snapshot, from the step at which it is taken, and from after it."""
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    settings |= {"steps_per_generation": 2} if kind == "grpo" else {}
    keywords = {"pruning_config": recipe(), "teacher_model": source}
    full = make(kind, copy.deepcopy(student), OURS[kind], keywords=keywords, **settings)
    full.train()
    but = ("num_tokens",)  # SFTTrainer itself begins to count anew
    final, history = copy.deepcopy(full.model.state_dict()), logs(full, but)
    for step in (5, 2, 1) if source == "snapshot" else (2,):
        other = copy.deepcopy(student)
        nn.init.normal_(other.lm_head.weight)  # the teacher is not made of what the script loads
        resumed = make(kind, other, OURS[kind], keywords=keywords, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
        assert_same(dict(final), dict(resumed.model.state_dict()))
        assert history == logs(resumed, but)


@pytest.fixture
def saved(student: PreTrainedModel, make: Make, tmp_path: Path) -> Path:
    """The folder of a run with a snapshot and checkpoints at steps 1, 3 and 5."""
    keywords = {"pruning_config": recipe(), "teacher_model": "snapshot"}
    make("trainer", student, MamaTrainer, keywords=keywords, save_strategy="steps", save_steps=2, max_steps=5).train()
    return tmp_path / "run"


def resume(make: Make, student: PreTrainedModel, checkpoint: Path) -> None:
    keywords = {"pruning_config": recipe(), "teacher_model": "snapshot"}
    trainer = make("trainer", copy.deepcopy(student), MamaTrainer, keywords=keywords, max_steps=5)
    trainer.train(resume_from_checkpoint=str(checkpoint))


def test_teacher_is_not_saved_with_the_model(saved: Path, student: PreTrainedModel) -> None:
    (stored,) = saved.glob("_teacher-*")
    assert stored.stat().st_size > 10_000
    for folder in saved.glob("checkpoint-*"):
        assert {path.name for path in folder.glob("*.safetensors")} == {
            "model.safetensors",
            "pruning_state.safetensors",
        }
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.state_dict().keys() == student.state_dict().keys()
        assert json.loads((folder / "teacher.json").read_text())["file"] == stored.name
        assert (folder / "teacher.json").stat().st_size < 200
    assert not list(saved.rglob("*.tmp"))


@pytest.mark.parametrize("problem", ["pointer", "file", "damaged"])
def test_lost_teachers_are_refused(saved: Path, make: Make, student: PreTrainedModel, problem: str) -> None:
    (stored,) = saved.glob("_teacher-*")
    if problem == "pointer":
        (saved / "checkpoint-4/teacher.json").unlink()
    elif problem == "file":
        stored.rename(saved / "elsewhere")
    else:
        content = bytearray(stored.read_bytes())
        content[-1] ^= 1
        stored.write_bytes(content)
    message = {"pointer": "teacher.json is missing", "file": "is missing. Put it", "damaged": "is damaged"}[problem]
    with pytest.raises(ValueError, match=message):
        resume(make, student, saved / "checkpoint-4")


def test_another_run_in_the_folder_leaves_the_teacher(saved: Path, make: Make, student: PreTrainedModel) -> None:
    with torch.no_grad():
        student.lm_head.weight.mul_(2)
    keywords = {"pruning_config": recipe(), "teacher_model": "snapshot"}
    make("trainer", student, MamaTrainer, keywords=keywords, save_strategy="steps", save_steps=3).train()
    assert len(list(saved.glob("_teacher-*"))) == 2
    resume(make, student, saved / "checkpoint-4")


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config", "source", "message"),
    [
        (recipe(), None, "distillation_weight=0.7 needs a teacher"),
        (recipe(distillation_weight=0.0), "initial", "does nothing without distillation_weight"),
        (None, "initial", "does nothing without distillation_weight"),
        (recipe(), "no/such/folder", "no/such/folder"),
    ],
    ids=["no teacher", "no weight", "no recipe", "no folder"],
)
def test_teacher_and_weight_go_together(
    student: PreTrainedModel, make: Make, kind: str, config: MamaPruningConfig | None, source: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, student, OURS[kind], keywords={"pruning_config": config, "teacher_model": source})


@pytest.mark.parametrize("setting", ["use_liger_kernel", "torch_compile"])
def test_settings_that_hide_the_model_are_refused(student: PreTrainedModel, make: Make, setting: str) -> None:
    keywords = {"pruning_config": recipe(), "teacher_model": "initial"}
    trainer = make("trainer", student, MamaTrainer)
    setattr(trainer.args, setting, True)
    with pytest.raises(ValueError, match=setting):
        trainer.set_teacher(keywords["pruning_config"], "initial")


def test_weight_without_a_trainer_that_distils_is_refused(student: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"distillation_weight=0\.7.*MamaTrainer"):
        MamaPruningCallback(recipe())
    with pytest.raises(ValueError, match="distillation_weight"):
        prune_model(student, recipe(), [torch.arange(8).unsqueeze(0)])


def test_two_callbacks_are_refused(student: PreTrainedModel, make: Make) -> None:
    config = recipe(distillation_weight=0.0)
    keywords = {"pruning_config": config, "callbacks": [MamaPruningCallback(config)]}
    with pytest.raises(ValueError, match="not both"):
        make("trainer", student, MamaTrainer, keywords=keywords)


def test_batches_without_labels_are_refused(student: PreTrainedModel, make: Make) -> None:
    trainer = make("trainer", student, MamaTrainer)
    with pytest.raises(ValueError, match="labels"):
        trainer.token_weights({"input_ids": torch.zeros(1, 3)}, None)


# ---------------------------------------------------------------------------------------------- the served form


@pytest.mark.parametrize("kind", list(OURS))
def test_the_shrunk_model_is_saved_when_training_ends(
    kind: str, student: PreTrainedModel, make: Make, tmp_path: Path
) -> None:
    config = recipe(granularity="neuron", final_sparsity=0.5, scope="layer", distillation_weight=0.0)
    trainer = make(kind, student, OURS[kind], keywords={"pruning_config": config, "shrink_to": tmp_path / "small"})
    trainer.train()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.intermediate_size == student.config.intermediate_size // 2
    ids = torch.arange(3, 11).unsqueeze(0)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(small.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "small" / "tokenizer.json").is_file()


def test_what_can_not_be_shrunk_is_refused_at_once(student: PreTrainedModel, make: Make) -> None:
    config = recipe(distillation_weight=0.0)
    for kind, trainer_class in OURS.items():
        with pytest.raises(ValueError, match=r"shrink_to='small' needs something to cut out.*neuron"):
            make(kind, student, trainer_class, keywords={"pruning_config": config, "shrink_to": "small"})
        with pytest.raises(ValueError, match="without pruning_config"):
            make(kind, student, trainer_class, keywords={"shrink_to": "small"})
