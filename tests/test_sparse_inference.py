"""Tests of `mama_hf.sparse_inference`. The clock is replaced but in one test."""

import copy
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mama_hf import save_packed, sparse_inference
from mama_hf.sparse_inference import SparseLinear


MODULE = importlib.import_module("mama_hf.sparse_inference")  # the package's attribute of that name is the function
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], None]:
    """`clock(speedup)`: what a measurement with so many tokens finds, in place of the time that it takes."""

    def set_speedup(speedup: Callable[[int], float]) -> None:
        monkeypatch.setattr(MODULE, "_speedup", lambda dense, sparse, num_tokens: speedup(num_tokens))

    return set_speedup


@pytest.fixture
def make_sparse(make_model: MakeModel) -> Callable[..., PreTrainedModel]:
    """`make_sparse(name, sparsity)`: exactly that share of zeros in each Linear of the layers."""

    def make(name: str = "llama", sparsity: float = 0.8) -> PreTrainedModel:
        model = make_model(name).eval()
        generator = torch.Generator().manual_seed(0)
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in key:
                places = torch.randperm(module.weight.numel(), generator=generator)
                module.weight.data.view(-1)[places[: round(sparsity * len(places))]] = 0
        return model

    return make


def replaced(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@torch.no_grad()
def logits(model: Any, num_rows: int, num_tokens: int) -> Tensor:
    return model(input_ids=torch.arange(num_rows * num_tokens).view(num_rows, -1) % 60 + 3).logits


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (3, 7), (1, 40)])
def test_equals_dense(name: str, shape: tuple[int, int], make_sparse: Callable, clock: Callable) -> None:
    clock(lambda num_tokens: 2.0 if num_tokens < 32 else 0.5)
    model = make_sparse(name)
    expected = logits(model, *shape)
    assert sparse_inference(model) is model
    assert len(replaced(model)) == 14
    assert all(module.tokens == range(1, 17) for module in replaced(model).values())
    torch.testing.assert_close(logits(model, *shape), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_as_dense(use_cache: bool, make_sparse: Callable, clock: Callable) -> None:
    clock(lambda num_tokens: 2.0)
    model = make_sparse()
    ids = torch.arange(3, 13).view(2, 5)
    ids[1, :2] = 0  # padding on the left
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False, "use_cache": use_cache}
    expected = model.generate(ids, **options)
    assert torch.equal(sparse_inference(model, batch_size=2).generate(ids, **options), expected)


def test_csr_is_used_for_its_tokens_only(
    make_sparse: Callable, clock: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(lambda num_tokens: 2.0 if 4 <= num_tokens <= 8 else 0.5)
    model = sparse_inference(make_sparse(), batch_size=4)
    calls: list[int] = []
    multiply = MODULE._multiply
    monkeypatch.setattr(MODULE, "_multiply", lambda csr, rows: calls.append(len(rows)) or multiply(csr, rows))
    for shape, used in [((1, 1), 0), ((1, 3), 0), ((4, 1), 14), ((1, 8), 14), ((1, 9), 0)]:
        calls.clear()
        logits(model, *shape)
        assert calls == used * [shape[0] * shape[1]]
    model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits.sum().backward()  # with a graph: dense, and it has gradients
    assert calls == []
    assert replaced(model)["model.layers.0.mlp.up_proj"].weight.grad is not None


def test_refuses_to_pretend_at_one_half(make_sparse: Callable, clock: Callable, caplog: Any) -> None:
    clock(lambda num_tokens: 100.0)
    model = sparse_inference(make_sparse(sparsity=0.5))
    assert replaced(model) == {}
    assert "leaves the model as it is: no nn.Linear has a sparsity of 0.6 or more" in caplog.text
    assert len(replaced(sparse_inference(model, batch_size=8))) == 14


def test_leaves_alone_what_is_not_faster(make_sparse: Callable, clock: Callable, caplog: Any) -> None:
    clock(lambda num_tokens: 1.05)
    model = sparse_inference(make_sparse())
    assert replaced(model) == {}
    assert "left dense: CSR has 1.05 times the speed of dense with 1 tokens a call" in caplog.text
    assert len(replaced(sparse_inference(model, min_speedup=1.0))) == 14


def test_layers_are_measured_by_shape_and_sparsity(make_sparse: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_sparse()
    model.model.layers[0].self_attn.o_proj.weight.data[:, 2:] = 0

    def speedup(dense: Sequence[Tensor], sparse: Sequence[Tensor], num_tokens: int) -> float:
        assert len({weight.shape for weight in dense}) == 1
        assert all(torch.equal(first, second.to_dense()) for first, second in zip(dense, sparse))
        return 2.0 if float((dense[0] == 0).float().mean()) > 0.9 else 0.5

    monkeypatch.setattr(MODULE, "_speedup", speedup)
    assert set(replaced(sparse_inference(model))) == {"model.layers.0.self_attn.o_proj"}


def test_measured_where_the_outcome_is_clear(caplog: Any) -> None:
    """On any machine a product with 1 % of the weights is faster, if they are many."""
    model = nn.Sequential(nn.Linear(1024, 2048, bias=False)).eval()
    model[0].weight.data *= torch.rand(2048, 1024) > 0.99
    with caplog.at_level(logging.INFO):
        sparse_inference(model)
    assert 1 in model[0].tokens
    assert "1 Linears of 2048x1024 (0, ...) with a sparsity of about 0.99 are sparse now" in caplog.text


def test_saves_as_before(make_sparse: Callable, clock: Callable, tmp_path: Path) -> None:
    clock(lambda num_tokens: 2.0)
    model = make_sparse()
    before = copy.deepcopy(model.state_dict())
    sparse_inference(model)
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path / "dense")
    save_packed(model, tmp_path / "packed")
    for folder in ("dense", "packed"):
        state = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.model.layers[0].mlp.up_proj.weight.mul_(2),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model: model.to(torch.bfloat16),
    ],
)
def test_a_changed_model_is_refused(change: Callable, make_sparse: Callable, clock: Callable) -> None:
    clock(lambda num_tokens: 2.0)
    model = sparse_inference(make_sparse())
    with torch.no_grad():
        change(model)
    with pytest.raises(ValueError, match="trained, changed or cast"):
        logits(model, 1, 1)


