"""
Models whose layers differ in width, in one file that imports nothing of this package: it ships beside the weights.

Shapes: O = out, I = in, G = coupled groups of a layer (FFN neurons, or key-value heads with their query heads).
"""

from dataclasses import dataclass, field

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Coupling:
    """
    One half of a layer, cut as a whole: what makes its groups and what reads them.

    Args:
        readers (`dict[str, str]`):
            module in the layer -> the blocks of its output features, in their order. Each block has G runs of
            features, one a group; a letter says how long a run is: `"n"` a neuron, `"q"` the queries of a key-value
            head, `"k"` and `"v"` its key and value. Letters joined by `+` interleave: each run has one of each.
        writer (`str`): module in the layer whose input features are the groups.
        counts (`dict[str, str]`, *optional*):
            attribute in the layer -> what is kept there of the groups: `"groups"`, `"heads"`, `"features"`, or
            `"config"` for a module that reads its head counts from the config.
    """

    readers: dict[str, str]
    writer: str
    counts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """
    How an architecture lays out its layers.

    Args:
        neuron (`Coupling`), head (`Coupling`): the FFN and the attention of a layer.
        layers (`str`, *optional*, defaults to `"layers"`): the layers' list in the base model.
        width (`str`, *optional*, defaults to `"intermediate_size"`): field of the config with the FFN's width.
        free_heads (`bool`, *optional*, defaults to `True`):
            whether the size of a head can be set apart from the number of heads in the native class.
    """

    neuron: Coupling
    head: Coupling
    layers: str = "layers"
    width: str = "intermediate_size"
    free_heads: bool = True


_LLAMA = Family(
    neuron=Coupling({"mlp.gate_proj": "n", "mlp.up_proj": "n"}, "mlp.down_proj"),
    head=Coupling({"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"}, "self_attn.o_proj"),
)

# model_type -> layout. An entry is all that a new architecture needs.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"), _LLAMA),
    "phi3": Family(
        neuron=Coupling({"mlp.gate_up_proj": "nn"}, "mlp.down_proj"),
        head=Coupling(
            {"self_attn.qkv_proj": "qkv"},
            "self_attn.o_proj",
            {"self_attn.num_key_value_heads": "groups", "self_attn.config": "config"},
        ),
    ),
    "gpt2": Family(
        neuron=Coupling({"mlp.c_fc": "n"}, "mlp.c_proj"),
        head=Coupling(
            {"attn.c_attn": "qkv"}, "attn.c_proj", {"attn.num_heads": "heads", "attn.split_size": "features"}
        ),
        layers="h",
        width="n_inner",
        free_heads=False,
    ),
    "gpt_neox": Family(
        neuron=Coupling({"mlp.dense_h_to_4h": "n"}, "mlp.dense_4h_to_h"),
        head=Coupling({"attention.query_key_value": "q+k+v"}, "attention.dense"),
        free_heads=False,
    ),
    "opt": Family(
        neuron=Coupling({"fc1": "n"}, "fc2"),
        head=Coupling(
            {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"},
            "self_attn.out_proj",
            {"self_attn.num_heads": "heads"},
        ),
        layers="decoder.layers",
        width="ffn_dim",
        free_heads=False,
    ),
    "bert": Family(
        neuron=Coupling({"intermediate.dense": "n"}, "output.dense"),
        head=Coupling(
            {"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v"},
            "attention.output.dense",
            {"attention.self.num_attention_heads": "heads", "attention.self.all_head_size": "features"},
        ),
        layers="encoder.layer",
        free_heads=False,
    ),
    "modernbert": Family(
        neuron=Coupling({"mlp.Wi": "nn"}, "mlp.Wo"),
        head=Coupling({"attn.Wqkv": "qkv"}, "attn.Wo"),
        free_heads=False,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """
    The layout of a model with this config, native or `MamaConfig`.

    Raises:
        `ValueError`: if the architecture is not known, with those that are.
    """
    model_type = getattr(config, "base_model_type", config.model_type)
    if model_type not in FAMILIES:
        raise ValueError(
            f"The neurons and heads of model_type={model_type!r} are not known. Known are {', '.join(FAMILIES)}. "
            "Prune it with an unstructured or N:M granularity."
        )
    return FAMILIES[model_type]


def run_lengths(config: PreTrainedConfig) -> dict[str, int]:
    """Letter of a block in `Coupling.readers` -> features a group has in it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {"n": 1, "q": config.num_attention_heads // num_groups * head_dim, "k": head_dim, "v": head_dim}


def blocks(layout: str, lengths: dict[str, int]) -> list[int]:
    """The layout of a reader as the run length of each block: `"qkv"` -> [q, k, v], `"q+k+v"` -> [q + k + v]."""
    if "+" in layout:
        return [sum(lengths[letter] for letter in layout.split("+"))]
    return [lengths[letter] for letter in layout]
