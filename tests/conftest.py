"""Tiny models built from a config, a tiny dataset and CPU training arguments. Nothing is downloaded."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
)


torch.set_num_threads(1)

VOCABULARY = 64

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_inner": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# name -> (model class, config class, config)
MODELS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _DECODER),
    "tied-llama": (LlamaForCausalLM, LlamaConfig, {**_DECODER, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _DECODER),  # biases in the query, key and value projections
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),  # Conv1D, tied embeddings
    "bert": (BertForMaskedLM, BertConfig, _BERT),  # an encoder
    "mixtral": (  # experts as 3-D parameters
        MixtralForCausalLM,
        MixtralConfig,
        {**_DECODER, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model(name, **config)`: a model of `MODELS` with the same weights each time, in training mode."""

    def make(name: str, **config: Any) -> PreTrainedModel:
        model_class, config_class, values = MODELS[name]
        torch.manual_seed(0)
        return model_class(config_class(**{**values, **config})).train()

    return make


@pytest.fixture
def tiny_llama(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """2 layers, 4 heads on 2 key-value heads, hidden 32, FFN 64, vocabulary 64; the output layer is not tied."""
    return make_model("llama")


@pytest.fixture
def make_dataset() -> Callable[..., Dataset]:
    """`make_dataset(num_examples=64, length=16)`: random `input_ids` with `labels` equal to them."""

    def make(num_examples: int = 64, length: int = 16, seed: int = 0) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (num_examples, length), generator=generator).tolist()
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    return make


@pytest.fixture
def training_arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """`training_arguments(**overrides)`: 10 quiet steps of batch 8 on the CPU, each of them logged, none saved."""

    def make(**overrides: Any) -> TrainingArguments:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 10,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**{**values, **overrides})

    return make
