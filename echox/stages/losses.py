"""Computes loss terms as sums and counts, so that the engine can take token means over the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def ctc_loss(
    normaliser_BT: Tensor,
    chosen_BTS: Tensor,
    classes_BC: Tensor,
    frames_B: Tensor,
    lengths_B: Tensor,
    weight_B: Tensor,
    on_host: tuple[Tensor, Tensor] | None = None,
) -> LossTerm:
    """Summed CTC loss, counted in target tokens, from the few logits of a frame that it reads.

    A row's paths go through the blank and its own labels alone, one of them a frame. So the loss is that of a problem
    with these few classes, whose normaliser over them is then replaced by the one over all classes: whatever else is
    among the few leaves both again. A label that a row repeats is one class: its first place.

    A label without a class, which is class 0 like the blank, is left out of its target: taken for the blank, the same
    path would count several times.

    A target too long for its frames adds zero, and so does a row without target: it is not known what it says, and CTC
    would learn that it says nothing.

    Args:
        normaliser_BT: logarithm of the sum of exponentials over all classes, of each frame.
        chosen_BTS: logits of the blank and of the row's classes, S = C + 1.
        classes_BC: right-padded targets; class 0 is the blank.
        frames_B, lengths_B: real frames, and targets, of each row.
        weight_B: 1 for a row that counts.
        on_host: `frames_B` and `lengths_B` on the CPU, where torch wants them; else it waits for the device. Only where
            every label has a class.
    """
    places_C = torch.arange(classes_BC.shape[1], device=classes_BC.device)
    same_BCC = classes_BC[:, :, None] == classes_BC[:, None]
    first_BC = torch.where(same_BCC, places_C, len(places_C)).amin(-1)
    target_BC, targets_B = first_BC + 1, lengths_B
    if on_host is None:
        said_BC = (places_C < lengths_B[:, None]) & (classes_BC != 0)
        order_BC = said_BC.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        classes_BC, target_BC, targets_B = classes_BC.gather(1, order_BC), target_BC.gather(1, order_BC), said_BC.sum(1)
    target_BC = target_BC.masked_fill(classes_BC == 0, 0)
    log_probs_TBS = chosen_BTS.log_softmax(-1).transpose(0, 1)
    losses_B = _ctc(log_probs_TBS, target_BC, *(on_host or (frames_B, targets_B)))  # host sync, where not known
    real_BT = torch.arange(normaliser_BT.shape[1], device=frames_B.device) < frames_B[:, None]
    others_B = ((normaliser_BT - chosen_BTS.logsumexp(-1)) * real_BT).sum(1)
    repeats_BC = (classes_BC[:, 1:] == classes_BC[:, :-1]) & (places_C[1:] < targets_B[:, None])
    fits_B = (targets_B > 0) & (targets_B + repeats_BC.sum(1) <= frames_B)
    return LossTerm(((losses_B + others_B) * (weight_B * fits_B)).sum(), (lengths_B * weight_B).sum())


def _ctc(log_probs_TBS: Tensor, target_BC: Tensor, frames_B: Tensor, lengths_B: Tensor) -> Tensor:
    device = log_probs_TBS.device
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        # Its gradient on a GPU adds in any order. Of a row's own classes there are few enough for the CPU.
        found = _ctc(log_probs_TBS.cpu(), target_BC.cpu(), frames_B.cpu(), lengths_B.cpu())  # host sync
        return found.to(device)
    return F.ctc_loss(log_probs_TBS, target_BC, frames_B, lengths_B, blank=0, reduction="none", zero_infinity=True)


def denoising_loss(adapted_BRh: Tensor, target_BRh: Tensor, mask_BR: Tensor) -> LossTerm:
    """Sum over positions of 1 - cos(Adapter(H), Emb(X')) (Eq. 2); no gradient reaches the embeddings."""
    cosine = F.cosine_similarity(adapted_BRh.float(), target_BRh.detach().float(), dim=-1)
    return LossTerm(((1 - cosine) * mask_BR).sum(), mask_BR.sum())
