"""Tiny models of every architecture whose neurons and heads are known: biases, fused and interleaved weights, GQA."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel


_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LAYERS = ["sliding_attention", "full_attention"]

# name -> (model_type, config)
FAMILY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_DECODER, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {**_DECODER, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_DECODER, "sliding_window": 4}),
    "qwen2": ("qwen2", _DECODER),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": _LAYERS},
    ),
    "gemma3": (
        "gemma3_text",
        {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": _LAYERS},
    ),
    "phi3": ("phi3", {**_DECODER, "sliding_window": 4}),
    "gpt2": (
        "gpt2",
        {
            **{key: _DECODER[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
            **{"n_embd": 32, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        },
    ),
    "gpt_neox": ("gpt_neox", {**_DECODER, "num_attention_heads": 4}),
    "opt": (
        "opt",
        {**_DECODER, "num_attention_heads": 4, "ffn_dim": 24, "dropout": 0.0, "word_embed_proj_dim": 32},
    ),
    "smollm3": ("smollm3", {**_DECODER, "no_rope_layers": [1, 0]}),
    "bert": (
        "bert",
        {
            **{**_DECODER, "num_attention_heads": 4},
            **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        },
    ),
    "modernbert": (
        "modernbert",
        {**_DECODER, "num_attention_heads": 4, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    ),
}
ENCODERS = ("bert", "modernbert")
DECODERS = [name for name in FAMILY_MODELS if name not in ENCODERS]


def make_family(name: str, **config: Any) -> PreTrainedModel:
    """A model of `FAMILY_MODELS` with the same weights each time, biases too, in evaluation mode."""
    model_type, values = FAMILY_MODELS[name]
    own = {
        key: value
        for key, value in values.items()
        if model_type not in ("opt", "gpt_neox", *ENCODERS) or key not in ("num_key_value_heads",)
    }
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(model_type, **{**own, **config}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model.eval()


def random_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length], none of them special."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
