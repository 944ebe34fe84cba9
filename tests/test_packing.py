"""Tests of `mama_hf.packing`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mama_hf.packing import read_shards, write_shard


def sparse(*shape: int, sparsity: float = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Exactly `round(sparsity * numel)` zeros at random places; the rest is not zero."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(shape, generator=generator).abs() + 0.1).to(dtype)
    places = torch.randperm(values.numel(), generator=generator)[: round(sparsity * values.numel())]
    values.view(-1)[places] = 0
    return values


def read(path: Path, name: str = "weight") -> Tensor:
    return read_shards([path])[name][...]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "packed.safetensors"


@pytest.fixture
def written(path: Path) -> Path:
    """A file with one packed tensor, `weight`, and a dense one, `norm`."""
    write_shard(path, {"weight": sparse(5, 13), "norm": torch.ones(3)}, total=2)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 13), (8, 8), (1, 3), (4, 3, 5), (17,)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 1.0])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...], sparsity: float, path: Path) -> None:
    tensor = sparse(*shape, sparsity=sparsity, dtype=dtype)
    write_shard(path, {"weight": tensor}, total=1)
    back = read(path)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[float("nan"), 0.0, float("inf"), 0.0, 0.0, 1e-45, 0.0, 0.0]]),
        torch.tensor(0.0),
        torch.zeros(0),
        torch.zeros(4, 4, dtype=torch.int64),
        torch.tensor([True, False, False]),
        sparse(6, 4).T,  # not contiguous
    ],
)
def test_round_trip_of_odd_tensors(tensor: Tensor, path: Path) -> None:
    write_shard(path, {"weight": tensor}, total=1)
    assert torch.equal(read(path).nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_a_negative_zero_costs_nothing(path: Path) -> None:
    weight = torch.full((4, 16), -1.0) * (torch.arange(16) < 4)
    assert torch.signbit(weight).all()
    write_shard(path, {"weight": weight}, total=1)
    assert load_file(path)["weight.packed_values"].numel() == 16
    assert torch.equal(read(path), weight)


@pytest.mark.parametrize(
    ("dtype", "zeros", "packed"),
    [(torch.bfloat16, 64, False), (torch.bfloat16, 65, True), (torch.float32, 32, False), (torch.float32, 33, True)],
)
def test_packs_where_it_pays(dtype: torch.dtype, zeros: int, packed: bool, path: Path) -> None:
    write_shard(path, {"weight": sparse(32, 32, sparsity=zeros / 1024, dtype=dtype)}, total=1)
    assert set(load_file(path)) == ({"weight.packed_mask", "weight.packed_values"} if packed else {"weight"})


def test_nothing_is_read_before_it_is_asked_for(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr("mama_hf.packing.unpack_bits", lambda bits, shape: names.append(shape))
    tensors = read_shards([written])
    assert (list(tensors), names) == (["weight", "norm"], [])


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **header: object) -> None:
    """The file again with other tensors or header entries."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["mama_packed"])
    save_file({**load_file(path), **(tensors or {})}, path, {"mama_packed": json.dumps({**metadata, **header})})


@pytest.mark.parametrize("key", ["weight.packed_mask", "weight.packed_values", "norm"])
def test_one_changed_entry_is_found(key: str, written: Path) -> None:
    changed = load_file(written)[key].clone()
    changed.view(-1)[1] += 1
    rewrite(written, {key: changed})
    name = key.split(".")[0]
    with pytest.raises(ValueError, match=rf"{name} in .*packed\.safetensors is not what was saved: its SHA-256"):
        read(written, name)


def test_a_changed_shape_is_found(written: Path) -> None:
    rewrite(written, shapes={"weight": [13, 5]})
    with pytest.raises(ValueError, match=r"weight in .* SHA-256"):
        read(written)


def test_a_lost_value_is_found(written: Path) -> None:
    rewrite(written, {"weight.packed_values": load_file(written)["weight.packed_values"][:-1].clone()})
    with pytest.raises(ValueError, match=r"weight in .* SHA-256"):
        read(written)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(share: float, written: Path) -> None:
    content = written.read_bytes()
    written.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"packed\.safetensors is damaged or truncated .* save_packed"):
        read_shards([written])


def test_a_foreign_file_is_refused(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="is damaged or truncated"):
        read_shards([path])


def test_a_missing_or_additional_tensor_is_refused(written: Path) -> None:
    rewrite(written, {"extra": torch.ones(1)})
    with pytest.raises(ValueError, match="does not hold what its header lists: extra"):
        read_shards([written])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for index, path in enumerate(paths):
        write_shard(path, {f"weight{index}": sparse(4, 4)}, total=2)
    assert len(read_shards(paths)) == 2
    with pytest.raises(ValueError, match=r"hold 1 tensors, but their headers count \[2\]"):
        read_shards(paths[:1])


def test_another_version_is_refused(written: Path) -> None:
    rewrite(written, version=2)
    with pytest.raises(ValueError, match="version 2"):
        read_shards([written])


def test_no_temporary_file_stays(written: Path) -> None:
    assert list(written.parent.iterdir()) == [written]
