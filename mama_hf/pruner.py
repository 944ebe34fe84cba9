"""The state machine that composes statistics, criteria, masks and values. It knows steps, but no trainer."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import MamaPruningConfig
from .criteria import CRITERIA, score
from .kept import KeptState
from .moving import COLLECT_STEPS, ValueMover
from .pools import make_pools, num_pruned
from .reward_check import RewardCheck
from .schedule import resolve_schedule
from .statistics import DEFAULT_EMA_DECAY, Statistics
from .targets import LoraTarget
from .values import Saved, apply_masks_, check_optimizer, restore_values_, save_values


logger = logging.getLogger(__name__)


class Pruner:
    """
    Prunes one model during one run. A trainer calls, in each optimizer step: `observe` before the optimizer, `hold`
    right after it, and `update` when the step is counted.

    Args:
        model (`nn.Module`): the unwrapped model; its targeted weights are changed in place.
        config (`MamaPruningConfig`): the recipe.
        optimizer (`torch.optim.Optimizer`): the plain one, not accelerate's wrapper.
        max_steps (`int`): optimizer steps of the run.
        alignment (`int`, *optional*, defaults to 1): masks change on multiples of this many steps.
        reward_driven (`bool`, *optional*, defaults to `False`):
            batches may carry no signal and be left out (`has_signal`), so that Adam's state, which decays with each
            of them, can't serve as a statistic.
        seed (`int`, *optional*, defaults to 0): of the "random" criterion.
        check (`RewardCheck`, *optional*): decides which updates are made and which of them stay.

    Raises:
        `ValueError`: for a recipe that does not fit the model, the run or the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MamaPruningConfig,
        optimizer: torch.optim.Optimizer,
        max_steps: int,
        alignment: int = 1,
        reward_driven: bool = False,
        seed: int = 0,
        check: RewardCheck | None = None,
    ) -> None:
        _check_trainable(config)
        self.config, self.optimizer, self.check = config, optimizer, check
        self.schedule = resolve_schedule(config, max_steps, alignment)
        self.criterion = CRITERIA[config.criterion]
        self.pools = make_pools(model, config, self.criterion.scope)
        self.targets = self.pools.targets
        self.statistics = Statistics(
            self.targets,
            self.criterion.statistics + (("gradient_square",) if self._needs_growth_score() else ()),
            DEFAULT_EMA_DECAY if reward_driven and config.ema_decay is None else config.ema_decay,
            adam=self._adam_serves(),
            seed=seed,
        )
        self.mover = ValueMover([self.targets[index] for index in self.pools.movers], config.move_values)
        self.masks: list[Tensor] | None = None  # of the units that compete
        self._entry_masks: list[Tensor] = []
        self.has_signal, self._is_fresh = True, False
        self.num_pruned = 0
        self.changed = 0.0
        self._before: tuple[list[Tensor] | None, float, Saved] | None = None
        self.kept = KeptState({} if check is None else self._changing_parameters(model))
        self._is_held = self._hold_what_is_sparse()
        self.mover.is_collecting = self._is_update_near(0)

    def _changing_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What trains, and what pruning changes: with LoRA that is frozen."""
        pruned = {id(target.parameter) for target in self.pools.held}
        pruned |= {id(tensor) for tensor in self.mover.changing_tensors()}
        named = model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad or id(parameter) in pruned}

    def _needs_growth_score(self) -> bool:
        return self.config.regrowth > 0 and "gradient_square" not in self.criterion.statistics

    def _adam_serves(self) -> bool:
        """Whether every target's optimizer state can be masked and holds a second moment in fp32."""
        dtypes = {target.parameter.dtype for target in self.targets}
        states = [check_optimizer(self.optimizer, dtype) for dtype in dtypes]
        return all("exp_avg_sq" in state and state["exp_avg_sq"].dtype == torch.float32 for state in states)

    def _hold_what_is_sparse(self) -> bool:
        """A model that is as sparse as asked, or sparser, keeps the zeros it has: they become the masks."""
        masks, asked = self.pools.alive(), self.schedule.final_sparsity
        if not self.pools.meets(masks, asked):
            return False
        self._set_masks(masks)
        if self.pools.exceeds(masks, asked):
            logger.warning(
                "The model is sparser already (%.4f of what is targeted is zero) than the recipe asks for "
                "(final_sparsity=%.4f). Its zeros are kept, and nothing more is pruned.",
                self.sparsity,
                self.schedule.final_sparsity,
            )
        return True

    @property
    def sparsity(self) -> float:
        """Fraction that the masks prune: of the targeted weights' entries, or of the neurons and head groups."""
        return self.num_pruned / self.pools.num_units

    @property
    def has_adapters(self) -> bool:
        """Whether weights are pruned through LoRA, so that they are sparse only when the adapter is merged."""
        return any(isinstance(target, LoraTarget) for target in self.targets)

    def is_final(self, step: int) -> bool:
        """Whether the final sparsity has been reached by `step`, so that the masks won't change any more."""
        return self._is_held or step >= self.schedule.final_step

    @property
    def is_short(self) -> bool:
        """Whether fewer weights are pruned than asked for in the end."""
        return not self._is_held and self.num_pruned < self.pools.num_asked(self.schedule.final_sparsity)

    def stopped_by(self, step: int) -> str:
        """Why the sparsity is what it is after `step`, in words."""
        if not self.is_final(step):
            return f"training, at step {step} of the {self.schedule.final_step} that pruning takes"
        if not self.is_short:
            return "the final sparsity" if self.config.final_sparsity != "auto" else "the ceiling of 'auto'"
        return "the reward check"

    def target_sparsity(self, step: int) -> float:
        """What the schedule asks for after `step`."""
        return self.sparsity if self._is_held else self.schedule.sparsity(step)

    def attach(self, model: nn.Module) -> None:
        """Register the forward hooks that statistics and value moving need."""
        self.statistics.attach(model)
        self.mover.attach(model)

    def detach(self) -> None:
        """Remove them."""
        self.statistics.detach()
        self.mover.detach()

    def observe(self) -> None:
        """Gradients are complete and the optimizer has not run: collect the statistics."""
        if self._is_held:
            return
        self.mover.observe()
        if self.has_signal:
            self.statistics.observe()
        else:
            self.statistics.skip()
        self._is_fresh = False

    def observe_rewards(self, signal: float) -> None:
        """
        A batch of completions was rewarded; the next steps learn from it.

        Args:
            signal (`float`): share of the prompt groups whose rewards differ. 0: the advantages are all zero, and what
                gradient there is (a KL term, weight decay) says nothing of the reward.
        """
        # a step may learn from several generation batches, and a batch may last for several steps
        self.has_signal = signal > 0 or (self.has_signal and self._is_fresh)
        self._is_fresh = True

    def hold(self) -> None:
        """The optimizer has run: pruned weights and their momenta go back to zero."""
        if self.masks is not None:
            apply_masks_(self.pools.held, self._entry_masks, self.optimizer)

    def begin(self) -> None:
        """A run starts, and is not resumed: measure the reward before training, if there is a check."""
        if self.check is not None:
            self.check.begin()
            self._keep(0, self.check.state.last)

    def finish(self, step: int) -> None:
        """
        Training has ended. If the reward has fallen by more than the check tolerates, the last state that held it is
        put back: weights and masks. To be called again if the weights were exchanged since.
        """
        if self.check is None or self.check.judge(step):
            return
        self.kept.restore_()
        self._set_masks_by_name(self.kept.masks)
        self.hold()

    @property
    def is_restored(self) -> bool:
        """Whether `finish` has put the kept state back."""
        return self.check is not None and not self.check.state.is_good_at_end

    def _keep(self, step: int, reward: float | None) -> None:
        assert reward is not None, "it was measured"
        masks = {} if self.masks is None else dict(zip(self.pools.names, self.masks))
        self.kept.keep(masks, step, reward)

    @torch.no_grad()
    def update(self, step: int) -> bool:
        """Change the masks if `step` is one to do so. Returns whether they changed."""
        self.mover.is_collecting = self._is_update_near(step)
        if self._is_held or not self.schedule.is_update(step):
            return False
        target = self.schedule.sparsity(step)
        if self.check is not None:  # neurons and heads are tried one after the other: heads cost far more
            changed = [self._try(kind, target, step, self.check) for kind in self.pools.kinds]
        else:
            changed = [self.pools.num_asked(target) > 0]
            if changed[0]:
                self._change_masks(self._select(target, self.pools.kinds, step))
        self.mover.forget()
        return any(changed)

    def _try(self, kind: str, target: float, step: int, check: RewardCheck) -> bool:
        """Change the masks of one kind of unit as far as the reward check lets it. Returns whether they changed."""
        num_units, reached = self.pools.num_units_of(kind), self._num_pruned_of(kind)
        count = self.pools.num_asked_of(kind, target)
        if count == 0 or (count == reached and self.config.regrowth == 0):  # nothing would change: don't measure
            return False
        sparsity = check.propose(reached / num_units, target, step, kind)
        if sparsity is None:
            return False
        was_measured, reward = check.state.passed_at == step, check.state.last
        self._change_masks(self._select(sparsity, [kind], step))
        step_size = (self._num_pruned_of(kind) - reached) / num_units
        if check.accept(step_size, step, kind, 1 / num_units):
            self._before = None
            self._keep(step, check.state.last)
            return True
        self.rollback()
        if was_measured:  # it may have set the running best
            self._keep(step, reward)
        return False

    def _num_pruned_of(self, kind: str) -> int:
        """Units of a kind that the masks prune."""
        return 0 if self.masks is None else num_pruned([self.masks[place] for place in self.pools.kinds[kind]])

    def _change_masks(self, masks: list[Tensor]) -> None:
        """Put the masks in force. With a reward check, what gets lost is kept until its decision."""
        before = self.masks
        if self.check is not None:
            gone = [~entries for entries in self.pools.expand(masks)]
            if before is not None:
                gone = [old & new for old, new in zip(self._entry_masks, gone)]
            saved = save_values(self.pools.held, gone, self.optimizer) + self.mover.save(self._initial_weights())
            self._before = before, self.changed, saved
        self._set_masks(masks)
        self._move()
        self.hold()
        flipped = (
            self.num_pruned if before is None else sum(int((a ^ b).count_nonzero()) for a, b in zip(before, masks))
        )
        self.changed = flipped / self.pools.num_units

    def rollback(self) -> None:
        """
        Take the newest mask update back, bit for bit: weights, optimizer state and masks. An update does not touch
        the statistics. Only between an update and the decision of the reward check.
        """
        assert self._before is not None, "there is an update to take back"
        masks, self.changed, saved = self._before
        self._before = None
        restore_values_(saved)
        self._set_masks(masks)

    def _is_update_near(self, step: int) -> bool:
        """Whether the inputs of the step after `step` count for the next mask update."""
        return not self._is_held and any(self.schedule.is_update(step + 1 + ahead) for ahead in range(COLLECT_STEPS))

    def _select(self, sparsity: float, kinds: Iterable[str], step: int) -> list[Tensor]:
        swap = self.config.regrowth * (self.schedule.end - step) / max(1, self.schedule.end - self.schedule.start)
        return self.pools.select(
            lambda index: self._score(index, step),
            sparsity,
            self.masks,
            lambda index: self.statistics.read("gradient_square", index, self.optimizer, step),
            max(0.0, swap),
            kinds,
        )

    def _move(self) -> None:
        """Move the values of what the new masks prune."""
        self.mover.move_([self._entry_masks[index] for index in self.pools.movers], self._initial_weights())

    def _initial_weights(self) -> list[Tensor | None] | None:
        """The weights before training of the targets whose values move, where they are a statistic."""
        initial = self.statistics.accumulators.get("initial_weight")
        return None if initial is None else [initial[index] for index in self.pools.movers]

    def _score(self, index: int, step: int) -> Tensor:
        statistics = {
            name: self.statistics.read(name, index, self.optimizer, step) for name in self.criterion.statistics
        }
        return score(self.config.criterion, self.targets[index].weight, statistics)

    def _set_masks(self, masks: list[Tensor] | None) -> None:
        self.masks, self._entry_masks, self.num_pruned = None, [], 0
        if masks is not None:
            self.masks, self._entry_masks = masks, self.pools.expand(masks)
            self.num_pruned = num_pruned(masks)

    def _set_masks_by_name(self, masks: dict[str, Tensor]) -> None:
        """Put masks from host memory in force. Raises `KeyError` if there are some, but not the targets'."""
        if unknown := masks.keys() - set(self.pools.names):
            raise KeyError(min(unknown))
        devices = zip(self.pools.names, self.pools.devices)
        self._set_masks([masks[name].to(device) for name, device in devices] if masks else None)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) from which `load_state_dict` continues bit for bit."""
        tensors = {f"statistics.{key}": value for key, value in self.statistics.state_dict().items()}
        if self.masks is not None:
            tensors |= {f"mask.{name}": mask for name, mask in zip(self.pools.names, self.masks)}
        tensors |= {f"moving.{key}": value for key, value in self.mover.state_dict().items()}
        values: dict[str, Any] = {
            "changed": self.changed,
            "has_signal": self.has_signal,
            "is_held": self._is_held,
            "is_collecting": self.mover.is_collecting,
        }
        if self.check is not None:
            values["reward_check"] = self.check.state_dict()
            kept, values["kept"] = self.kept.state_dict()
            tensors |= {f"kept.{key}": value for key, value in kept.items()}
        return tensors, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """
        Continue from `state_dict`.

        Raises:
            `KeyError`: if a tensor is missing, or there is a mask of a weight that is no target; its name says which.
        """
        self.statistics.load_state_dict(_below("statistics.", tensors))
        self.mover.load_state_dict(_below("moving.", tensors))
        self._set_masks_by_name(_below("mask.", tensors))
        self.changed, self.has_signal = values["changed"], values["has_signal"]
        self._is_held, self.mover.is_collecting = values["is_held"], values["is_collecting"]
        if self.check is not None:
            self.check.load_state_dict(values["reward_check"])
            self.kept.load_state_dict(_below("kept.", tensors), values["kept"])
        self.hold()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _check_trainable(config: MamaPruningConfig) -> None:
    """Refuse, by name, what only `prune_model` can do."""
    one_shot_only = {
        "criterion": (config.criterion == "sparsegpt", '"mama" or another key of CRITERIA'),
        "granularity": (config.granularity == "layer", '"neuron", "head" or "neuron+head"'),
        "allocation": (config.allocation != "uniform", '"uniform", or scope="global" to let layers differ'),
    }
    for name, (asked, instead) in one_shot_only.items():
        if asked:
            raise NotImplementedError(
                f"{name}={getattr(config, name)!r} works only in prune_model, which prunes without training. While "
                f"a trainer trains, set {name}={instead}; or prune with prune_model first, and train with the "
                "masks held."
            )


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
