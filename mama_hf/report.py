"""What is sparse, in numbers: per tensor and in total, of a model in memory or of a folder on disk."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor, nn


_PATTERNS = ((2, 4), (1, 4), (4, 8))


class SparsityReport(dict):
    """
    A dict with the keys `"total"`, `"matrices"` (all weights with at least two dimensions, embeddings included) and
    `"tensors"` (by name). Each holds `zeros`, `parameters`, `sparsity` (zeros / parameters) and `bytes`; a tensor also
    `shape`, `dtype` and `n_of_m`, the N:M pattern that each group along its last dimension keeps to (`None`: none).
    With a pruned model `"pruned"` sums up the tensors that hold zeros. `print(report)` shows a table.
    """

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return json.loads(json.dumps(self))

    def __str__(self) -> str:
        table = Table(title="Sparsity", title_justify="left")
        table.add_column("tensor", overflow="fold")
        for column in ("shape", "dtype", "zeros", "parameters", "sparsity", "MB", "N:M"):
            table.add_column(column, justify="right")
        for name, row in self["tensors"].items():
            if row["zeros"]:
                shape = "x".join(map(str, row["shape"]))
                table.add_row(name, shape, row["dtype"], *_cells(row), row["n_of_m"] or "")
        table.add_section()
        for name in ("pruned", "total"):
            table.add_row(name, "", "", *_cells(self[name]), "")
        console = Console(width=140)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def sparsity_report(model: nn.Module | str | os.PathLike) -> SparsityReport:
    """
    Count the zeros of a model, or of the safetensors files in a folder without building the model.

    Args:
        model (`nn.Module` or `str`): tied weights count once.

    Raises:
        `FileNotFoundError`: for a folder without safetensors files.
    """
    tensors = _from_model(model) if isinstance(model, nn.Module) else _from_directory(Path(model))
    rows = {name: _describe(tensor) for name, tensor in tensors}
    return SparsityReport(
        total=_sum(list(rows.values())),
        pruned=_sum([row for row in rows.values() if row["zeros"] and len(row["shape"]) > 1]),
        matrices=_sum([row for row in rows.values() if len(row["shape"]) > 1]),
        tensors=rows,
    )


def _from_model(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def _from_directory(directory: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("pruning_state"))
    if not files:
        raise FileNotFoundError(f"There are no safetensors weights in {directory}.")
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def _describe(tensor: Tensor) -> dict[str, Any]:
    zeros = tensor.numel() - int(tensor.count_nonzero())
    return {
        "zeros": zeros,
        "parameters": tensor.numel(),
        "sparsity": zeros / max(1, tensor.numel()),
        "bytes": tensor.numel() * tensor.element_size(),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "n_of_m": _pattern(tensor) if zeros else None,
    }


def _pattern(tensor: Tensor) -> str | None:
    """The strictest of the usual N:M patterns that the tensor keeps to along its last dimension."""
    for kept, group in sorted(_PATTERNS, key=lambda pattern: pattern[0] / pattern[1]):
        fits = tensor.ndim > 1 and tensor.shape[-1] % group == 0
        if fits and int((tensor.reshape(-1, group) != 0).sum(dim=1).max()) <= kept:
            return f"{kept}:{group}"
    return None


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total = {key: sum(row[key] for row in rows) for key in ("zeros", "parameters", "bytes")}
    return {**total, "sparsity": total["zeros"] / max(1, total["parameters"])}


def _cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['zeros']:,}", f"{row['parameters']:,}", f"{row['sparsity']:.4f}", f"{row['bytes'] / 1e6:.2f}"]
