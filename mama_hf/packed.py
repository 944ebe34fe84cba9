"""Packed checkpoints: a folder with a model whose zeros take a bit each. `packing` has the format of its files.

`config.json` says `model_type="mama_packed"` and holds the model's own config; the weights are in
`packed_model*.safetensors`. So a library that does not know the format finds neither a model type nor weights, and
fails.
"""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import cached_file

from .config import MamaPruningConfig
from .packing import FORMAT_VERSION, read_shards, write_shard
from .version import __version__


WEIGHTS_NAME = "packed_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# what `from_pretrained` of transformers takes and this one does not
_REFUSED = (
    *("state_dict", "quantization_config", "gguf_file", "variant", "offload_folder"),
    *("tp_plan", "tp_size", "device_mesh", "distributed_config", "from_tf", "from_flax"),
)


class MamaPackedConfig(PreTrainedConfig):
    """
    The config of a packed folder: `base_config`, the config of the model inside, and `format_version`. Options of
    `from_pretrained` that change a config change the one inside. The only change with respect to `PreTrainedConfig`
    is `from_dict`.
    """

    model_type = "mama_packed"
    base_config: Any = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        version, base = config_dict.get("format_version"), config_dict.get("base_config")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"config.json of this packed model has format_version={version!r}; mama-hf {__version__} reads "
                f"{FORMAT_VERSION}. Update mama-hf, or save it again with save_packed."
            )
        if not isinstance(base, dict) or base.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"config.json of this packed model has base_config={base!r:.200}, which has no model_type that this "
                "version of transformers knows. Update transformers, or save it again with save_packed."
            )
        return_unused = kwargs.pop("return_unused_kwargs", False)
        base, unused = CONFIG_MAPPING[base["model_type"]].from_dict(base, return_unused_kwargs=True, **kwargs)
        config = cls(base_config=base, format_version=version)
        config.name_or_path = base.name_or_path
        return (config, unused) if return_unused else config


def save_packed(
    model: PreTrainedModel, save_directory: str | os.PathLike, max_shard_size: int | str = "5GB"
) -> list[str]:
    """
    Save a model with zeros so that it takes less room on disk. `AutoModelForCausalLM.from_pretrained` (or the Auto
    class of its architecture) loads it, as the native class and bit for bit, once `mama_hf` is imported.

    At a sparsity s a packed weight takes 1 - s + 1/16 of its bytes in bfloat16 (+ 1/32 in float32). In memory it is as
    large, and as fast, as before. A zero with a sign, -0.0, loads as 0.0.

    Args:
        model (`PreTrainedModel`): on any device; its tied weights are saved once. It is not changed.
        save_directory (`str`): made if needed. `pruning_config.json` is written too if the model has a recipe.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): of a file, before packing.

    Returns:
        `list[str]`: the names of the files, `config.json` last, which is also the order in which they are written.

    Raises:
        `ValueError`: for a quantized model, one with an adapter or with weights that are not in memory, and for a
        folder that holds an unpacked model.
    """
    directory = Path(save_directory)
    _check_can_pack(model, directory)
    directory.mkdir(parents=True, exist_ok=True)
    # a folder with a config is complete, also if this is stopped half-way through replacing an earlier one
    (directory / "config.json").unlink(missing_ok=True)
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    pattern = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        write_shard(directory / filename, {name: state[name] for name in names}, len(state))
    files = list(split.filename_to_tensors)
    if split.is_sharded:
        _write_json(directory / INDEX_NAME, {"weight_map": split.tensor_to_filename})
        files.append(INDEX_NAME)
    _remove_others(directory, files)
    return files + _write_configs(model, directory)


def _check_can_pack(model: Any, directory: Path) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"save_packed got a {type(model).__name__}, which is not a transformers model. Merge a PEFT adapter first "
            "(model.merge_and_unload()), and unwrap wrappers."
        )
    problem = None
    if getattr(model, "_hf_peft_config_loaded", False):
        problem = "it has an adapter, whose sum with the base is what is sparse (merge it first)"
    elif getattr(model, "hf_quantizer", None) is not None:
        problem = "it is quantized (save it with save_pretrained)"
    elif any(parameter.is_meta for parameter in model.parameters()):
        problem = "some of its weights are not in memory (load it without offloading)"
    elif (directory / "model.safetensors").exists() or (directory / "model.safetensors.index.json").exists():
        problem = f"{directory} holds an unpacked model, and would hold two (choose another folder)"
    if problem is not None:
        raise ValueError(f"{type(model).__name__} can't be packed: {problem}.")


def _write_configs(model: Any, directory: Path) -> list[str]:
    """The other files, `config.json` last."""
    files = []
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
        files.append("generation_config.json")
    settings = getattr(model.config, "mama", None)
    if settings is not None:
        MamaPruningConfig.from_dict(settings["recipe"]).save_pretrained(directory)
        files.append("pruning_config.json")
    base = copy.deepcopy(model.config)
    base.architectures, base.dtype, base.name_or_path = [type(model).__name__], model.dtype, ""
    config = MamaPackedConfig(base_config=base, format_version=FORMAT_VERSION)
    _write_json(directory / "config.json", json.loads(config.to_json_string()))
    return [*files, "config.json"]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _remove_others(directory: Path, files: list[str]) -> None:
    """Take away what an earlier, differently sharded save has left."""
    for path in directory.glob("packed_model*"):
        if (
            re.fullmatch(r"packed_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name)
            and path.name not in files
        ):
            path.unlink()


def packed_tensors(directory: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, unpacked, of all that is in a packed folder, one after the other."""
    for name, stored in read_shards(_files(directory, {})).items():
        yield name, stored[...]


class PackedModel:
    """
    What an Auto class calls for a packed folder: it returns a model of the native class. Abstract; `loader_of` makes
    the final class for an Auto class.
    """

    config_class = MamaPackedConfig
    auto_class: Any

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args: Any, config: MamaPackedConfig, **kwargs: Any) -> Any:
        refused = [key for key in _REFUSED if kwargs.get(key) is not None]
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            refused.append("device_map with 'disk'")
        if refused:
            raise ValueError(
                f"A packed model can't be loaded with {', '.join(refused)}. Load it without, or save it unpacked "
                "first (model.save_pretrained)."
            )
        hub = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        with torch.device("meta"):
            skeleton = cls.auto_class.from_config(config.base_config)
        state = read_shards(_files(name, hub))
        if "generation_config" not in kwargs and cached_file(
            name, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub
        ):
            kwargs["generation_config"] = GenerationConfig.from_pretrained(name, **hub)
        # transformers reads, casts, places and lets go of one entry of `state` after the other
        result = type(skeleton).from_pretrained(None, *args, config=skeleton.config, state_dict=state, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.name_or_path = model.config.name_or_path = str(name)
        return result

    @classmethod
    def _from_config(cls, config: MamaPackedConfig, **kwargs: Any) -> Any:
        return cls.auto_class.from_config(config.base_config, **kwargs)


def loader_of(auto_class: Any) -> type[PackedModel]:
    """The class to register with an Auto class."""
    return type(f"Packed{auto_class.__name__}", (PackedModel,), {"auto_class": auto_class})


def _files(name: str | os.PathLike, hub: dict[str, Any]) -> list[Path]:
    index = cached_file(name, INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        return [Path(cast(str, cached_file(name, WEIGHTS_NAME, **hub)))]
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(cast(str, cached_file(name, shard, **hub))) for shard in shards]
