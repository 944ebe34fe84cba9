"""Finished blocks on disk, so that `prune_model` can be stopped at any moment and go on. Safetensors and JSON only.

`state.json` is replaced last: it names the block that is finished and the file with the streams behind it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import Batch, fingerprint
from .config import MamaPruningConfig
from .targets import Target


STATE_NAME = "state.json"


class Progress:
    """
    The finished part of a run in a folder; without a folder nothing is read or written.

    Args:
        directory (`str`, *optional*): made if needed.
        targets (`list[Target]`): of the dense model.

    Raises:
        `ValueError`: if the folder holds another run.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None,
        model: PreTrainedModel,
        recipe: MamaPruningConfig,
        batches: list[Batch],
        targets: list[Target],
        iterations: int,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.targets = targets
        self.dense: list[Tensor] = []
        self.pruned: list[Tensor] = []
        self.rows: list[dict[str, Any]] = []
        self.sparsities: list[float] = []
        self._streams: str | None = None
        self._finished = 0
        if self.directory is None:
            return
        self.run = {
            "recipe": recipe.to_dict(),
            "iterations": iterations,
            "calibration": fingerprint(batches),
            "model": _hash(model),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / STATE_NAME).is_file():
            self._read(self.directory)

    def _read(self, directory: Path) -> None:
        try:
            state = json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
            saved = state["run"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{directory / STATE_NAME} is damaged ({error}). Delete the folder to start anew."
            ) from error
        changed = [key for key, value in self.run.items() if saved.get(key) != value]
        if changed:
            raise ValueError(
                f"{directory} holds a run with another {', '.join(changed)}. Resume with the same dense model, "
                "recipe, iterations and calibration, or choose another resume_dir."
            )
        self._finished, self._streams = state["finished"], state["streams"]
        self.rows, self.sparsities = state["rows"], state["sparsities"]

    def load(self, remember: Callable[[nn.Parameter], None]) -> int:
        """
        Put the finished blocks' weights into the model and read the streams behind them.

        Args:
            remember (`Callable`): called with each parameter before it changes.

        Returns:
            `int`: the first block that is left to do.
        """
        if self.directory is None or self._streams is None:
            return 0
        parameters = {name: parameter for target in self.targets for name, parameter in _parameters(target).items()}
        for index in range(self._finished):
            for name, value in load_file(self.directory / _block_name(index)).items():
                remember(parameters[name])
                parameters[name].data.copy_(value)
        streams = load_file(self.directory / self._streams)
        self.dense = [streams[name] for name in sorted(streams) if name.startswith("dense")]
        self.pruned = [streams[name] for name in sorted(streams) if name.startswith("pruned")]
        return self._finished

    def save(
        self,
        index: int,
        targets: Sequence[Target],
        dense: Sequence[Tensor],
        pruned: Sequence[Tensor],
        rows: list[dict[str, Any]],
        sparsities: list[float],
    ) -> None:
        """Block `index` is finished: write its weights, the streams behind it and the report so far."""
        if self.directory is None:
            return
        weights: dict[str, Tensor] = {name: value for target in targets for name, value in _parameters(target).items()}
        streams = {f"dense.{batch:08d}": value for batch, value in enumerate(dense)}
        streams |= {f"pruned.{batch:08d}": value for batch, value in enumerate(pruned)}
        name, previous = f"streams-{index:05d}.safetensors", self._streams
        self._write(_block_name(index), weights)
        self._write(name, streams)
        state = {"run": self.run, "finished": index + 1, "streams": name, "rows": rows, "sparsities": sparsities}
        temporary = self.directory / f".{STATE_NAME}.tmp"
        temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
        os.replace(temporary, self.directory / STATE_NAME)
        self._streams, self._finished = name, index + 1
        if previous is not None and previous != name:
            (self.directory / previous).unlink(missing_ok=True)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        assert self.directory is not None, "checked by the caller"
        temporary = self.directory / f".{name}.tmp"
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, temporary)
        os.replace(temporary, self.directory / name)


def _block_name(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _parameters(target: Target) -> dict[str, nn.Parameter]:
    """A target's weight and bias by name."""
    values = {target.name: target.parameter}
    if isinstance(target.module.bias, nn.Parameter):
        values[target.name.removesuffix("weight") + "bias"] = target.module.bias
    return values


def _hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
