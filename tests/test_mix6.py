"""Tests of the demo task, `examples/mix6.py`."""

import random
from pathlib import Path
from typing import Any

import mix6
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOTrainer


# TRL 1.16 reads the property by the old name, which transformers 5.24 deprecates.
ignore_renamed_checkpointing = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return mix6.build_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return mix6.build_model(tokenizer, seed=0)


def weights(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    text = mix6.CHARACTERS + "?482913=123489"
    ids = tokenizer(text).input_ids
    assert len(tokenizer) == 23
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer("1<eos>").input_ids[1:] == [tokenizer.eos_token_id]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("x").input_ids == [tokenizer.unk_token_id]


def test_tokenizer_pads_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(["12", "1234"], padding=True)
    assert batch.input_ids[0][:2] == [tokenizer.pad_token_id] * 2
    assert batch.attention_mask[0] == [0, 0, 1, 1]


def test_tokenizer_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded(["?482913=", "1"], padding=True).input_ids == tokenizer(["?482913=", "1"], padding=True).input_ids
    assert loaded.decode(loaded("?482913=").input_ids) == "?482913="


def test_model_size_and_seed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert model.num_parameters() == 109_760
    state = torch.get_rng_state()
    assert torch.equal(weights(model), weights(mix6.build_model(tokenizer, seed=0)))
    assert not torch.equal(weights(model), weights(mix6.build_model(tokenizer, seed=1)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("operation", "answer"), [("a", "123489"), ("d", "984321"), ("r", "319284"), ("c", "482913")])
def test_operations(operation: str, answer: str) -> None:
    assert mix6.OPERATIONS[operation]("482913") == answer


def test_pretraining_examples_follow_the_mix(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    examples = [mix6._pretraining_example(rng) for _ in range(5000)]
    lengths = {len(ids) for ids in tokenizer(examples).input_ids}
    assert lengths == {15}
    asked = [example for example in examples if example[0] == "?"]
    ascending = sum(example[8:14] == mix6.OPERATIONS["a"](example[1:7]) for example in asked)
    assert len(asked) / len(examples) == pytest.approx(0.2, abs=0.02)
    assert ascending / len(asked) == pytest.approx(0.45, abs=0.04)


def test_reward_is_exact_match() -> None:
    completions = ["123489", "123498", "12348", "1234899", ""]
    assert mix6.exact_match_reward(completions, ["123489"] * 5, prompts=None) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_dataset_is_deterministic_and_correct() -> None:
    rows = mix6.grpo_dataset(seed=0, num_prompts=100)
    assert rows.to_dict() == mix6.grpo_dataset(seed=0, num_prompts=100).to_dict()
    assert rows["prompt"] != mix6.grpo_dataset(seed=1, num_prompts=100)["prompt"]
    assert all(row["answer"] == "".join(sorted(row["prompt"][1:7])) for row in rows)


def test_another_operation_can_be_rewarded() -> None:
    """The prompts stay, only the right answers change."""
    rows, copied = mix6.grpo_dataset(0, 20), mix6.grpo_dataset(0, 20, rewarded="c")
    assert copied["prompt"][:] == rows["prompt"][:]
    assert all(row["answer"] == row["prompt"][1:7] for row in copied)
    prompts, answers = mix6.heldout_prompts(20, rewarded="r")
    assert prompts == mix6.heldout_prompts(20)[0]
    assert answers == [prompt[6:0:-1] for prompt in prompts]


def test_heldout_prompts_are_in_no_training_data() -> None:
    prompts, answers = mix6.heldout_prompts(512)
    assert mix6.heldout_prompts(512) == (prompts, answers)
    assert len(set(prompts)) == len(answers) == 512
    rng = random.Random(0)
    pretraining = {mix6._pretraining_example(rng)[1:7] for _ in range(20_000)}
    post_training = {prompt[1:7] for prompt in mix6.grpo_dataset(seed=0)["prompt"]}
    assert {prompt[1:7] for prompt in prompts}.isdisjoint(pretraining | post_training)


def test_every_held_out_value_can_be_drawn() -> None:
    prompts, _ = mix6.heldout_prompts(10_310)
    assert {int(prompt[1:7]) % mix6.HELDOUT_DIVISOR for prompt in prompts} == {0}


def test_pretraining_is_deterministic_and_learns(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    twin = mix6.build_model(tokenizer, seed=0)
    before = weights(model)
    for each in (model, twin):
        mix6.pretrain(each, tokenizer, seed=0, num_steps=3, batch_size=16, disable_tqdm=True)
    assert not torch.equal(before, weights(model))
    assert torch.equal(weights(model), weights(twin))


def test_greedy_accuracy_restores_the_mode(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    assert mix6.greedy_accuracy(model, tokenizer, num_prompts=8) == 0.0
    assert model.training


def num_different_digits(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [float(len(set(completion))) for completion in completions]


@ignore_renamed_checkpointing
def test_grpo_runs(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """An untrained model never earns the exact match, so a second reward gives the steps a gradient."""
    before = weights(model)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[mix6.exact_match_reward, num_different_digits],
        args=mix6.grpo_arguments(
            str(tmp_path), seed=0, max_steps=3, per_device_train_batch_size=16, disable_tqdm=True
        ),
        train_dataset=mix6.grpo_dataset(seed=0, num_prompts=8),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["rewards/exact_match_reward/mean"] for entry in logged] == [0.0, 0.0, 0.0]
    assert not torch.equal(before, weights(model))
    assert weights(model).isfinite().all()
    assert not list(tmp_path.glob("checkpoint-*"))
