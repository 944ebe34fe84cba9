"""Where teachers come from: copies of the student, paths, models; and what is refused before training."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix6
import peft
import pytest
import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from mama_hf import MamaPruningConfig
from mama_hf.teacher import TeacherCallback, effective_weights, frozen_copy


RECIPE = MamaPruningConfig(distillation_weight=1.0)
TOKENS = torch.arange(10).unsqueeze(0)
MakeModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("name", ["llama", "tied-llama", "qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy_is_frozen_and_equal(make_model: MakeModel, name: str, dtype: torch.dtype) -> None:
    model = make_model(name).to(dtype)
    state = torch.get_rng_state()
    twin = frozen_copy(model, effective_weights(model))
    assert torch.equal(state, torch.get_rng_state())
    assert not twin.training
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype}
    before = model.eval()(TOKENS).logits
    torch.testing.assert_close(twin(TOKENS).logits, before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(TOKENS).logits, before, rtol=0, atol=0)


def test_copy_of_a_patched_model_is_its_own(tiny_llama: PreTrainedModel) -> None:
    """TRL replaces `forward` of the instance, and a deep copy of that computes with the original's weights."""
    add_fused_lm_head(tiny_llama)
    twin, deep = frozen_copy(tiny_llama, effective_weights(tiny_llama)), copy.deepcopy(tiny_llama)
    before = tiny_llama(TOKENS).logits
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    torch.testing.assert_close(twin(TOKENS).logits, before, rtol=0, atol=0)
    assert not deep(TOKENS).logits.any()


def test_copy_of_lora_is_merged(tiny_llama: PreTrainedModel) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama, config)
    twin = frozen_copy(model, effective_weights(model))
    torch.testing.assert_close(twin(TOKENS).logits, model(TOKENS).logits)


def test_copy_of_another_adapter_is_refused(tiny_llama: PreTrainedModel) -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(tiny_llama, config)
    with pytest.raises(ValueError, match="ia3"):
        frozen_copy(model, effective_weights(model))


@pytest.fixture
def student(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama", vocab_size=len(mix6.build_tokenizer()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_path(student: PreTrainedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    student.to(dtype).save_pretrained(tmp_path)
    mix6.build_tokenizer().save_pretrained(tmp_path)
    teacher = TeacherCallback(tmp_path, RECIPE, student, mix6.build_tokenizer()).model
    assert teacher is not None
    assert teacher.dtype == dtype
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(dict(teacher.named_parameters()), dict(student.named_parameters()), rtol=0, atol=0)


def test_path_without_tokenizer_warns(
    student: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        TeacherCallback(tmp_path, RECIPE, student, mix6.build_tokenizer())
    assert "no tokenizer" in caplog.text


def test_other_tokenizer_is_refused(student: PreTrainedModel, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path)
    tokenizer = mix6.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match=r"another tokenizer: 1 tokens.*'extra'"):
        TeacherCallback(tmp_path, RECIPE, student, tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda student, make_model: "no/where/at/all", r"'no/where/at/all' can't be loaded.*\"snapshot\""),
        (lambda student, make_model: 3, "is a int"),
        (lambda student, make_model: make_model("llama", vocab_size=99), "LlamaForCausalLM.*99 tokens.*23"),
        (lambda student, make_model: make_model("bert", vocab_size=23), "BertForMaskedLM"),
        (lambda student, make_model: student, '"initial"'),
    ],
    ids=["missing", "number", "vocabulary", "bert", "itself"],
)
def test_bad_teachers_are_refused(
    student: PreTrainedModel, make_model: MakeModel, make: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherCallback(make(student, make_model), RECIPE, student)
