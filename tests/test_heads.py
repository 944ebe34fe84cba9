"""Output heads: the logits of native classes rebuilt from hidden states, or refused by name."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mama_hf.heads import OutputHead, backbone_calls, check_head


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("name", ["llama", "tied-llama", "qwen2", "gpt2", "mixtral"])
def test_plain_heads(make_model: Callable[..., PreTrainedModel], name: str) -> None:
    model = make_model(name)
    check_head(model)
    head = OutputHead.of(model)
    assert (head.scale, head.softcap) == (1.0, None)
    assert head.weight is model.get_output_embeddings().weight
    assert model.training


@pytest.mark.parametrize(
    ("model_class", "config", "scale", "softcap"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=0.02), 1.0, 0.02),
        (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25), 0.25, None),
        (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=4.0), 0.25, None),
    ],
    ids=["gemma2", "cohere", "granite"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_and_capped_heads(
    model_class: Any, config: Any, scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    model = model_class(config).to(dtype)
    check_head(model)
    head = OutputHead.of(model)
    assert (head.scale, head.softcap) == (scale, softcap)


def test_checking_draws_no_random_numbers(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("gpt2", embd_pdrop=0.5)
    state = torch.get_rng_state()
    check_head(model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["bert", "t5", "multiplied", "lora"])
def test_other_heads_are_refused(make_model: Callable[..., PreTrainedModel], name: str) -> None:
    """A transform before the output layer, an encoder, a field that means the opposite, an adapter on the layer."""
    if name == "bert":
        model, message = make_model("bert"), "BertForMaskedLM"
    elif name == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        message = "encoder"
    elif name == "multiplied":
        model, message = (
            HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SMALL, logits_scaling=4.0)),
            "HyperCLOVAXForCausalLM",
        )
    else:
        wrapped = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["lm_head"]))
        model, message = wrapped.get_base_model(), "adapter"
    with pytest.raises(ValueError, match=message):
        check_head(model)


def test_calls_are_seen_only_inside(tiny_llama: PreTrainedModel) -> None:
    tokens = torch.arange(5).unsqueeze(0)
    with backbone_calls(tiny_llama) as calls:
        logits = tiny_llama(input_ids=tokens).logits
    tiny_llama(input_ids=tokens)
    assert len(calls) == 1
    assert calls[0].kwargs["input_ids"] is tokens
    torch.testing.assert_close(tiny_llama.lm_head(calls[0].hidden), logits)
