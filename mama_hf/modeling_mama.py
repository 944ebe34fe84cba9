"""
Models whose layers differ in width. It is one file, however long, that imports nothing of this package: it ships
beside the weights, for those who load them without the package.

Shapes: O = out, I = in, G = coupled groups of a layer (FFN neurons, or key-value heads with their query heads).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D


FORMAT_VERSION = 1
SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


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


class LayerConfig:
    """A config as one layer sees it: its own sizes, and everything else live from the model's config."""

    def __init__(self, config: PreTrainedConfig, sizes: dict[str, int]) -> None:
        self.__dict__.update(sizes, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying asks for, before there is a config
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


class LayerConfigs(Sequence):
    """What transformers reads as `config.per_layer_config`: caches and adapters get each layer's head count there."""

    def __init__(self, config: "MamaConfig") -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):  # a type of attention: layers differ in their sizes only
            return self.config
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        sizes = self.config.layer_sizes[range(len(self))[index]]
        return LayerConfig(self.config, {**sizes, "head_dim": run_lengths(self.config)["k"]})


class MamaConfig(PreTrainedConfig):
    """
    The config of a model whose layers differ in width: its base model's fields, and the sizes of each layer.

    `MamaConfig(base_model_type="llama", ...)` is a `LlamaConfig` too.

    Args:
        base_model_type (`str`): `model_type` of the architecture.
        format_version (`int`, *optional*, defaults to 1): version of what is described here.
        per_layer_config (`dict[str, dict[str, int]]`):
            `intermediate_size`, `num_attention_heads` and `num_key_value_heads` of each layer, by its index. Read
            back, it is a sequence of configs, one a layer, as in transformers.
        kwargs: the fields of the base model's config, with the sizes that its layers had before they were cut.

    Raises:
        `ValueError`: if a field is missing or can't be read, by its name.
    """

    model_type = "mama"
    _auto_class = "AutoConfig"  # `save_pretrained` copies this file, for those who load without the package
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mama.MamaConfig",
        "AutoModel": "modeling_mama.MamaModel",
        "AutoModelForCausalLM": "modeling_mama.MamaForCausalLM",
        "AutoModelForMaskedLM": "modeling_mama.MamaForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_mama.MamaForSequenceClassification",
    }

    native_config: ClassVar[type[PreTrainedConfig] | None] = None

    base_model_type: str | None = None
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **kwargs: Any) -> "MamaConfig":
        version = kwargs.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r} of this mama model can't be read here, only {FORMAT_VERSION}. "
                "Load it with the mama-hf version that wrote it, or a newer one."
            )
        return super().__new__(_config_class(kwargs.get("base_model_type")) if cls is MamaConfig else cls)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("per_layer_config", {})  # refused below if it is missing
        super().__post_init__(**kwargs)

    @property
    def per_layer_config(self) -> Any:
        return LayerConfigs(self)

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        given = {str(key): sizes for key, sizes in value.items()}
        expected = [str(index) for index in range(self.num_hidden_layers)]
        if missing := [key for key in expected if key not in given]:
            raise ValueError(f"per_layer_config has no entry for layer {', '.join(missing)}. Each layer needs one.")
        if unknown := [key for key in given if key not in expected]:
            raise ValueError(
                f"per_layer_config has an entry for layer {', '.join(unknown)}, but num_hidden_layers is "
                f"{self.num_hidden_layers}."
            )
        self._layers = {key: self._checked(key, given[key]) for key in expected}

    def _checked(self, key: str, sizes: dict[str, int]) -> dict[str, int]:
        if not isinstance(sizes, dict):
            raise ValueError(f'per_layer_config["{key}"] is {sizes!r}. It must hold {", ".join(SIZES)}.')
        for name in SIZES:
            if type(sizes.get(name)) is not int or sizes[name] < 1:
                raise ValueError(
                    f'per_layer_config["{key}"]["{name}"] is {sizes.get(name)!r}. It must be a positive whole number.'
                )
        lengths = run_lengths(self)
        if sizes["num_attention_heads"] * lengths["k"] != sizes["num_key_value_heads"] * lengths["q"]:
            raise ValueError(
                f'per_layer_config["{key}"]: num_attention_heads={sizes["num_attention_heads"]} must be '
                f"num_key_value_heads={sizes['num_key_value_heads']} times {lengths['q'] // lengths['k']}, as in the "
                "base model."
            )
        return {name: sizes[name] for name in SIZES}

    @property
    def layer_sizes(self) -> list[dict[str, int]]:
        """The sizes of each layer, in order."""
        return list(self._layers.values())

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["per_layer_config"] = output.pop("_layers")
        output["auto_map"] = dict(self.auto_map)
        return output


@functools.cache
def _config_class(base_model_type: str | None) -> type[MamaConfig]:
    """`MamaConfig` for one architecture, a subclass of that one's config too; the Auto classes know it from now on."""
    if base_model_type not in CONFIG_MAPPING or base_model_type not in FAMILIES:
        raise ValueError(
            f"base_model_type={base_model_type!r} of this mama model is not an architecture known here. Known are "
            f"{', '.join(FAMILIES)}. A newer version of mama-hf or transformers may know it."
        )
    native: Any = CONFIG_MAPPING[base_model_type]
    values = {"__module__": __name__, "__qualname__": "MamaConfig", "native_config": native}
    config_class: Any = type("MamaConfig", (MamaConfig, native), values)
    for auto_class, model_class in MODEL_CLASSES.items():
        auto_class.register(config_class, model_class, exist_ok=True)
    return config_class


