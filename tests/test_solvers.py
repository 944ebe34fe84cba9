"""Each solver against a naive loop version, and what must hold for any input: odd shapes, few tokens, dead inputs."""

import itertools

import pytest
import torch
from torch import Tensor

from mama_hf.masks import select
from mama_hf.solvers import (
    DAMPING,
    ONE_SHOT_RIDGE,
    PENALTY,
    RIDGE,
    Inputs,
    Moments,
    System,
    admm,
    better_rows,
    bias_change,
    cholesky,
    least_squares,
    move_mean,
    ridge_for,
    sparsegpt,
)


SHAPES = [(5, 7, 40), (16, 12, 100), (3, 33, 20), (8, 24, 1)]  # O, I, T
KINDS = ["plain", "rank-deficient", "dead", "all-dead"]


def make(shape: tuple[int, int, int], kind: str = "plain", seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and inputs [T, I] with correlated features of different sizes."""
    num_out, num_in, num_tokens = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, num_in, generator=generator)
    x = torch.randn(num_tokens, num_in, generator=generator) @ torch.randn(num_in, num_in, generator=generator)
    x = x * torch.rand(num_in, generator=generator)
    if kind == "rank-deficient":
        x[:, num_in // 2 :] = x[:, : num_in - num_in // 2] * 2
    if kind == "dead":
        x[:, ::3] = 0
    if kind == "all-dead":
        x = x * 0
    return weight, x


def inputs_of(x: Tensor) -> Inputs:
    inputs = Inputs(x.shape[1], x.device)
    for part in x.split(7):
        inputs.add(part)
    inputs.finish()
    return inputs


def chooser(sparsity: float, scope: str, n_of_m: tuple[int, int] | None = None):
    return lambda scores, share: select([scores.clone()], [scores], sparsity * share, scope, n_of_m)[0]


def output_error(weight: Tensor, x: Tensor, target: Tensor) -> float:
    return float(((x @ weight.T - target).double() ** 2).sum())


@pytest.mark.parametrize("num_inputs", [5, 384, 800])
def test_inputs_are_the_sums_over_all_tokens(num_inputs):
    x = torch.randn(20, num_inputs)
    inputs = inputs_of(x)
    torch.testing.assert_close(inputs.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.mean, x.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert inputs.num_tokens == 20
    assert torch.equal(inputs.gram, inputs.gram.T) or num_inputs <= 384


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_inputs_tell_whether_they_were_finite(value, finite):
    inputs = Inputs(4, torch.device("cpu"))
    inputs.add(torch.tensor([[1.0, value, 0.0, 0.0]]))
    inputs.finish()
    assert inputs.is_finite == finite


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_give_the_output_error(shape):
    weight, x = make(shape)
    target = x @ weight.T + torch.randn(x.shape[0], weight.shape[0])
    moments = Moments(x.T @ x, target.T @ x, target.square().sum(dim=0))
    other = torch.randn_like(weight)
    expected = output_error(other, x, target)
    assert float(moments.square_error(other).sum()) == pytest.approx(expected, rel=1e-3)
    assert moments.relative_error(other) == pytest.approx(expected / float(target.square().sum()), rel=1e-3)
    assert Moments.plain(weight, x.T @ x).relative_error(weight) < 1e-5


def naive_least_squares(weight: Tensor, mask: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Row by row: the damped normal equations of the kept inputs, solved in float64."""
    result = torch.zeros_like(weight, dtype=torch.float64)
    squares = x.double().square().sum(dim=0)
    damp = RIDGE * squares + (DAMPING * float(squares.mean()) or 1.0)
    for row in range(weight.shape[0]):
        kept = mask[row].nonzero().squeeze(1)
        system = x[:, kept].double().T @ x[:, kept].double() + damp[kept].diag()
        right = x[:, kept].double().T @ target[:, row].double() + damp[kept] * weight[row, kept].double()
        result[row, kept] = torch.linalg.solve(system, right)
    return result.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_least_squares_equals_the_normal_equations(shape, kind):
    weight, x = make(shape, kind)
    target = x @ weight.T + torch.randn(x.shape[0], weight.shape[0])
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    moments = Moments(x.T @ x, target.T @ x, target.square().sum(dim=0))
    values = least_squares(weight, mask, moments, steps=200)
    torch.testing.assert_close(values, naive_least_squares(weight, mask, x, target), rtol=1e-2, atol=1e-2)
    assert not values[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kind"), list(itertools.product(SHAPES, KINDS)))
def test_moving_never_raises_the_error(shape, kind, dtype):
    for seed in range(3):
        weight, x = make(shape, kind, seed)
        weight = weight.to(dtype).float()
        target = x @ weight.T + 0.3 * torch.randn(x.shape[0], weight.shape[0])
        moments = Moments(x.T @ x, target.T @ x, target.square().sum(dim=0))
        solved, mask = admm(weight, moments, chooser(0.5, "row"), steps=6, polish=4)
        fixed = torch.rand_like(weight) < 0.5
        cases = [(mask, solved), (fixed, least_squares(weight, fixed, moments, 5)), (fixed, move_mean(weight, fixed))]
        for kept, moved in cases:
            rounded = moved.to(dtype).float()
            assert torch.isfinite(rounded).all()
            values, gain = better_rows(weight * kept, rounded, moments)
            scale = 1e-5 * float(target.square().sum())
            before = output_error(weight * kept, x, target)
            assert output_error(values, x, target) <= before + scale
            assert output_error(values, x, target) == pytest.approx(before - float(gain.sum()), abs=3 * scale + 1e-6)
            assert not values[~kept].any()


@pytest.mark.parametrize(("scope", "n_of_m"), [("layer", None), ("row", None), ("layer", (2, 4)), ("layer", (1, 3))])
@pytest.mark.parametrize("steps", [1, 2, 15])
def test_admm_counts_are_exact(scope, n_of_m, steps):
    weight, x = make((9, 24, 50))
    sparsity = 0.55 if n_of_m is None else 1 - n_of_m[0] / n_of_m[1]
    values, mask = admm(weight, Moments.plain(weight, x.T @ x), chooser(sparsity, scope, n_of_m), steps, polish=3)
    assert not values[~mask].any()
    if n_of_m is not None:
        assert (mask.reshape(-1, n_of_m[1]).sum(dim=1) == n_of_m[0]).all()
    elif scope == "row":
        assert ((~mask).sum(dim=1) == round(sparsity * 24)).all()
    else:
        assert int((~mask).sum()) == round(sparsity * mask.numel())


def naive_admm(weight: Tensor, moments: Moments, sparsity: float, steps: int) -> tuple[Tensor, Tensor]:
    """The same algorithm with explicit matrices, in float64, one row at a time; no polish."""
    gram = moments.gram.double()
    damp = RIDGE * gram.diagonal() + DAMPING * float(gram.diagonal().mean())
    scale = (gram.diagonal() + damp).sqrt()
    system = (gram + damp.diag()) / scale[:, None] / scale[None, :]
    right = (moments.cross.double() + damp * weight.double()) / scale
    inverse = torch.linalg.inv(system + PENALTY * torch.eye(len(gram), dtype=torch.float64))
    values, masks = torch.zeros_like(right), torch.ones_like(weight, dtype=torch.bool)
    growing = max(1, round(0.75 * steps))
    for row in range(len(weight)):
        kept, dual = weight[row].double() * scale, torch.zeros(len(gram), dtype=torch.float64)
        for step in range(1, steps + 1):
            solved = inverse @ (right[row] + PENALTY * (kept - dual))
            if step <= growing:
                share = 1 - (1 - step / growing) ** 3
                number = round(sparsity * share * len(gram))
                masks[row] = True
                masks[row, (solved + dual).abs().argsort()[:number]] = False
            kept = torch.where(masks[row], solved + dual, 0.0)
            dual = dual + solved - kept
        values[row] = kept / scale
    return values.float(), masks


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_admm_equals_the_naive_version(shape):
    weight, x = make(shape)
    moments = Moments.plain(weight, x.T @ x)
    values, mask = admm(weight, moments, chooser(0.5, "row"), steps=10, polish=0)
    expected, expected_mask = naive_admm(weight, moments, 0.5, 10)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-3)


def test_admm_beats_a_mask_with_least_squares_and_sparsegpt():
    weight, x = make((32, 48, 300))
    moments = Moments.plain(weight, x.T @ x)
    wanda = select([weight.abs() * x.norm(dim=0)], [weight], 0.6, "row")[0]
    joint = moments.relative_error(admm(weight, moments, chooser(0.6, "row"))[0])
    assert joint < moments.relative_error(least_squares(weight, wanda, moments))
    assert joint < moments.relative_error(sparsegpt(weight, x.T @ x, 0.6)[0])


def naive_sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, n_of_m: tuple[int, int] | None, size: int
) -> tuple[Tensor, Tensor]:
    """As in the authors' repository, but with the count instead of a threshold."""
    weight, gram = weight.double().clone(), gram.double().clone()
    num_in = len(gram)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(num_in, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, num_in, size):
        stop = min(start + size, num_in)
        errors = torch.zeros(len(weight), stop - start, dtype=torch.float64)
        if n_of_m is None:
            score = (weight[:, start:stop] / inverse.diagonal()[start:stop]) ** 2
            number = round(sparsity * len(weight) * stop) - round(sparsity * len(weight) * start)
            chosen = torch.ones(score.numel(), dtype=torch.bool)
            chosen[score.flatten().argsort()[:number]] = False
            mask[:, start:stop] = chosen.view_as(score)
        for column in range(start, stop):
            if n_of_m is not None and (column - start) % n_of_m[1] == 0:
                part = slice(column, column + n_of_m[1])
                score = (weight[:, part] / inverse.diagonal()[part]) ** 2
                worst = score.argsort(dim=1)[:, : n_of_m[1] - n_of_m[0]]
                for row in range(len(weight)):
                    mask[row, column + worst[row]] = False
            error = torch.where(mask[:, column], 0.0, weight[:, column] / inverse[column, column])
            weight[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return (weight * mask).float(), mask


@pytest.mark.parametrize(("shape", "n_of_m"), [((5, 7, 40), None), ((6, 200, 500), None), ((6, 200, 500), (2, 4))])
def test_sparsegpt_equals_the_naive_version(shape, n_of_m):
    weight, x = make(shape)
    values, mask = sparsegpt(weight, x.T @ x, 0.5, "layer", n_of_m)
    expected, expected_mask = naive_sparsegpt(weight, x.T @ x, 0.5, n_of_m, 128)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scope", "n_of_m"), [("layer", None), ("row", None), ("layer", (2, 4)), ("layer", (3, 5))])
def test_sparsegpt_counts_are_exact(scope, n_of_m, kind):
    weight, x = make((7, 260, 30), kind)
    values, mask = sparsegpt(weight, x.T @ x, 0.37, scope, n_of_m)
    assert torch.isfinite(values).all()
    assert not values[~mask].any()
    if n_of_m is not None:
        assert (mask.reshape(-1, n_of_m[1]).sum(dim=1) == n_of_m[0]).all()
    elif scope == "row":
        assert ((~mask).sum(dim=1) == round(0.37 * 260)).all()
    else:
        assert int((~mask).sum()) == round(0.37 * mask.numel())


def test_mean_moves_the_sum_of_the_pruned_values():
    weight = torch.tensor([[4.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, False, False, True], [False] * 4])
    assert move_mean(weight, mask).tolist() == [[5.0, 0.0, 0.0, 3.0], [0.0] * 4]


def test_bias_takes_the_mean_of_what_is_lost():
    weight, x = make((5, 7, 40))
    mask = torch.rand_like(weight) < 0.5
    lost = (x @ weight.T - x @ (weight * mask).T).mean(dim=0)
    torch.testing.assert_close(bias_change(weight, mask, x.mean(dim=0)), lost, rtol=1e-4, atol=1e-5)


def test_cholesky_doubles_the_damping_until_it_works():
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-3]])  # not positive definite
    factor, damp = cholesky(matrix, 1e-5)
    assert damp > 1e-5
    torch.testing.assert_close(factor @ factor.T, matrix + damp * torch.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        cholesky(torch.full((2, 2), float("nan")))


def test_system_does_not_change_the_gram_matrix():
    _, x = make((5, 7, 40))
    gram = x.T @ x
    before = gram.clone()
    System(gram).inverse()
    assert torch.equal(gram, before)


def test_the_ridge_falls_as_more_is_pruned():
    assert [ridge_for(sparsity) for sparsity in (0.0, 0.3, 0.5)] == [ONE_SHOT_RIDGE] * 3
    assert ridge_for(0.8) == pytest.approx(ONE_SHOT_RIDGE * 0.2 / 0.8)
    assert ridge_for(0.6) > ridge_for(0.7) > ridge_for(0.99) > 0


def test_weights_that_ask_for_the_same_ridge_share_a_system():
    inputs = inputs_of(make(SHAPES[0])[1])
    system = inputs.system(0.5)
    assert inputs.system(0.5) is system
    assert torch.equal(system.damp, System(inputs.gram, ridge=0.5).damp)
    assert not torch.equal(inputs.system(2.0).damp, system.damp)
