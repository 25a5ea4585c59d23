"""Prepares text for a T2C decoder: embeddings brought to one centre and scale, and how many characters a token has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class T2CText(nn.Module):
    """What a T2C decoder is told of its text, the same for the teacher's input, the echo path and its target (Eq. 2).

    An LLM's text embeddings share one large direction: two random rows of SmolLM2-135M have a cosine of about 0.5.
    Centred, and scaled to unit variance in every dimension, what is left tells the tokens apart. Each vector then gets
    a root mean square of 1, and so does the Denoising Adapter's output: Eq. 2 brings their directions together, and
    their lengths must not be left for the Echo decoder to learn.

    Args:
        table_Vh: the LLM's text table, whose mean and deviation are taken; None leaves embeddings as they are.
        characters: characters of each token of the vocabulary, for a decoder that places its text by them.
        own_Vh: a text table in place of the LLM's input table.

    None is saved with a checkpoint: all follow from frozen models, whose identity is.
    """

    mean_h: Tensor | None
    deviation_h: Tensor | None
    characters_V: Tensor | None
    own_Vh: Tensor | None

    def __init__(
        self,
        table_Vh: Tensor | None = None,
        characters: Sequence[int] | None = None,
        own_Vh: Tensor | None = None,
    ) -> None:
        super().__init__()
        mean_h = deviation_h = None
        if table_Vh is not None:
            table_Vh = table_Vh.detach().float()
            mean_h, deviation_h = table_Vh.mean(0), table_Vh.std(0).clamp(min=1e-6)
        self.register_buffer("mean_h", mean_h, persistent=False)
        self.register_buffer("deviation_h", deviation_h, persistent=False)
        counts_V = None if characters is None else torch.tensor(characters, dtype=torch.long)
        self.register_buffer("characters_V", counts_V, persistent=False)
        self.register_buffer("own_Vh", own_Vh, persistent=False)

    def embed(self, tokens: Tensor, llm: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings `[..., h]` of tokens as the decoder gets them; `llm` looks them up in the LLM's input table."""
        embedded: Tensor = self(llm(tokens) if self.own_Vh is None else F.embedding(tokens, self.own_Vh))
        return embedded

    def forward(self, embedded: Tensor) -> Tensor:
        """`[..., h]` text embeddings as the decoder gets them, in their dtype."""
        if self.mean_h is None or self.deviation_h is None:
            return embedded
        return self.scaled(((embedded.float() - self.mean_h) / self.deviation_h).to(embedded.dtype))

    def scaled(self, vectors: Tensor) -> Tensor:
        """`[..., h]` with a root mean square of 1 each, where embeddings get one; otherwise as they are."""
        if self.mean_h is None:
            return vectors
        return F.rms_norm(vectors.float(), vectors.shape[-1:], eps=1e-6).to(vectors.dtype)

    def characters(self, tokens: Tensor) -> Tensor | None:
        """Characters of each token id, in the shape of `tokens`; None where the decoder does not ask for them."""
        return None if self.characters_V is None else self.characters_V[tokens]