class MamaPreTrainedModel(PreTrainedModel):
    """
    A model of a native class, with layers of the sizes in its `MamaConfig`.

    What is made is a subclass of this class *and* of the base model's class. The only changes with respect to the
    latter are `__init__`, which replaces Linears once they are there; `from_pretrained`, which names the weights whose
    shapes do not fit; and `_from_config`, which finds that subclass.
    """

    config_class = MamaConfig
    native_classes: ClassVar[Any] = None

    def __new__(cls, config: PreTrainedConfig | None = None, *args: Any, **kwargs: Any) -> "MamaPreTrainedModel":
        return super().__new__(cls if config is None else _model_class(cls, type(config)))

    def __init__(self, config: MamaConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _resize(self)
        self.init_weights()  # of the new Linears; the others are marked as done

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        config_class = type(kwargs.get("config"))
        if not issubclass(config_class, MamaConfig):
            values, _ = MamaConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            config_class = _config_class(values.get("base_model_type"))
        native: Any = super(MamaPreTrainedModel, _model_class(cls, config_class))
        wants_info, tolerant = kwargs.pop("output_loading_info", False), kwargs.get("ignore_mismatched_sizes", False)
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)
        model, info = native.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if info["mismatched_keys"] and not tolerant:
            wrong = sorted(info["mismatched_keys"])
            shapes = "; ".join(f"{name} is {tuple(has)} and should be {tuple(needs)}" for name, has, needs in wrong)
            raise ValueError(f"per_layer_config does not describe the weights: {shapes}. Restore config.json.")
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        native: Any = super(MamaPreTrainedModel, _model_class(cls, type(config)))
        return native._from_config(config, **kwargs)


class MamaModel(MamaPreTrainedModel):
    """The base model, without a head."""

    native_classes = MODEL_MAPPING


class MamaForCausalLM(MamaPreTrainedModel):
    """A causal language model."""

    native_classes = MODEL_FOR_CAUSAL_LM_MAPPING


class MamaForMaskedLM(MamaPreTrainedModel):
    """A masked language model."""

    native_classes = MODEL_FOR_MASKED_LM_MAPPING


class MamaForSequenceClassification(MamaPreTrainedModel):
    """A classifier, or a reward model."""

    native_classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


MODEL_CLASSES: dict[Any, type[MamaPreTrainedModel]] = {
    AutoModel: MamaModel,
    AutoModelForCausalLM: MamaForCausalLM,
    AutoModelForMaskedLM: MamaForMaskedLM,
    AutoModelForSequenceClassification: MamaForSequenceClassification,
}


def _derive(cls: Any, config_class: Any) -> Any:
    """The subclass of a class above and of the native class that goes with a config; itself if it is one already."""
    if cls not in MODEL_CLASSES.values():
        return cls
    native = config_class.native_config if issubclass(config_class, MamaConfig) else None
    if native not in cls.native_classes:
        raise ValueError(
            f"{cls.__name__} can't be made from a {config_class.__name__} of {native and native.__name__}. Give the "
            "MamaConfig of an architecture that has such a model."
        )
    values = {"__module__": __name__, "__qualname__": cls.__name__, "config_class": config_class}
    return type(cls.__name__, (cls, cls.native_classes[native]), values)


_model_class: Callable[[Any, Any], Any] = functools.cache(_derive)


def _resize(model: PreTrainedModel) -> None:
    """Give the Linears of each layer the sizes in the model's config."""
    family, lengths = family_of(model.config), run_lengths(model.config)
    layers: Any = model.base_model.get_submodule(family.layers)
    for layer, sizes in zip(layers, model.config.per_layer_config):
        for coupling, num_groups, length in (
            (family.neuron, sizes.intermediate_size, lengths["n"]),
            (family.head, sizes.num_key_value_heads, lengths["q"]),
        ):
            for path, layout in coupling.readers.items():
                _replace(layer, path, outputs=num_groups * sum(blocks(layout, lengths)))
            _replace(layer, coupling.writer, inputs=num_groups * length)
            kept = {
                "groups": num_groups,
                "heads": sizes.num_attention_heads,
                "features": num_groups * length,
                "config": sizes,
            }
            for path, what in coupling.counts.items():
                owner, _, name = path.rpartition(".")
                setattr(layer.get_submodule(owner), name, kept[what])


def _replace(layer: nn.Module, path: str, inputs: int | None = None, outputs: int | None = None) -> None:
    """Put a Linear of another size in place of one, of the same type and with a bias where that has one."""
    old: Any = layer.get_submodule(path)
    if isinstance(old, Conv1D):
        new: nn.Module = Conv1D(outputs or old.nf, inputs or old.nx)
    else:
        new = nn.Linear(inputs or old.in_features, outputs or old.out_features, bias=old.bias is not None)
    layer.set_submodule(path, new)
