"""`divergence`: values and gradients against full logits, in bounded memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mama_hf.divergence import divergence
from mama_hf.heads import OutputHead


DIRECTIONS = ["forward", "reverse", "jsd"]


def naive(student: Tensor, teacher: Tensor, direction: str, temperature: float) -> Tensor:
    """The divergence [N] of full logits [N, V], written down token by token."""
    values = []
    for ours, theirs in zip(student, teacher):
        q, p = (ours / temperature).softmax(-1), (theirs / temperature).softmax(-1)
        m = (p + q) / 2
        if direction == "forward":
            values.append((p * (p / q).log()).sum())
        elif direction == "reverse":
            values.append((q * (q / p).log()).sum())
        else:
            values.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
    return torch.stack(values)


def make(num_tokens: int = 37, vocabulary: int = 50, hidden: int = 12, teacher_hidden: int = 20, **head: Any) -> tuple:
    torch.manual_seed(0)
    ours = torch.randn(num_tokens, hidden, requires_grad=True)
    theirs = torch.randn(num_tokens, teacher_hidden)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True)
    student = OutputHead(weight, bias, **head)
    teacher = OutputHead(torch.randn(vocabulary, teacher_hidden) / 2, None, softcap=5.0)
    return ours, student, theirs, teacher, torch.rand(num_tokens) + 0.1


def logits(hidden: Tensor, head: OutputHead) -> Tensor:
    values = (
        hidden @ head.weight.T * head.scale if head.bias is None else (hidden @ head.weight.T + head.bias) * head.scale
    )
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head", [{}, {"scale": 0.25}, {"scale": 2.0, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 16, 512])
def test_equals_full_logits(direction: Any, temperature: float, head: dict[str, float], chunk_size: int) -> None:
    ours, student, theirs, teacher, weights = make(**head)
    inputs = (ours, student.weight, student.bias)
    values = naive(logits(ours, student), logits(theirs, teacher), direction, temperature)
    expected = torch.autograd.grad((values * weights).sum() * 3, inputs)
    loss, total, agreeing = divergence(
        ours, student, theirs, teacher, weights, direction, temperature, chunk_size=chunk_size
    )
    torch.testing.assert_close(loss, (values * weights).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, values.sum(), rtol=1e-5, atol=1e-5)
    same = logits(ours, student).argmax(-1) == logits(theirs, teacher).argmax(-1)
    assert agreeing == same.sum()
    torch.testing.assert_close(torch.autograd.grad(loss * 3, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_divergence_from_itself(direction: Any) -> None:
    ours, student, _, _, weights = make()
    loss, _, agreeing = divergence(ours, student, ours.detach(), student, weights, direction)
    assert abs(loss.item()) < 1e-5
    assert agreeing == len(ours)


def test_without_tokens_it_is_zero() -> None:
    ours, student, theirs, teacher, weights = make(num_tokens=0)
    loss, total, agreeing = divergence(ours, student, theirs, teacher, weights)
    loss.backward()
    assert loss == total == agreeing == 0
    assert not student.weight.grad.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bf16_is_close_to_fp32(direction: Any) -> None:
    ours, student, theirs, teacher, weights = make(scale=0.5)
    expected = torch.autograd.grad(
        divergence(ours, student, theirs, teacher, weights, direction)[0], (ours, student.weight)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence(ours, student, theirs, teacher, weights, direction)[0]
    got = torch.autograd.grad(loss, (ours, student.weight))
    for value, reference in zip(got, expected):
        assert value.dtype == torch.float32
        assert 0 < (value - reference).norm() / reference.norm() < 0.02


def test_fp16_gradients_of_tiny_weights_survive() -> None:
    """The loss scale comes after the gradient is computed, and fp16 ends at 6e-8."""
    ours, student, theirs, teacher, weights = make()
    half = ours.detach().half().requires_grad_()
    loss = divergence(half, student.to(torch.float16), theirs.half(), teacher.to(torch.float16), weights * 1e-7)[0]
    expected = torch.autograd.grad(divergence(ours, student, theirs, teacher, weights)[0], ours)[0]
    (got,) = torch.autograd.grad(loss * 1e7, half)
    assert (got.float() - expected).norm() / expected.norm() < 0.01


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in torch.utils._pytree.tree_leaves(args) if _is(each)}
        result = function(*args, **(kwargs or {}))
        for tensor in filter(_is, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self.storages:
                self.storages[storage.data_ptr()] += 1
            elif storage.data_ptr() in given:
                continue
            else:
                self.storages[storage.data_ptr()] = 1
                self.live += storage.nbytes()
            weakref.finalize(tensor, self._free, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, pointer: int, size: int) -> None:
        self.storages[pointer] -= 1
        if self.storages[pointer] == 0:
            del self.storages[pointer]
            self.live -= size


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}], ids=str)
def test_peak_memory_is_below_two_chunks_of_logits(direction: Any, head: dict[str, float]) -> None:
    num_tokens, vocabulary, hidden, chunk_size = 1024, 2048, 8, 128
    ours, student, theirs, teacher, weights = make(num_tokens, vocabulary, hidden, 8, **head)
    chunk = chunk_size * vocabulary * 4
    gradients = 4 * (num_tokens * hidden + vocabulary * (hidden + 1))
    with PeakMemory() as memory:
        divergence(ours, student, theirs, teacher, weights, direction, chunk_size=chunk_size)
    assert chunk < memory.peak - gradients < 2 * chunk
    with PeakMemory() as memory:
        naive(logits(ours, student), logits(theirs, teacher), direction, 1.0)
    assert memory.peak > 2 * num_tokens * vocabulary * 4  # what it is measured with would see it
