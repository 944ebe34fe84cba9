"""The model card of a pruned model: what was pruned, what it brings and what it does not, and how to load it."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from .packed import AUTO_CLASSES
from .report import SparsityReport, sparsity_report
from .version import __version__


logger = logging.getLogger(__name__)

_PAPER = "[Improved Methods for Model Pruning and Knowledge Distillation](https://arxiv.org/abs/2505.14052)"
_MIN_CPU_SPARSITY = 0.7  # where sparse kernels begin to pay on a CPU, see `sparse_inference`


def model_card(
    model: PreTrainedModel,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    dense: nn.Module | SparsityReport | None = None,
    packed_bytes: int | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    speed: Mapping[str, Any] | None = None,
    tokenizer: bool = False,
) -> ModelCard:
    """
    Write the model card. What is not known is left out; nothing is downloaded.

    Args:
        model (`PreTrainedModel`): the pruned one. Recipe and sparsity reached are taken from `model.config.mama`.
        repo_id (`str`): where it will be loaded from.
        base_model (`str`, *optional*): Hub id of the dense model; by default the one that `model` was loaded from.
        license (`str`, *optional*): by default that of the base's card, if that is in its folder or in the cache.
        dense (`nn.Module` or `SparsityReport`, *optional*): the model before, for parameters and bytes before.
        packed_bytes (`int`, *optional*): size of the files of [`save_packed`]; the card is one of a packed model then.
        metrics (`Mapping`, *optional*):
            name -> `{"after": 32.4, "on": "WikiText-2"}`, with `"before"` if it is known: of the dense model.
        speed (`Mapping`, *optional*):
            what was measured: `{"machine": "2 cores of ...", "unit": "tokens/s", "before": 3.1, "after": 5.0}`.
        tokenizer (`bool`, *optional*, defaults to `False`): whether one lies beside the model.

    Raises:
        `ValueError`: for metrics or a speed with other keys.
    """
    _check_keys("speed", speed, required={"machine", "unit", "before", "after"})
    for name, values in (metrics or {}).items():
        _check_keys(f"metrics[{name!r}]", values, required={"after", "on"}, optional={"before"})
    base_model = base_model or _loaded_from(model)
    report = sparsity_report(model)
    before = sparsity_report(dense) if isinstance(dense, nn.Module) else dense
    is_cut = before is not None and before["total"]["parameters"] > report["total"]["parameters"]
    data = _metadata(model, repo_id, base_model, license, metrics or {})
    sections = (
        f"# {repo_id.split('/')[-1]}",
        f"{_origin(base_model)}, pruned by mama-hf {__version__}. Method: {_PAPER}.",
        f"## What was pruned\n\n{_pruned(model, report)}\n\n{_sizes(report, before, packed_bytes)}",
        f"## What it brings\n\n{_benefit(report, is_cut, packed_bytes)}{_speed_table(speed)}",
        f"## Results\n\n{_metrics_table(metrics)}" if metrics else "",
        f"## Use\n\n{_snippet(model, repo_id, packed_bytes is not None, tokenizer)}",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _check_keys(
    name: str, values: Mapping[str, Any] | None, required: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> None:
    if values is not None and not required <= set(values) <= required | optional:
        raise ValueError(
            f"{name} has the keys {sorted(values)}. Set {', '.join(sorted(required))}"
            + (f", and if you like {', '.join(sorted(optional))}." if optional else ".")
        )


def _loaded_from(model: PreTrainedModel) -> str | None:
    """The Hub id that a model was loaded from, if it was not a folder."""
    name = model.config.name_or_path
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not Path(name).exists() else None


def _origin(base_model: str | None) -> str:
    if base_model is None:
        return "A language model"
    return base_model if Path(base_model).exists() else f"[{base_model}](https://huggingface.co/{base_model})"


def _metadata(
    model: PreTrainedModel, repo_id: str, base_model: str | None, license: str | None, metrics: Mapping[str, Any]
) -> ModelCardData:
    if license is None and base_model is not None:
        license = _license_of(base_model)
    if license is None:
        logger.warning("The model card has no license: set license= to that of the base model.")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", values["on"].lower()).strip("-"),
            dataset_name=values["on"],
            metric_type=name,
            metric_value=values["after"],
        )
        for name, values in metrics.items()
    ]
    is_hub_id = base_model is not None and not Path(base_model).exists()
    return ModelCardData(
        base_model=base_model if is_hub_id else None,
        library_name="transformers",
        license=license,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        pipeline_tag="text-generation" if model.can_generate() else None,
        tags=["mama-hf", "pruning", "sparsity"],
    )


def _license_of(base_model: str) -> str | None:
    """From the base's card, in its folder or in the cache."""
    path: Any = Path(base_model) / "README.md"
    if not path.is_file():
        path = None if Path(base_model).exists() else try_to_load_from_cache(base_model, "README.md")
    return ModelCard.load(path).data.license if isinstance(path, str | Path) else None


