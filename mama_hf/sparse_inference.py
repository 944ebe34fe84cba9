"""Decoding with the zeros left out: sparse kernels in place of dense ones, where they are faster.

On a CPU: `torch.sparse_csr` with 32-bit indices, in float32. A kept weight is 8 bytes to read there and a dense one 4,
so single tokens gain from a sparsity of about 0.7 on, and a prompt hardly ever does: it keeps to the dense weights. On
an NVIDIA GPU: 2:4 patterns in half precision, by torch's own semi-structured kernels.

Shapes: O = out, I = in, T = tokens in one call.
"""

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


logger = logging.getLogger(__name__)

# Not tried below: for single tokens CSR has to read more bytes than the dense form until half of the weights are zero.
_MIN_SPARSITY, _MIN_SPARSITY_BATCHED = 0.6, 0.4
_MAX_TOKENS = 256  # where the search for the longest call that CSR is faster for ends
_NUM_RUNS = 5
_CACHE = 2**28  # bytes of weights to go through in a measurement: more than the caches hold, as in a whole model


class SparseLinear(nn.Linear):
    """
    A Linear that has its weight a second time, as CSR, and takes the faster one by the number of tokens in the call.
    The only change with respect to `nn.Linear` is `forward`; parameters and state dict are the same.

    Args:
        linear (`nn.Linear`): its parameters are shared.
        tokens (`range`): numbers of tokens for which CSR is used.
    """

    def __init__(self, linear: nn.Linear, csr: Tensor, tokens: range) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.csr, self.tokens, self._version = csr, tokens, _version(linear.weight)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """
        Args:
            input (`torch.Tensor` of shape [..., I]): float32 on the CPU.
        """
        if self.training or _version(self.weight) != self._version or self.weight.dtype != self.csr.dtype:
            raise ValueError(
                "A layer of sparse_inference was trained, changed or cast, which its sparse copy does not follow. "
                "Call model.eval() and sparse_inference(model) again; to train, load the model anew."
            )
        if torch.is_grad_enabled() or input.numel() // self.in_features not in self.tokens:
            return nn.functional.linear(input, self.weight, self.bias)
        output = _multiply(self.csr, input.reshape(-1, self.in_features))
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], self.out_features)


@torch.no_grad()
def sparse_inference(model: Any, batch_size: int = 1, min_speedup: float = 1.1) -> Any:
    """
    Make decoding faster by leaving zeros out, in place, where that is measured to be faster on this machine.

    On a CPU, each `nn.Linear` with zeros enough is timed, dense against CSR, with the threads that torch has now.
    Where CSR wins it is used in calls of about that many tokens, under `torch.no_grad()` (`generate` sets it), and the
    dense weights in the others, such as prompts. Both stay in memory: 8 bytes more for each kept weight, 1.4 times the
    weight at a sparsity of 0.8. What is not faster is left alone, with a warning that has the numbers. Outputs differ
    from dense ones by rounding. The model saves as before; training it is refused. After a change, call it again.

    On an NVIDIA GPU, weights in 2:4 patterns are replaced by torch's semi-structured ones. Save the model before.

    Args:
        model (`nn.Module`): in evaluation mode; float32 on a CPU, float16 or bfloat16 on a GPU.
        batch_size (`int`, *optional*, defaults to 1): sequences decoded at once, the number of tokens in a call.
        min_speedup (`float`, *optional*, defaults to 1.1): dense time / sparse time from which a layer is replaced.

    Returns:
        The same model.

    Raises:
        `ValueError`: in training mode, on other devices, for a dtype without kernels; on a GPU, without 2:4 patterns.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if model.training or len(devices) != 1 or not devices <= {"cpu", "cuda"}:
        raise ValueError(
            f"sparse_inference got a model {'in training mode ' if model.training else ''}on {sorted(devices)}: it "
            "takes one in evaluation mode (model.eval()) on the CPU or on an NVIDIA GPU."
        )
    if devices == {"cuda"}:
        return _use_semi_structured(model)
    _make_dense(model)
    min_sparsity = _MIN_SPARSITY if batch_size == 1 else _MIN_SPARSITY_BATCHED
    groups = _groups(model, min_sparsity)
    if not groups:
        logger.warning(
            "sparse_inference leaves the model as it is: no nn.Linear has a sparsity of %.1f or more, below which CSR "
            "is slower on a CPU with batch_size=%d. A 2:4 pattern is faster on an NVIDIA GPU.",
            *(min_sparsity, batch_size),
        )
    for layers in groups.values():
        speedup = _replace(model, layers, batch_size, min_speedup)
        name, layer = next(iter(layers.items()))
        logger.log(
            logging.INFO if speedup >= min_speedup else logging.WARNING,
            "%d Linears of %dx%d (%s, ...) with a sparsity of about %.2f are %s: CSR has %.2f times the speed of "
            "dense with %d tokens a call and %d threads.",
            *(len(layers), *layer.weight.shape, name, _sparsity(layer.weight)),
            "sparse now" if speedup >= min_speedup else "left dense",
            *(speedup, batch_size, torch.get_num_threads()),
        )
    return model


def _make_dense(model: nn.Module) -> None:
    """Undo an earlier call."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            model.set_submodule(name, linear.eval())


