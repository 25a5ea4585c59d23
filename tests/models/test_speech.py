from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from echox.audio.features import LogMel
from echox.models.ragged import Layout, rows_of
from echox.models.speech import AlignmentAdapter, ShrinkAdapter, TrimmedWhisperEncoder
from echox.stream.collate import pad_audio
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


def _clips(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [(0.1 * rng.standard_normal(int(16_000 * length))).astype(np.float32) for length in seconds]


def _whisper() -> Any:
    """A random Whisper as transformers loads it."""
    torch.manual_seed(1)
    config = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, num_mel_bins=8, init_std=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    return WhisperModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pad_30s_is_the_whisper_encoder_on_what_its_feature_extractor_gives(layout: Layout) -> None:
    whisper, clips = _whisper(), _clips(1.3, 30.0, 0.2, 7.7)
    extracted = WhisperFeatureExtractor(feature_size=8)(clips, sampling_rate=16_000, return_tensors="pt")
    expected = whisper.encoder(extracted.input_features).last_hidden_state
    mel, frames = LogMel(8, input_mode="pad_30s")(*pad_audio(clips))
    torch.testing.assert_close(mel, extracted.input_features, rtol=0, atol=1e-5)
    encoder = TrimmedWhisperEncoder(copy.deepcopy(whisper.encoder), layout, input_mode="pad_30s")
    found, kept = encoder(mel, frames)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert kept.tolist() == [90, 1500, 36, 410]  # clip and margin, 50 a second
    trimmed, _ = TrimmedWhisperEncoder(copy.deepcopy(whisper.encoder), layout)(mel, frames)
    assert (trimmed[0, :90] - expected[0, :90]).abs().max() > 0.1  # silence is heard


@pytest.mark.parametrize(("layout", "on_host"), [("packed", True), ("packed", False), ("padded", True)])
def test_pad_30s_of_a_longer_clip_is_whisper_on_each_window(layout: Layout, on_host: bool) -> None:
    whisper, clips = _whisper(), _clips(64.0, 2.0, 30.1)
    encoder = TrimmedWhisperEncoder(copy.deepcopy(whisper.encoder), layout, input_mode="pad_30s")
    mel, frames = LogMel(8, input_mode="pad_30s")(*pad_audio(clips))
    found, kept = encoder(mel, frames, frames if on_host else None)
    assert kept.tolist() == [3226, 126, 1530] and found.shape == (3, 3226, 16)
    for row, clip in enumerate(clips):
        windows = [clip[at : at + 480_000] for at in range(0, len(clip), 480_000)]
        extracted = WhisperFeatureExtractor(feature_size=8)(windows, sampling_rate=16_000, return_tensors="pt")
        expected = whisper.encoder(extracted.input_features).last_hidden_state.flatten(0, 1)
        count = int(kept[row])
        torch.testing.assert_close(found[row, :count], expected[:count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("on_host", [True, False])
def test_trimmed_windows_are_encoded_as_rows_of_their_own_and_joined(layout: Layout, on_host: bool) -> None:
    encoder = TrimmedWhisperEncoder(tiny.whisper_encoder(), layout)
    mel, frames = torch.randn(4, 8, 6400), torch.tensor([6400, 40, 3000, 3012])
    rows: list[int] = []
    hook = encoder.encoder.conv1.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    joined, kept = encoder(mel, frames, frames if on_host else None)
    hook.remove()
    assert rows == [3 + 1 + 1 + 2]  # nothing is computed on windows that a clip does not reach
    assert joined.shape == (4, 3200, 16) and kept.tolist() == [3200, 20, 1500, 1506]
    for row, count in enumerate(frames.tolist()):
        for start in range(0, count, 3000):
            size = min(3000, count - start)
            alone, _ = encoder(mel[row : row + 1, :, start : start + size], torch.tensor([size]))
            found = joined[row, start // 2 : (start + size) // 2]
            torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-5)


def test_pad_30s_refuses_what_is_not_whole_windows() -> None:
    encoder = TrimmedWhisperEncoder(tiny.whisper_encoder(), input_mode="pad_30s")
    for columns in (400, 3400):
        with pytest.raises(ValueError, match=f"whole windows of 3000 frames, and this has {columns}"):
            encoder(torch.zeros(1, 8, columns), torch.tensor([columns]))


@pytest.mark.parametrize("input_mode", ["trim", "pad_30s"])
def test_speech_vectors_of_long_clips_are_the_same_packed_and_padded(input_mode: str) -> None:
    config = tiny.model_config()
    assert config.speech_encoder is not None
    speech = config.speech_encoder.model_copy(update={"input": input_mode})
    mel, frames = LogMel(8, input_mode=input_mode)(*pad_audio(_clips(1.0, 31.0)))  # type: ignore[arg-type]
    found = []
    for layout in ("packed", "padded"):
        model = tiny.s2t_model(config.model_copy(update={"layout": layout, "speech_encoder": speech})).eval()
        assert model.front_end.encoder.input_mode == input_mode
        vectors, mask = model.front_end(mel, frames).padded()
        assert int(mask[1].sum()) > 4
        found.append(vectors.masked_fill(~mask[:, :, None], 0))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


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