def _pruned(model: PreTrainedModel, report: SparsityReport) -> str:
    settings = getattr(model.config, "mama", None)
    there = f"{report['targets']['sparsity']:.4f} of the entries of the weights that are pruned are zero now."
    if settings is None:
        return f"The recipe is not recorded. {there[0].upper()}{there[1:]}"
    asked, reached = settings["recipe"]["final_sparsity"], settings["sparsity"]
    recipe = json.dumps(settings["recipe"], indent=2)
    return f"Sparsity asked for: {asked}; reached: {reached:.4f}. {there}\n\nThe recipe:\n\n```json\n{recipe}\n```"


def _sizes(report: SparsityReport, before: SparsityReport | None, packed_bytes: int | None) -> str:
    columns = [report] if before is None else [before, report]
    head = "| | this model |\n|---|---|" if before is None else "| | before | this model |\n|---|---|---|"
    rows = {
        "parameters": [column["total"]["parameters"] for column in columns],
        "of them not zero": [column["total"]["parameters"] - column["total"]["zeros"] for column in columns],
        "bytes in memory": [column["total"]["bytes"] for column in columns],
    }
    if packed_bytes is not None:
        rows["bytes on disk"] = [*(column["total"]["bytes"] for column in columns[:-1]), packed_bytes]
    return "\n".join([head, *(f"| {name} | {' | '.join(f'{n:,}' for n in row)} |" for name, row in rows.items())])


def _benefit(report: SparsityReport, is_cut: bool, packed_bytes: int | None) -> str:
    lines = []
    if is_cut:
        lines.append("What was pruned is cut out of the weights: the model is smaller, and less is computed.")
    if report["targets"]["zeros"]:
        lines.append(
            "Zeros by themselves make a model neither smaller in memory nor faster: a dense kernel multiplies by them."
        )
        if packed_bytes is not None:
            lines.append("The files are packed: on disk, a zero takes one bit.")
        lines.append(_kernels(report))
    return " ".join(lines) or "Nothing is zero, and nothing was cut out: this model is as large and as fast as before."


def _kernels(report: SparsityReport) -> str:
    """What can make use of the zeros."""
    targets = [row for row in report["layers"].values() if row["target"]]
    if all(row["n_of_m"] in ("1:4", "2:4") for row in targets):
        return "They are in 2:4 patterns, which `mama_hf.sparse_inference` hands to the kernels of NVIDIA GPUs for it."
    if report["targets"]["sparsity"] >= _MIN_CPU_SPARSITY:
        return "They are enough for `mama_hf.sparse_inference`, which decodes faster on a CPU where it measures so."
    return "They are too few for sparse kernels to be faster, so expect no speed-up."


def _speed_table(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return " Speed was not measured."
    ratio = speed["after"] / speed["before"]
    return (
        f"\n\n| {speed['unit']} on {speed['machine']} | before | this model | ratio |\n|---|---|---|---|\n"
        f"| | {speed['before']} | {speed['after']} | {ratio:.2f} |"
    )


def _metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"| {name} | {values['on']} | {values.get('before', 'not measured')} | {values['after']} |"
        for name, values in metrics.items()
    ]
    return "\n".join(["| metric | on | before | this model |", "|---|---|---|---|", *rows])


def _snippet(model: PreTrainedModel, repo_id: str, is_packed: bool, tokenizer: bool) -> str:
    # the class by which it loads; one that is in no mapping is made on the fly, by a package that registers these two
    guess = AutoModelForCausalLM if model.can_generate() else AutoModel
    config = type(model.config)
    auto = next((a for a in AUTO_CLASSES if a._model_mapping.get(config, None) is type(model)), guess).__name__
    lines = []
    if is_packed or model.config.model_type == "mama":
        lines.append("import mama_hf  # pip install mama-hf: without it, transformers can't read this format")
    lines.append(f"from transformers import {auto}{', AutoTokenizer' if tokenizer else ''}\n")
    lines.append(f'model = {auto}.from_pretrained("{repo_id}")')
    if tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")')
    if tokenizer and model.can_generate():
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
        lines.append("print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))")
    return "```python\n" + "\n".join(lines) + "\n```"
