"""Steps the trainable weights by torch's AdamW in one process, as DeepSpeed does, without its sharding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NOTE = "The optimizer is torch's AdamW in one process, with fp32 master weights; no DeepSpeed, no ZeRO-3, no Ray."


class PlainAdamW:
    """AdamW on float32 master weights, the gradient clipped to a norm.

    Args:
        module: its trainable weights are stepped, in the dtype that they have.
        lr, betas, weight_decay, clip: as a recipe has them; the rate is one for all parts.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        # A weight that is float32 already is its own master.
        self.masters = [
            weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for weight in self.weights
        ]
        self._clip = clip
        self._adam = torch.optim.AdamW(
            self.masters, lr=lr, betas=betas, weight_decay=weight_decay, fused=self.weights[0].is_cuda
        )

    def step(self) -> None:
        """Take the gradients of the weights, change the weights, and forget the gradients. No host sync."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, self._clip)
        self._adam.step()
        changed = [(w, m) for w, m in zip(self.weights, self.masters, strict=True) if m is not w]
        if changed:
            with torch.no_grad():
                torch._foreach_copy_([weight for weight, _ in changed], [master for _, master in changed])
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Copies of everything that a resumed run needs of it."""
        return {"masters": [master.detach().clone() for master in self.masters], "adam": self._adam.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        with torch.no_grad():
            for weight, master, value in zip(self.weights, self.masters, state["masters"], strict=True):
                master.copy_(value)
                weight.copy_(value)
        self._adam.load_state_dict(state["adam"])


def total_loss(stage: Any, terms: Mapping[str, Any], step: int = 0) -> Tensor:
    """The weighted sum of the losses' token means, as the engine weighs those of a step of one micro-batch."""
    means = {name: (term.total / term.count.clamp(min=1)).detach() for name, term in terms.items()}
    weights = stage.loss_weights(means, step)
    return torch.stack([weights[name] * term.total / term.count.clamp(min=1) for name, term in terms.items()]).sum()