def test_calling_again_follows_a_change(make_sparse: Callable, clock: Callable) -> None:
    clock(lambda num_tokens: 2.0)
    model = sparse_inference(make_sparse())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    sparse_inference(model)
    (layer,) = (module for name, module in replaced(model).items() if name == "model.layers.0.mlp.up_proj")
    rows = torch.randn(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(rows), nn.functional.linear(rows, layer.weight))
    expected = logits(model, 1, 1)
    clock(lambda num_tokens: 0.5)
    assert replaced(sparse_inference(model)) == {}
    torch.testing.assert_close(logits(model, 1, 1), expected, atol=1e-4, rtol=1e-4)


def test_what_is_refused(make_sparse: Callable) -> None:
    with pytest.raises(ValueError, match="in training mode"):
        sparse_inference(make_sparse().train())
    with pytest.raises(
        ValueError, match=r"q_proj.weight is torch.bfloat16, .* Load the model with dtype=torch.float32"
    ):
        sparse_inference(make_sparse().to(torch.bfloat16))
    with pytest.raises(ValueError, match="on \\['meta'\\]"):
        sparse_inference(make_sparse().to("meta"))


class Cuda(nn.Module):
    """A model that says it is on a GPU: what is handed to torch there can be tested without one."""

    def __init__(self, linear: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.linear, self.dense = linear, nn.Linear(8, 8).to(linear.weight.dtype)
        self.handed: list[Tensor] = []
        monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", self.convert)
        self.eval()

    def convert(self, weight: Tensor) -> Tensor:
        self.handed.append(weight)
        return weight * 1

    def parameters(self, recurse: bool = True) -> Any:
        return iter([type("", (), {"device": torch.device("cuda")})])


def two_of_four(dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(8, 8).to(dtype)
    linear.weight.data *= torch.tensor([1, 0, 0, 1] * 2)
    return linear


def test_on_a_gpu_2_of_4_goes_to_semi_structured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Cuda(two_of_four(torch.bfloat16), monkeypatch)
    weight, dense = model.linear.weight, model.dense.weight
    assert sparse_inference(model) is model
    assert [handed.data_ptr() for handed in model.handed] == [weight.data_ptr()]
    assert model.linear.weight is not weight
    assert model.dense.weight is dense


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (nn.Linear(8, 8), "No nn.Linear of the model has a 2:4 pattern"),
        (two_of_four(torch.float32), "torch.float32; 2:4"),
    ],
)
def test_on_a_gpu_the_rest_is_refused(linear: nn.Linear, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_inference(Cuda(linear, monkeypatch))
