"""`KeptState`: a copy that nothing can change, and its way through a file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mama_hf.kept import KeptState


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def masks() -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor([[True, False, True], [True, True, False]])}


def change_(layer: nn.Linear) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_newest_copy_comes_back_bit_for_bit(layer: nn.Linear, dtype: torch.dtype) -> None:
    layer.to(dtype)
    kept = KeptState(dict(layer.named_parameters()))
    for step in (3, 5):
        change_(layer)
        kept.keep(masks(), step, step / 10)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    change_(layer)
    parameters = list(layer.parameters())
    kept.restore_()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(now is then for now, then in zip(layer.parameters(), parameters))  # the optimizer's are these
    assert (kept.step, kept.reward) == (5, 0.5)


def test_a_mask_that_is_changed_later_stays_as_it_was(layer: nn.Linear) -> None:
    kept, given = KeptState(dict(layer.named_parameters())), masks()
    kept.keep(given, 1, 0.5)
    given["weight"].fill_(False)
    assert torch.equal(kept.masks["weight"], masks()["weight"])


@pytest.mark.parametrize("given", [masks(), {}], ids=["masks", "none yet"])
def test_it_goes_through_a_file(layer: nn.Linear, given: dict[str, torch.Tensor], tmp_path: Path) -> None:
    kept = KeptState(dict(layer.named_parameters()))
    kept.keep(given, 4, 0.75)
    tensors, values = kept.state_dict()
    save_file(tensors, tmp_path / "kept.safetensors")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    change_(layer)
    other = KeptState(dict(layer.named_parameters()))
    other.load_state_dict(load_file(tmp_path / "kept.safetensors"), values)
    other.restore_()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert other.masks.keys() == given.keys()
    assert all(torch.equal(other.masks[name], given[name]) for name in given)
    assert (other.step, other.reward) == (4, 0.75)


def test_a_file_without_a_weight_is_refused(layer: nn.Linear) -> None:
    kept = KeptState(dict(layer.named_parameters()))
    kept.keep(masks(), 1, 0.5)
    tensors, values = kept.state_dict()
    tensors.pop("weight.bias")
    with pytest.raises(KeyError, match=r"weight\.bias"):
        kept.load_state_dict(tensors, values)
