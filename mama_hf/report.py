"""What is sparse, in numbers: per tensor and in total, of a model in memory or of a folder on disk."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from .checkpoint import STATE_NAME
from .config import MamaPruningConfig
from .coupling import find_coupled_groups
from .groups import group_sum, members_of
from .modeling_mama import MODEL_CLASSES
from .packed import MamaPackedConfig, packed_tensors
from .targets import Target, matching_targets, plain_name


_PATTERNS = ((1, 4), (2, 4), (4, 8))  # strictest first


class SparsityReport(dict):
    """
    A dict with the keys `"total"` (all parameters), `"targets"` (the weights that the model's recipe prunes, or those
    of `target_modules="all-linear"` if it has none) and `"layers"` (each tensor, by name). Each holds `zeros`,
    `parameters`, `sparsity` (zeros / parameters) and `bytes`; a tensor also `shape`, `dtype`, `target` (whether it is
    one) and `n_of_m`, the strictest of 1:4, 2:4 and 4:8 that its rows keep to (`None`: none). `print(report)` shows a
    table.

    Where the recipe prunes neurons or heads, `"groups"` holds, for each kind, `zeros` (groups that are wholly zero,
    biases included), `groups` and `sparsity` (zeros / groups).
    """

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return json.loads(json.dumps(self))

    def __str__(self) -> str:
        table = Table(title="Sparsity", title_justify="left")
        table.add_column("tensor", overflow="fold")
        for column in ("shape", "dtype", "zeros", "parameters", "sparsity", "MB", "N:M"):
            table.add_column(column, justify="right")
        for name, row in self["layers"].items():
            if row["target"]:
                shape = "x".join(map(str, row["shape"]))
                table.add_row(name, shape, row["dtype"], *_cells(row), row["n_of_m"] or "")
        table.add_section()
        for name in ("targets", "total"):
            table.add_row(name, "", "", *_cells(self[name]), "")
        for kind, row in self.get("groups", {}).items():
            table.add_row(
                f"{kind}s", "", "", f"{row['zeros']:,}", f"{row['groups']:,}", f"{row['sparsity']:.4f}", "", ""
            )
        return _text(table)


class OneShotReport(dict):
    """
    What [`prune_model`] did: a dict with the keys `"recipe"` and `"layers"`. Each weight, by name, has `zeros`,
    `parameters`, `sparsity`, `error_before` (|X W'^T - Y|^2 / |Y|^2 on the calibration data with the kept weights as
    they were), `error` (the same after moving values) and `seconds`. `print(report)` shows a table.

    Where neurons or heads are pruned, a row is a layer's down or output projection, and `zeros` and `parameters` count
    groups. Where layers are dropped, a row is a layer, and both errors are its influence.
    """

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned weights together; of the groups, or the layers, where these are pruned."""
        rows = self["layers"].values()
        return sum(row["zeros"] for row in rows) / sum(row["parameters"] for row in rows)

    @property
    def seconds(self) -> float:
        """Time spent on all weights, without the passes over the data."""
        return sum(row["seconds"] for row in self["layers"].values())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return json.loads(json.dumps({**self, "sparsity": self.sparsity, "seconds": self.seconds}))

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_dict` as a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        table = Table(title="One-shot pruning", title_justify="left")
        table.add_column("weight", overflow="fold")
        for column in ("sparsity", "error, not moved", "error", "seconds"):
            table.add_column(column, justify="right")
        for name, row in self["layers"].items():
            errors = (f"{row['error_before']:.5f}", f"{row['error']:.5f}")
            table.add_row(name, f"{row['sparsity']:.4f}", *errors, f"{row['seconds']:.2f}")
        table.add_section()
        table.add_row("all", f"{self.sparsity:.4f}", "", "", f"{self.seconds:.2f}")
        return _text(table)


class TrainingReport(dict):
    """
    What came of pruning while training: a dict with the keys `asked` (`final_sparsity`), `reached`, `reward_before`,
    `reward_after` (`None` without rewards), `stopped_by` (in words), `restored` (which state was put back and why, in
    words, with the reward measured of it as `reward_after`; `None`: none), `num_rollbacks`, `num_held`, `num_checks`,
    and `seconds` spent on pruning since training began or was resumed. `print(report)` shows a table.
    """

    def __str__(self) -> str:
        table = Table(title="Pruning", title_justify="left", show_header=False)
        texts = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in self.items()}
        rows = {
            "sparsity asked": texts["asked"],
            "sparsity reached": texts["reached"],
            "reward before": texts["reward_before"],
            "reward after": texts["reward_after"],
            "stopped by": texts["stopped_by"],
            "restored": texts["restored"],
            "updates taken back, left out": f"{texts['num_rollbacks']}, {texts['num_held']}",
            "reward checks": texts["num_checks"],
            "seconds in pruning": f"{self['seconds']:.1f}",
        }
        for row in rows.items():
            table.add_row(*row)
        return _text(table)


def sparsity_report(model: nn.Module | str | os.PathLike) -> SparsityReport:
    """
    Count the zeros of a model, or of the files in a folder, packed or not, without loading it whole.

    Args:
        model (`nn.Module` or `str`): tied weights count once.

    Raises:
        `FileNotFoundError`: for a folder without safetensors weights.
    """
    tensors: Iterable[tuple[str, Tensor]]
    skeleton: Any = model
    if isinstance(model, nn.Module):
        tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    else:
        files = _weight_files(Path(model))
        config = AutoConfig.from_pretrained(model)
        if isinstance(config, MamaPackedConfig):
            skeleton, tensors = _skeleton(config.base_config), packed_tensors(model)
        else:
            skeleton, tensors = _skeleton(config), _stored_tensors(files)
    targets = {target.name: target for target in matching_targets(skeleton, _recipe(skeleton))}
    groups = _GroupCount(skeleton)
    rows = {}
    for name, tensor in tensors:
        groups.see(plain_name(name), tensor)
        rows[name] = _describe(tensor, targets.get(plain_name(name)))
    if sum(row["target"] for row in rows.values()) < len(targets) and not isinstance(model, nn.Module):
        # the file has other names than the model, such as one for each expert: only loading joins them
        return sparsity_report(type(skeleton).from_pretrained(model, dtype="auto"))
    return SparsityReport(
        total=_sum(rows.values()),
        targets=_sum(row for row in rows.values() if row["target"]),
        layers=rows,
        **({"groups": groups.counts()} if groups.live else {}),
    )


class _GroupCount:
    """Which neurons and heads of the recipe have an entry that is not zero, tensor by tensor."""

    def __init__(self, skeleton: Any) -> None:
        recipe, found = _recipe(skeleton), []
        if recipe.is_structured and recipe.granularity != "layer":
            found = find_coupled_groups(skeleton, recipe.granularity, recipe.exclude_modules)
        self.live = {group: torch.zeros(group.num_groups, dtype=torch.bool) for group in found}
        self._owners = {member.name: (group, member) for group in found for member in members_of(group)}

    def see(self, name: str, tensor: Tensor) -> None:
        if name in self._owners:
            group, member = self._owners[name]
            self.live[group] |= group_sum(member, (tensor != 0).float()).cpu() > 0

    def counts(self) -> dict[str, dict[str, Any]]:
        counts: dict[str, dict[str, Any]] = {}
        for group, live in self.live.items():
            row = counts.setdefault(group.kind, {"zeros": 0, "groups": 0})
            row["zeros"] += int((~live).sum())
            row["groups"] += len(live)
        return {kind: {**row, "sparsity": row["zeros"] / row["groups"]} for kind, row in counts.items()}


def _text(table: Table) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _skeleton(config: Any) -> Any:
    """The model of a config without memory behind its parameters."""
    own = {model_class.__name__: model_class for model_class in MODEL_CLASSES.values()}
    name = config.architectures[0]
    with torch.device("meta"):
        return own[name](config) if name in own else getattr(transformers, name)(config)


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(path for path in directory.glob("*.safetensors") if path.name != STATE_NAME)
    if not files:
        raise FileNotFoundError(
            f"There are no safetensors weights in {directory}: a saved model has config.json and *.safetensors."
        )
    return files


def _stored_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def _recipe(model: Any) -> MamaPruningConfig:
    settings = getattr(getattr(model, "config", None), "mama", None)
    return MamaPruningConfig() if settings is None else MamaPruningConfig.from_dict(settings["recipe"])


def _describe(tensor: Tensor, target: Target | None) -> dict[str, Any]:
    zeros = tensor.numel() - int(tensor.count_nonzero())
    return {
        "zeros": zeros,
        "parameters": tensor.numel(),
        "sparsity": zeros / max(1, tensor.numel()),
        "bytes": tensor.numel() * tensor.element_size(),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "target": target is not None,
        "n_of_m": None if target is None else _pattern(target, tensor),
    }


def _pattern(target: Target, tensor: Tensor) -> str | None:
    """The strictest of the usual N:M patterns that the weight keeps to."""
    for kept, group in _PATTERNS:
        if target.num_inputs % group == 0 and target.keeps_to(tensor, kept, group):
            return f"{kept}:{group}"
    return None


def _sum(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total = dict.fromkeys(("zeros", "parameters", "bytes"), 0)
    for row in rows:
        for key in total:
            total[key] += row[key]
    return {**total, "sparsity": total["zeros"] / max(1, total["parameters"])}


def _cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['zeros']:,}", f"{row['parameters']:,}", f"{row['sparsity']:.4f}", f"{row['bytes'] / 1e6:.2f}"]