def _groups(model: nn.Module, min_sparsity: float) -> dict[tuple[torch.Size, int], dict[str, nn.Linear]]:
    """(shape, sparsity in twentieths) -> the Linears by name: alike enough to be measured together."""
    groups: dict[tuple[torch.Size, int], dict[str, nn.Linear]] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and (sparsity := _sparsity(module.weight)) >= min_sparsity:
            if module.weight.dtype != torch.float32:
                raise ValueError(
                    f"{name}.weight is {module.weight.dtype}, for which CSR has no kernel on a CPU. Load the model "
                    "with dtype=torch.float32."
                )
            groups.setdefault((module.weight.shape, round(20 * sparsity)), {})[name] = module
    return groups


def _replace(model: nn.Module, layers: dict[str, nn.Linear], batch_size: int, min_speedup: float) -> float:
    """Measure some of the layers and replace all of them if CSR is faster. Returns dense time / sparse time."""
    sample = [layer.weight for layer in layers.values()]
    sample = sample[: max(1, _CACHE // (4 * sample[0].numel()))]
    copies = [_to_csr(weight) for weight in sample]

    def speedup(num_tokens: int) -> float:
        return _speedup(sample, copies, num_tokens)

    reached = speedup(batch_size)
    if reached >= min_speedup:
        tokens = _tokens(speedup, batch_size)
        for index, (name, layer) in enumerate(layers.items()):
            csr = copies[index] if index < len(copies) else _to_csr(layer.weight)
            model.set_submodule(name, SparseLinear(layer, csr, tokens))
    return reached


def _tokens(speedup: Callable[[int], float], batch_size: int) -> range:
    """The calls around `batch_size` tokens for which CSR is not slower, found by doubling and halving."""
    low = high = batch_size
    while high < _MAX_TOKENS and speedup(2 * high) >= 1:
        high *= 2
    while low > 1 and speedup(low // 2) >= 1:
        low //= 2
    return range(low, high + 1)


def _speedup(dense: list[Tensor], sparse: list[Tensor], num_tokens: int) -> float:
    """Time of the dense products over that of the sparse ones, the fastest of some runs of each in turn."""
    rows = torch.randn(num_tokens, dense[0].shape[1])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_NUM_RUNS):
        for is_sparse, weights in ((False, dense), (True, sparse)):
            start = time.perf_counter()
            for weight in weights:
                _multiply(weight, rows) if is_sparse else nn.functional.linear(rows, weight)
            seconds[is_sparse].append(time.perf_counter() - start)
    return min(seconds[False]) / min(seconds[True])


def _multiply(csr: Tensor, rows: Tensor) -> Tensor:
    """x W^T for x [T, I] and W in CSR [O, I], contiguous [T, O]: by the form that is fastest for that T."""
    return torch.mv(csr, rows[0]).unsqueeze(0) if len(rows) == 1 else (csr @ rows.T).T.contiguous()


def _to_csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        csr = weight.detach().to_sparse_csr()
        rows, columns = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, csr.values(), size=csr.shape, check_invariants=True)


def _sparsity(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def _version(weight: Tensor) -> int:
    """How often a weight was changed in place; torch does not count it for those made in inference mode."""
    return 0 if weight.is_inference() else weight._version


def _use_semi_structured(model: nn.Module) -> nn.Module:
    """Replace the 2:4 weights of all Linears, after the last of them is converted."""
    found = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and _is_2_of_4(module.weight):
            if module.weight.dtype not in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{name}.weight is {module.weight.dtype}; 2:4 kernels are for float16 and bfloat16. Load the "
                    "model with dtype=torch.bfloat16."
                )
            found[module] = torch.sparse.to_sparse_semi_structured(module.weight.detach())
    if not found:
        raise ValueError(
            "No nn.Linear of the model has a 2:4 pattern, and other zeros have no kernel on a GPU that is faster than "
            'the dense one. Prune with granularity="2:4", or decode on the CPU.'
        )
    for module, weight in found.items():
        module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _is_2_of_4(weight: Tensor) -> bool:
    if weight.shape[1] % 4 or _sparsity(weight) < 0.5:
        return False
    return int((weight.reshape(-1, 4) != 0).sum(dim=1).max()) <= 2
