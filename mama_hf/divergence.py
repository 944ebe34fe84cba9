"""How far a student's next-token distributions are from a teacher's, without ever holding the logits of all tokens.

Shapes: N = tokens, H = hidden size (of each model its own), V = vocabulary, C = tokens of a chunk.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .config import DirectionName
from .heads import OutputHead


CHUNK_SIZE = 512
# What is elementwise runs on a 16th of a chunk at a time: its half a dozen fp32 intermediates then add up to less than
# the chunk's logits themselves.
NUM_BLOCKS = 16


def divergence(
    hidden: Tensor,
    student: OutputHead,
    teacher_hidden: Tensor,
    teacher: OutputHead,
    token_weights: Tensor,
    direction: DirectionName = "forward",
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The weighted sum over tokens of the divergence between both models' distributions over the whole vocabulary.

    With p the teacher, q the student and m = (p + q) / 2 the directions are KL(p || q), KL(q || p) and
    (KL(p || m) + KL(q || m)) / 2. The extra peak memory stays below twice the logits of one chunk, beside the
    gradients of `hidden` and of the head, which are computed in the forward pass: no logits are computed twice.

    Args:
        hidden (`torch.Tensor` of shape [N, H]): the student's last hidden states.
        student (`OutputHead`): its head.
        teacher_hidden (`torch.Tensor` of shape [N, H of the teacher]): the teacher's, of the same tokens.
        teacher (`OutputHead`): its head; no gradient flows there.
        token_weights (`torch.Tensor` of shape [N]): fp32, positive.
        direction (`str`, *optional*, defaults to `"forward"`): or `"reverse"`, `"jsd"`.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits of both.
        chunk_size (`int`, *optional*, defaults to 512): tokens projected at a time.

    Returns:
        `tuple`: the weighted sum; and without gradient the plain sum and the number of tokens at which both models
        find the same token the likeliest. Scalars, fp32.
    """
    dtype = _compute_dtype(student.weight)
    cast, teacher = student.to(dtype), teacher.to(_compute_dtype(teacher.weight))
    options = (student.scale, student.softcap, direction, temperature, chunk_size)
    return _Divergence.apply(
        hidden.to(dtype),
        cast.weight,
        cast.bias,
        teacher_hidden.to(teacher.weight.dtype),
        teacher,
        token_weights,
        options,
    )


def _compute_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _Divergence(torch.autograd.Function):
    """`divergence`, with the gradients of hidden states [N, H], weight [V, H] and bias [V] built chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher: OutputHead,
        token_weights: Tensor,
        options: tuple[float, float | None, DirectionName, float, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, softcap, direction, temperature, chunk_size = options
        student = OutputHead(weight, bias, scale, softcap)
        # in units of the largest, so that gradients in fp16 do not vanish before the loss scale multiplies them
        unit = token_weights.max() if len(token_weights) else token_weights.new_ones(())
        grads = [
            torch.zeros_like(each) if each is not None and needed else None
            for each, needed in zip((hidden, weight, bias), ctx.needs_input_grad)
        ]
        sums = torch.zeros(3, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk_size):
                rows = slice(start, start + chunk_size)
                block = max(1, chunk_size // NUM_BLOCKS)
                projected = linear(hidden[rows], weight, bias)  # [C, V], becomes the gradient of itself
                parts = (projected, teacher_hidden[rows], token_weights[rows])
                for values, states, weights in zip(*(part.split(block) for part in parts)):
                    sums += _block_(values, states, weights, unit, student, teacher, direction, temperature)
                if grads[0] is not None:
                    torch.mm(projected, weight, out=grads[0][rows])
                if grads[1] is not None:
                    grads[1].addmm_(projected.T, hidden[rows])
                if grads[2] is not None:
                    grads[2] += projected.sum(0)
                del projected, parts, values  # or they would be held while the next chunk is projected
        ctx.grads, ctx.unit = grads, unit
        ctx.mark_non_differentiable(total := sums[1].clone(), agreeing := sums[2].clone())
        return sums[0].clone(), total, agreeing

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        factor = gradients[0] * ctx.unit
        return *(None if each is None else each * factor for each in ctx.grads), None, None, None, None


def _block_(
    projected: Tensor,
    teacher_hidden: Tensor,
    token_weights: Tensor,
    unit: Tensor,
    student: OutputHead,
    teacher: OutputHead,
    direction: DirectionName,
    temperature: float,
) -> Tensor:
    """Turn the student's projected tokens into the gradient there, in units; [weighted sum, sum, agreeing tokens]."""
    theirs = linear(teacher_hidden, teacher.weight, teacher.bias)
    agreeing = (projected.argmax(-1) == theirs.argmax(-1)).sum()
    log_teacher = torch.log_softmax(teacher.finish(theirs) / temperature, dim=-1)
    logits = student.finish(projected)
    values, gradient = _DIRECTIONS[direction](torch.log_softmax(logits / temperature, dim=-1), log_teacher)
    gradient *= (token_weights / (unit * temperature)).unsqueeze(-1)
    gradient *= student.slope(logits)
    projected.copy_(gradient)
    return torch.stack([values @ token_weights, values.sum(), agreeing])


# Each takes the log-probabilities [N, V] of student and teacher, and gives the divergence [N] and its gradient [N, V]
# with respect to the student's logits.


def _forward(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    teacher = log_teacher.exp()
    values = (teacher * (log_teacher - log_student)).sum(-1)
    return values, log_student.exp().sub_(teacher)


def _reverse(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, gap = log_student.exp(), log_student - log_teacher
    values = (student * gap).sum(-1)
    return values, student.mul_(gap.sub_(values.unsqueeze(-1)))


def _jsd(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    log_mean = torch.logaddexp(log_student, log_teacher).sub_(math.log(2))
    student_part, gradient = _reverse(log_student, log_mean)
    teacher_part = (log_teacher.exp() * (log_teacher - log_mean)).sum(-1)
    return (student_part + teacher_part) / 2, gradient.div_(2)


_DIRECTIONS = {"forward": _forward, "reverse": _reverse, "jsd": _jsd}
