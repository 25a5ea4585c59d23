"""Computes loss terms as sums and counts, so that the engine can take token means over the global batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LossTerm:
    """One loss of this rank's micro-batch.

    Attributes:
        total: differentiable float32 sum over the tokens counted.
        count: how many tokens that were.
    """

    total: Tensor
    count: Tensor


def text_loss(logits_BRV: Tensor, targets_BR: Tensor, mask_BR: Tensor) -> LossTerm:
    """Summed cross-entropy on the response positions (L_S2T), padded or packed."""
    losses = F.cross_entropy(logits_BRV.flatten(0, 1), targets_BR.flatten(), reduction="none")
    return LossTerm((losses * mask_BR.flatten()).sum(), mask_BR.sum())


def ctc_loss(logits_BTC: Tensor, frames_B: Tensor, classes_BS: Tensor, lengths_B: Tensor, weight_B: Tensor) -> LossTerm:
    """Summed CTC loss (blank is class 0), counted in target tokens.

    A target too long for its frames adds zero, and so does a row without target: it is not known what it says, and CTC
    would learn that it says nothing.
    """
    log_probs = logits_BTC.float().log_softmax(-1).transpose(0, 1)
    losses = F.ctc_loss(log_probs, classes_BS, frames_B, lengths_B, blank=0, reduction="none", zero_infinity=True)
    return LossTerm((losses * weight_B * (lengths_B > 0)).sum(), (lengths_B * weight_B).sum())


def denoising_loss(adapted_BRh: Tensor, target_BRh: Tensor, mask_BR: Tensor) -> LossTerm:
    """Sum over positions of 1 - cos(Adapter(H), Emb(X')) (Eq. 2); no gradient reaches the embeddings."""
    cosine = F.cosine_similarity(adapted_BRh.float(), target_BRh.detach().float(), dim=-1)
    return LossTerm(((1 - cosine) * mask_BR).sum(), mask_BR.sum())
