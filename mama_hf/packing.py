"""A file of a packed model: a bit mask and the kept values in place of a tensor with zeros. Safetensors and JSON only.

- A tensor for which packing does not pay: `name`, as it is.
- Any other: `name.packed_mask`, uint8, a bit per entry in row-major order (1: kept), and `name.packed_values` [kept].
- Metadata `"mama_packed"`: JSON with the format's version, the number of tensors in all files together, the shape of
  each packed tensor, and the SHA-256 of each tensor. It finds damage; it is no signature.

Packing pays where a mask and the values take fewer bytes: from a sparsity of 1/16 on in bfloat16, 1/32 in float32.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import pack_bits, unpack_bits


FORMAT_VERSION = 1

_METADATA = "mama_packed"
_MASK, _VALUES = ".packed_mask", ".packed_values"
_ADVICE = "Get the file again, or save the model again with save_packed."


def write_shard(path: Path, tensors: dict[str, Tensor], total: int) -> None:
    """
    Write tensors into a file, under a temporary name first.

    Args:
        tensors (`dict[str, torch.Tensor]`): on any device, of any dtype and shape.
        total (`int`): number of tensors in all files of the model.
    """
    stored: dict[str, Tensor] = {}
    header: dict[str, Any] = {"version": FORMAT_VERSION, "total": total, "shapes": {}, "sha256": {}}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        parts = _pack(tensor)
        if len(parts) > 1:
            header["shapes"][name] = list(tensor.shape)
        header["sha256"][name] = _digest(name, tensor.shape, parts.values())
        stored |= {name + suffix: part for suffix, part in parts.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(stored, temporary, metadata={_METADATA: json.dumps(header)})
    os.replace(temporary, path)


def _pack(tensor: Tensor) -> dict[str, Tensor]:
    """Suffix -> what is stored: mask and values where they are smaller, the tensor itself (`""`) elsewhere."""
    kept = int(tensor.count_nonzero())
    if (tensor.numel() + 7) // 8 + kept * tensor.element_size() >= tensor.numel() * tensor.element_size():
        return {"": tensor}
    mask = tensor != 0
    return {_MASK: pack_bits(mask), _VALUES: tensor[mask]}


def _digest(name: str, shape: Iterable[int], parts: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(f"{name} {list(shape)}".encode())
    for part in parts:
        digest.update(str(part.dtype).encode())
        digest.update(part.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class StoredTensor:
    """
    A tensor that is read, checked and unpacked when transformers asks for its entries, `stored[...]`, as it does with
    the slices of a safetensors file.
    """

    def __init__(self, path: Path, file: Any, name: str, shape: list[int] | None, digest: str) -> None:
        self.path, self.file, self.name, self.shape, self.digest = path, file, name, shape, digest

    def __getitem__(self, index: Any) -> Tensor:
        if self.shape is None:
            tensor = self.file.get_tensor(self.name)
            self._check(tensor.shape, [tensor])
            return tensor[index]
        bits, values = self.file.get_tensor(self.name + _MASK), self.file.get_tensor(self.name + _VALUES)
        self._check(self.shape, [bits, values])
        mask = unpack_bits(bits, self.shape)
        return values.new_zeros(self.shape).masked_scatter_(mask, values)[index]

    def _check(self, shape: Iterable[int], parts: list[Tensor]) -> None:
        if _digest(self.name, shape, parts) != self.digest:
            raise ValueError(
                f"{self.name} in {self.path} is not what was saved: its SHA-256 differs from the header's. {_ADVICE}"
            )


def read_shards(paths: list[Path]) -> dict[str, StoredTensor]:
    """
    All tensors of a model's files, none of them read yet.

    Raises:
        `ValueError`: if a file is damaged, truncated or of another version, or if a tensor is in none.
    """
    tensors: dict[str, StoredTensor] = {}
    totals = set()
    for path in paths:
        found, total = _open_shard(path)
        tensors |= found
        totals.add(total)
    if totals != {len(tensors)}:
        raise ValueError(
            f"{', '.join(map(str, paths))} hold {len(tensors)} tensors, but their headers count {sorted(totals)}: a "
            f"file is missing or of another model. {_ADVICE}"
        )
    return tensors


def _open_shard(path: Path) -> tuple[dict[str, StoredTensor], int]:
    try:
        file = safe_open(path, "pt")
        header = json.loads(file.metadata()[_METADATA])
        shapes, digests, total = header["shapes"], header["sha256"], header["total"]
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}). {_ADVICE}") from error
    expected = {name + suffix for name in digests for suffix in ((_MASK, _VALUES) if name in shapes else ("",))}
    if header["version"] != FORMAT_VERSION or expected != set(file.keys()):
        different = ", ".join(sorted(expected ^ set(file.keys()))) or f"version {header['version']}"
        raise ValueError(f"{path} does not hold what its header lists: {different}. {_ADVICE}")
    return {name: StoredTensor(path, file, name, shapes.get(name), digests[name]) for name in digests}, total
