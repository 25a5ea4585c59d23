"""Makes the first norm of a HuBERT normalise each clip of a padded batch by its own frames alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskedGroupNorm(nn.Module):
    """A group norm with one channel a group, over the real frames of each clip.

    The convolutions after it and the masked attention look at no padding for a clip's own frames; this norm averages
    over time, so that with padding in its statistics a clip's features would depend on what it is batched with.

    Args:
        norm: the norm whose weights are taken over; as many groups as channels.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        assert norm.num_groups == norm.num_channels
        self.norm = norm
        self.lengths_B: Tensor | None = None
        """Real frames of each clip; set before each call."""

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Normalise; what lies beyond a clip's length is of no use afterwards."""
        assert self.lengths_B is not None
        mask_B1T = (torch.arange(x_BCT.shape[2], device=x_BCT.device) < self.lengths_B[:, None])[:, None]
        count_B11 = self.lengths_B[:, None, None]
        mean_BC1 = (x_BCT * mask_B1T).sum(2, keepdim=True) / count_B11
        centred_BCT = (x_BCT - mean_BC1) * mask_B1T
        variance_BC1 = centred_BCT.square().sum(2, keepdim=True) / count_B11
        scaled_BCT = centred_BCT * torch.rsqrt(variance_BC1 + self.norm.eps)
        return scaled_BCT * self.norm.weight[:, None] + self.norm.bias[:, None]
