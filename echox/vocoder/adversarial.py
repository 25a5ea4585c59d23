"""Lets generator and discriminators take turns: the arithmetic of one step, on any number of ranks.

Each network has an optimizer of its own, for which DeepSpeed's engine has no place. They are small, and whole on every
rank: a step adds up the gradients of all ranks, in one all-reduce for each network. A rank trains its share of the
micro-batches of a step, whose losses are parts of means over the global batch, so the gradient does not depend on the
number of ranks. Dropout is drawn from seed, step and micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from echox.engine import rng_state
from echox.stream.sampling.keyed_rng import key64
from echox.vocoder.discriminators import Discriminators, halves
from echox.vocoder.generator import Generator, Spoken
from echox.vocoder.losses import (
    LogMel,
    adversarial_loss,
    discriminator_loss,
    duration_loss,
    feature_loss,
    mel_loss,
)
from echox.vocoder.state import PARTS, trained

if TYPE_CHECKING:
    from echox.engine.world import World
    from echox.vocoder.data import VoiceBatch
    from echox.vocoder.recipe import VoiceRecipe
    from echox.vocoder.shape import HifiGanShape

LOSSES = ("discriminators", "adversarial", "features", "mel", "duration")
"""Of the discriminators, and the weighted ones of the generator."""


class Adversaries:
    """Both networks and their optimizers, with new weights that are the same on all ranks.

    Args:
        recipe: of the run.
        shape: of the generator.
        world: its processes.
    """

    def __init__(self, recipe: VoiceRecipe, shape: HifiGanShape, world: World) -> None:
        rng_state.seed_all(recipe.seed)
        self.generator = Generator(shape).to(world.device)
        self.discriminators = Discriminators(recipe.discriminators.channels).to(world.device)
        self.log_mel = LogMel(shape.sample_rate).to(world.device)
        self._recipe, self._world = recipe, world
        plan = recipe.optim
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {
            part: torch.optim.AdamW(
                [value for _, value in trained(module)], lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay
            )
            for part, module in self.modules.items()
        }

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Both networks by their names."""
        return dict(zip(PARTS, (self.generator, self.discriminators), strict=True))

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return float(self.optimizers["generator"].param_groups[0]["lr"])

    def set_learning_rate(self, rate: float) -> None:
        """Of both optimizers, from now on."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate

    def learn(self, batches: Sequence[VoiceBatch], clips: float, units: float) -> Tensor:
        """One step: discriminators first, then the generator against them; both see the same made waveforms.

        Args:
            batches: this rank's micro-batches.
            clips, units: in those of all ranks.

        Returns:
            The losses of this rank's clips as in `LOSSES`, each its part of the mean over the global batch.
        """
        losses_L = torch.zeros(len(LOSSES), dtype=torch.float64, device=self._world.device)
        # Of more micro-batches than one, the graphs would add up: their waveforms are made twice.
        kept = [self._made(batch, 0) for batch in batches] if len(batches) == 1 else None
        self.optimizers["discriminators"].zero_grad(set_to_none=True)
        for place, batch in enumerate(batches):
            self.discriminators.train(place == 0)  # Spectral norm moves once a step, however many forwards a rank has.
            with torch.no_grad():
                made_BN = kept[place].wave_BN if kept else self.generator.speak(batch.frames_BT, batch.speakers_B)
            real, made = halves(self.discriminators(torch.cat([batch.wave_BN, made_BN.detach()])), len(made_BN))
            loss = (discriminator_loss(real, made) * batch.weight_B).sum() / clips
            loss.backward()
            losses_L[0] += loss.detach()
        self._update("discriminators")
        self.discriminators.requires_grad_(False).eval()
        self.optimizers["generator"].zero_grad(set_to_none=True)
        for place, batch in enumerate(batches):
            spoken = kept[place] if kept else self._made(batch, place)
            parts = torch.stack(self._generator_losses(batch, spoken, clips, units))
            parts.sum().backward()
            losses_L[1:] += parts.detach()
        self._update("generator")
        self.discriminators.requires_grad_(True)
        return losses_L

    def _made(self, batch: VoiceBatch, place: int) -> Spoken:
        """The generator's forward of one micro-batch; its dropout is the same on whichever rank it lies."""
        slot = self._world.rank + place * self._world.size
        torch.manual_seed(key64(self._recipe.seed, "dropout", batch.step, slot) >> 1)
        spoken: Spoken = self.generator(batch.frames_BT, batch.speakers_B, batch.units_BU, batch.mask_BU)
        return spoken

    def _generator_losses(self, batch: VoiceBatch, spoken: Spoken, clips: float, units: float) -> list[Tensor]:
        weights = self._recipe.loss
        with torch.no_grad():
            real, real_BMT = self.discriminators(batch.wave_BN), self.log_mel(batch.wave_BN)
        made = self.discriminators(spoken.wave_BN)
        per_clip = (
            adversarial_loss(made),
            weights.features * feature_loss(real, made),
            weights.mel * mel_loss(real_BMT, self.log_mel(spoken.wave_BN)),
        )
        duration_B = weights.duration * duration_loss(spoken.logs_BU, batch.durations_BU, batch.mask_BU)
        return [*((loss_B * batch.weight_B).sum() / clips for loss_B in per_clip), duration_B.sum() / units]

    def _update(self, part: str) -> None:
        """Add the gradients up over the ranks, and let the optimizer step."""
        if self._world.size > 1:
            _add_up([value for _, value in trained(self.modules[part])], self._world)
        self.optimizers[part].step()


def _add_up(values: Sequence[nn.Parameter], world: World) -> None:
    """Add the gradients of the ranks up, as one vector; a tensor without one counts as zero."""
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in values]
    whole = world.all_reduce(torch.cat([grad.flatten() for grad in grads]))
    for value, part in zip(values, whole.split([value.numel() for value in values]), strict=True):
        value.grad = part.view_as(value)
