"""Computes the loss of stage II, text to codec: CE on unit-language words and the end token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from echox.models.flops import Costs, flops_by_part, t2c_costs
from echox.models.ragged import padding_share
from echox.models.sizes import t2c_size
from echox.models.t2c import T2CDecoder, TextPart, text_part
from echox.models.t2c_text import T2CText
from echox.models.work import Work, counts_of
from echox.stages.losses import LossTerm
from echox.stream.batch import UnitBatch


class T2CStage(nn.Module):
    """Trains the T2C decoder on the LLM's frozen text table.

    Args:
        t2c: the decoder.
        text_table: the LLM's input embeddings, frozen.
        prefix_P, header_Q: template tokens before the text and between text and units.
        t2c_text: how the decoder is given its text; None gives it the embeddings as they are.
    """

    prefix_P: Tensor
    header_Q: Tensor

    def __init__(
        self,
        t2c: T2CDecoder,
        text_table: nn.Embedding,
        prefix_P: Tensor,
        header_Q: Tensor,
        t2c_text: T2CText | None = None,
    ) -> None:
        super().__init__()
        self.t2c = t2c
        self.t2c_text = t2c_text or T2CText()
        self.text_table = text_table
        self.register_buffer("prefix_P", prefix_P, persistent=False)
        self.register_buffer("header_Q", header_Q, persistent=False)
        self.work = Work()
        self._last: dict[str, Tensor] = {}

    def text(self, text_BT: Tensor, mask_BT: Tensor) -> TextPart:
        """Text part of the sequence."""
        # One look-up for all three: under ZeRO-3 each call of the table gathers it.
        ids = torch.cat([self.prefix_P, self.header_Q, text_BT.flatten()])
        sizes = [len(self.prefix_P), len(self.header_Q), text_BT.numel()]
        prefix, header, words = self.t2c_text.embed(ids, self.text_table).split(sizes)
        characters_BT = self.t2c_text.characters(text_BT)
        return text_part(prefix, words.view(*text_BT.shape, -1), mask_BT, header, characters_BT)

    def forward(self, batch: UnitBatch) -> dict[str, LossTerm]:
        """Named losses of one micro-batch: `t2c`."""
        text = self.text(batch.text_BT, batch.text_mask_BT)
        loss = self.t2c.loss(text, batch.words_BM, batch.words_mask_BM, batch.weight_B)
        self.work = Work()
        self.work.add("t2c", "t2c_live", lengths_N=loss.rows.lengths_N, kind="causal")
        self.work.add("t2c_head", "t2c_head_live", lengths_N=batch.words_mask_BM, kind="mask")
        self._last = {"perf/padding_share": padding_share(loss.rows)}
        return {"t2c": LossTerm(loss.total, loss.tokens)}

    def loss_weights(self, means: dict[str, Tensor], step: int) -> dict[str, Tensor | float]:
        """One loss, weight one."""
        return {"t2c": 1.0}

    def known_counts(self, batch: UnitBatch) -> dict[str, int]:
        """Words and one end token for every sample that counts."""
        return {"t2c": int(((batch.words_mask_BM.sum(1) + 1) * batch.weight_B).sum())}

    def parameter_groups(self) -> dict[str, list[str]]:
        """All of the decoder learns at one rate."""
        return {"t2c": [name for name, parameter in self.named_parameters() if parameter.requires_grad]}

    def metrics(self) -> dict[str, Tensor]:
        """Padding of the last forward."""
        return self._last

    def flops(self, works: Sequence[Work]) -> dict[str, float]:
        """FLOP by part of the forwards that noted `works` and of their backward. A host sync."""
        return flops_by_part(self._costs, counts_of(works))

    @cached_property
    def _costs(self) -> Costs:
        return t2c_costs(t2c_size(self.t2c), "t2c", trains=True)
