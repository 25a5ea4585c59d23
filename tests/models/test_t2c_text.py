"""How text is given to the T2C decoders."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from echox.models.t2c_text import T2CText


def test_centred_embeddings_of_a_table_with_one_large_direction_are_told_apart() -> None:
    torch.manual_seed(0)
    table = torch.randn(500, 16) * torch.linspace(0.1, 3, 16) + 5 * torch.randn(16)
    centred = T2CText(table)(table)
    standard = (table - table.mean(0)) / table.std(0)
    torch.testing.assert_close(centred, standard / standard.pow(2).mean(1, keepdim=True).sqrt(), atol=1e-4, rtol=1e-4)
    assert F.cosine_similarity(table[:250], table[250:]).mean() > 0.8
    assert F.cosine_similarity(centred[:250], centred[250:]).mean().abs() < 0.05


def test_the_length_of_what_the_adapter_gives_does_not_matter_where_embeddings_are_centred() -> None:
    torch.manual_seed(0)
    table = torch.randn(500, 16)
    text, vectors = T2CText(table), torch.randn(3, 4, 16)
    torch.testing.assert_close(text.scaled(vectors), text.scaled(0.1 * vectors), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(text.scaled(vectors).pow(2).mean(-1), torch.ones(3, 4), atol=1e-4, rtol=0)
    assert T2CText().scaled(vectors) is vectors and text.scaled(vectors.bfloat16()).dtype == torch.bfloat16


def test_a_dimension_without_variance_stays_finite_and_the_dtype_is_kept() -> None:
    table = torch.randn(50, 4)
    table[:, 2] = 7.0
    centred = T2CText(table)(table.bfloat16())
    assert centred.dtype == torch.bfloat16 and bool(centred.isfinite().all())


def test_without_a_table_embeddings_are_left_alone_and_characters_are_looked_up() -> None:
    embedded, tokens = torch.randn(2, 3, 4), torch.tensor([[0, 2, 1]])
    plain = T2CText()
    assert plain(embedded) is embedded and plain.characters(tokens) is None and not plain.state_dict()
    assert T2CText(None, [5, 1, 9]).characters(tokens).tolist() == [[5, 9, 1]]
