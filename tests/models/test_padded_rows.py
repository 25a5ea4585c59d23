from __future__ import annotations

import pytest
import torch

from echox.models.ragged import gather_rows, join_rows, position_ids


@pytest.mark.parametrize("pad_left", [False, True])
def test_join_rows_equals_concatenating_each_row_by_itself(pad_left: bool) -> None:
    torch.manual_seed(0)
    blocks = [torch.randn(5, size, 3) for size in (2, 4, 3)]
    masks = [torch.rand(5, size) > 0.4 for size in (2, 4, 3)]
    masks[0][:, 0] = True
    joined = join_rows(blocks, masks, pad_left=pad_left)
    for row in range(5):
        expected = torch.cat([block[row][mask[row]] for block, mask in zip(blocks, masks, strict=True)])
        assert torch.equal(joined.values_BLh[row][joined.mask_BL[row]], expected)
        real = joined.mask_BL[row].nonzero().flatten()
        assert torch.equal(real, torch.arange(len(expected)) + (joined.mask_BL.shape[1] - len(expected)) * pad_left)
    assert joined.mask_BL.shape[1] == max(sum(int(mask[row].sum()) for mask in masks) for row in range(5))


@pytest.mark.parametrize("pad_left", [False, True])
def test_columns_lead_back_to_every_block_position(pad_left: bool) -> None:
    torch.manual_seed(1)
    blocks = [torch.randn(4, size, 2) for size in (3, 5)]
    masks = [torch.rand(4, size) > 0.3 for size in (3, 5)]
    masks[0][:, 0] = True
    joined = join_rows(blocks, masks, pad_left=pad_left)
    for block, mask, columns in zip(blocks, masks, joined.columns, strict=True):
        assert torch.equal(gather_rows(joined.values_BLh, columns)[mask], block[mask])


def test_positions_are_contiguous_after_left_padding() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
