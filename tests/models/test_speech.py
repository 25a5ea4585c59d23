from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from echox.models.ragged import Layout, rows_of
from echox.models.speech import AlignmentAdapter, ShrinkAdapter, TrimmedWhisperEncoder
from tests import tiny


def test_full_length_input_equals_the_hugging_face_encoder() -> None:
    encoder = tiny.whisper_encoder()
    mel = torch.randn(2, 8, 3000)
    ours, frames = TrimmedWhisperEncoder(encoder)(mel, torch.tensor([3000, 3000]))
    torch.testing.assert_close(ours, encoder(mel).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert frames.tolist() == [1500, 1500]


def test_features_of_a_clip_do_not_depend_on_its_batch() -> None:
    encoder = TrimmedWhisperEncoder(tiny.whisper_encoder())
    mel, frames = torch.randn(3, 8, 96), torch.tensor([40, 96, 64])
    together, _ = encoder(mel, frames)
    for row, count in enumerate(frames.tolist()):
        alone, _ = encoder(mel[row : row + 1, :, :count], frames[row : row + 1])
        torch.testing.assert_close(together[row, : count // 2], alone[0], rtol=1e-4, atol=1e-5)


def _adapter(frame_local: bool) -> AlignmentAdapter:
    torch.manual_seed(0)
    return AlignmentAdapter(
        encoder_width=6, width=8, heads=2, ffn=16, stack=2, dropout=0.0, frame_local=frame_local
    ).eval()


def test_alignment_attends_over_time_but_not_over_padding() -> None:
    adapter = _adapter(frame_local=False)
    features, frames = torch.randn(2, 12, 6), torch.tensor([12, 7])
    aligned, rows = adapter(features, frames)
    aligned = rows.to_padded(aligned)
    assert rows.lengths_N.tolist() == [6, 4]
    changed = features.clone()
    changed[1, 7:] += 1.0  # padding
    torch.testing.assert_close(rows.to_padded(adapter(changed, frames)[0])[1, :4], aligned[1, :4])
    changed[0, 11] += 1.0  # a real, far frame
    assert not torch.allclose(rows.to_padded(adapter(changed, frames)[0])[0, 0], aligned[0, 0])


def test_frame_local_alignment_moves_only_the_frame_that_changed() -> None:
    adapter = _adapter(frame_local=True)
    features, frames = torch.randn(1, 12, 6), torch.tensor([12])
    before, _ = adapter(features, frames)
    features[0, 5] += 1.0
    after, _ = adapter(features, frames)
    moved = (before - after).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, False, False, False]


def _shrunk(
    shrink: ShrinkAdapter, aligned: Tensor, frames: Tensor, labels: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded vectors, mask of the real ones, and the frame each was made of."""
    rows = rows_of(frames, labels.shape[1], layout)
    vectors, kept_rows, kept = shrink(rows.from_padded(aligned), rows, rows.from_padded(labels))
    mask = torch.arange(kept_rows.size) < kept_rows.lengths_N[:, None]
    return kept_rows.to_padded(vectors), mask, kept_rows.to_padded(kept)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_shrink_keeps_one_frame_for_every_run_of_labels(layout: Layout) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (6, 20))
    frames = torch.tensor([20, 1, 7, 13, 20, 2])
    shrink = ShrinkAdapter(width=8, heads=2, dropout=0.0, kept_keys_only=False)
    vectors, mask, kept = _shrunk(shrink, torch.randn(6, 20, 8), frames, labels, layout)
    runs = [len(list(itertools.groupby(labels[row, :count].tolist()))) for row, count in enumerate(frames.tolist())]
    assert mask.sum(1).tolist() == runs
    assert vectors.shape == (6, max(runs), 8)
    for row, count in enumerate(runs):
        lengths = [len(list(run)) for _, run in itertools.groupby(labels[row, : int(frames[row])].tolist())]
        assert kept[row, :count].tolist() == [0, *itertools.accumulate(lengths)][:count]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_shrink_without_blanks_keeps_the_other_runs_and_never_an_empty_row(layout: Layout) -> None:
    labels = torch.tensor([[0, 1, 1, 0, 2, 2, 0, 2], [0, 0, 0, 0, 0, 0, 0, 0], [3, 0, 3, 1, 0, 0, 0, 0]])
    shrink = ShrinkAdapter(width=8, heads=2, dropout=0.0, kept_keys_only=False, drop_blanks=True)
    _, mask, kept = _shrunk(shrink, torch.randn(3, 8, 8), torch.tensor([8, 8, 3]), labels, layout)
    assert [row[real].tolist() for row, real in zip(kept, mask, strict=True)] == [[1, 4, 7], [0], [0, 2]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_look_back_reads_dropped_frames_unless_told_to_keep_to_the_kept(layout: Layout) -> None:
    frames_BTh, frames = torch.randn(1, 6, 8), torch.tensor([6])
    labels = torch.tensor([[1, 1, 2, 2, 2, 3]])
    changed = frames_BTh.clone()
    changed[0, 3] += 5.0  # inside a run: dropped by the shrink
    for kept_only in (False, True):
        torch.manual_seed(0)
        shrink = ShrinkAdapter(width=8, heads=2, dropout=0.0, kept_keys_only=kept_only)
        same = torch.allclose(*(_shrunk(shrink, x, frames, labels, layout)[0] for x in (frames_BTh, changed)))
        assert same is kept_only
