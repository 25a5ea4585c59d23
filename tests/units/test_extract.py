"""Frame features against transformers, and units from waveforms."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import HubertConfig, HubertModel, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from echox.audio.io import write_audio
from echox.cli import main
from echox.errors import DataError, MissingModelError
from echox.units.extract import UnitExtractor, fit_extractor, fit_units
from echox.units.features import FeatureConfig, load_features

RATE = 16_000


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = np.interp(time, np.linspace(0, max(seconds, 0.1), 9), random.uniform(100, 2000, 9))
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.01 * random.normal(size=len(time))).astype(np.float32)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whisper")
    model = WhisperModel(config)
    # Random layers say little; without the position table what they say is about the sound.
    model.encoder.embed_positions.weight.data.zero_()
    model.save_pretrained(folder)
    return folder


def test_whisper_layer_is_that_of_transformers_on_a_full_window(whisper: Path) -> None:
    clip = tone(28.0)
    (frames_TD,) = load_features(FeatureConfig(model=str(whisper), layer=2))([clip])
    mel = WhisperFeatureExtractor()(clip, sampling_rate=RATE, return_tensors="pt").input_features
    # The trimmed input ends half a second after the clip, so its attention spreads over a little less silence.
    model = WhisperModel.from_pretrained(whisper).eval()
    with torch.no_grad():
        layers = model.encoder(mel, output_hidden_states=True).hidden_states

    def difference(layer: int, shift: int = 0) -> float:
        return float((torch.from_numpy(frames_TD) - layers[layer][0, shift : shift + 1400]).norm())

    assert frames_TD.shape == (1400, 32)
    assert difference(2) < 0.5 * min(difference(1), difference(3), difference(2, shift=1))


@pytest.mark.parametrize("kind", ["whisper", "log_mel"])
def test_frames_of_a_clip_do_not_depend_on_the_batch(whisper: Path, kind: str) -> None:
    features = load_features(FeatureConfig(kind=kind, model=str(whisper), layer=3))  # type: ignore[arg-type]
    clips = [tone(1.0, 1), tone(2.37, 2), tone(0.5, 3)]
    for clip, frames in zip(clips, features(clips), strict=True):
        (alone,) = features([clip])
        assert len(frames) == -(-len(clip) // 320)
        np.testing.assert_allclose(frames, alone, atol=2e-4)


@pytest.mark.parametrize(("norm", "stable"), [("group", False), ("layer", True)])
def test_hubert_layer_in_a_batch_is_that_of_transformers_clip_by_clip(tmp_path: Path, norm: str, stable: bool) -> None:
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8, 8, 8, 8, 8, 8), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm, conv_bias=stable, do_stable_layer_norm=stable,
    )  # fmt: skip
    model = HubertModel(config).eval()
    if norm == "group":
        # Fresh norms are all the same; trained ones are not.
        torch.nn.init.normal_(model.feature_extractor.conv_layers[0].layer_norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(model.feature_extractor.conv_layers[0].layer_norm.bias, 0.0, 0.3)
    model.save_pretrained(tmp_path)
    clips = [tone(1.0, 1), tone(2.37, 2), tone(0.5, 3), tone(0.02, 4), tone(31.0, 5)]
    features = load_features(FeatureConfig(kind="hubert", model=str(tmp_path), layer=1))
    found = features(clips)
    assert [len(frames_TD) for frames_TD in found] == [49, 118, 24, 1, 1549]
    for clip, frames_TD in zip(clips, found, strict=True):
        padded = np.pad(clip, (0, max(0, 400 - len(clip))))
        with torch.no_grad():
            expected = model(torch.from_numpy(padded)[None], output_hidden_states=True).hidden_states[1][0]
        np.testing.assert_allclose(frames_TD, expected.numpy(), atol=2e-5)


def test_units_from_a_saved_folder(whisper: Path, tmp_path: Path) -> None:
    clips = [tone(1.5, seed) for seed in range(6)]
    seen: list[tuple[str, int, int]] = []
    fitted = fit_units(clips, str(whisper), 2, 12, tmp_path, progress=lambda *step: seen.append(step))
    found = UnitExtractor.load(tmp_path).extract(clips)
    for (units, durations), (again, lasting) in zip(fitted.extract(clips), found, strict=True):
        assert units.tolist() == again.tolist() and durations.tolist() == lasting.tolist()
        assert int(durations.sum()) == 75
        assert units.dtype == durations.dtype == np.uint16
        assert (units[1:] != units[:-1]).all() and units.max() < 12
    assert len({units.tobytes() for units, _ in found}) == 6, "different sounds, the same units"
    assert seen[-1] == ("frames for k-means", 6, 6)


def test_a_clip_longer_than_the_window_is_pieced_together(whisper: Path) -> None:
    extractor = fit_extractor([tone(3.0)], FeatureConfig(model=str(whisper), layer=1), 8)
    ((_, durations),) = extractor.extract([tone(31.0)])
    assert int(durations.sum()) == 31 * 50


def test_bad_input_is_one_sentence(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Layer 9"):
        load_features(FeatureConfig(model=str(whisper), layer=9))
    with pytest.raises(DataError, match="No features of kind"):
        FeatureConfig(kind="mfcc")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="empty clip"):
        load_features(FeatureConfig(kind="log_mel"))([np.zeros(0, np.float32)])
    with pytest.raises(DataError, match="No audio"):
        fit_extractor([], FeatureConfig(kind="log_mel"), 8)
    with pytest.raises(DataError, match="Cannot read features"):
        UnitExtractor.load(tmp_path)
    with pytest.raises(MissingModelError):
        load_features(FeatureConfig(model=str(tmp_path / "absent")))


def test_command_line_from_recordings_to_words_and_back(
    whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from echox.cli import main

    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed in range(4):
        write_audio(folder / f"{seed}.wav", tone(2.0, seed))
    fit = ["units", "fit", str(folder), str(tmp_path / "units"), "--model", str(whisper), "--layer", "2"]
    assert main([*fit, "--clusters", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 4
    assert main(["units", "extract", str(tmp_path / "units"), str(folder), "--out", str(tmp_path / "u.jsonl")]) == 0
    language = str(tmp_path / "language.json")
    assert main(["unit-language", "fit", str(tmp_path / "u.jsonl"), language, "--clusters", "10", "--words", "30"]) == 0
    assert (
        main(["unit-language", "encode", language, str(tmp_path / "u.jsonl"), "--out", str(tmp_path / "w.jsonl")]) == 0
    )
    capsys.readouterr()
    assert main(["unit-language", "decode", language, str(tmp_path / "w.jsonl")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    original = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text().splitlines()]
    assert [row["units"] for row in rows] == [row["units"] for row in original]
    assert all(len(row["words"]) < len(row["units"]) for row in rows)


def test_command_line_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from echox.cli import main

    (tmp_path / "empty").mkdir()
    assert main(["units", "extract", str(tmp_path), str(tmp_path / "empty")]) == 4
    assert main(["units", "fit", str(tmp_path / "empty"), str(tmp_path / "units"), "--features", "log_mel"]) == 4
    assert "No recordings found" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"units": [1, 2]}\n{"units": "x"}\n')
    assert main(["unit-language", "fit", str(tmp_path / "bad.jsonl"), str(tmp_path / "l.json"), "--clusters", "4"]) == 4
    assert "Line 2" in capsys.readouterr().err


def test_units_words_and_lines_carry_their_unit_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from echox.cli import main
    from echox.units.extract import unit_set_of
    from echox.units.language import UnitLanguage

    (tmp_path / "recordings").mkdir()
    for seed in range(4):
        write_audio(tmp_path / "recordings" / f"{seed}.wav", tone(2.0, seed))
    recordings = str(tmp_path / "recordings")
    for name, seed in (("a", "0"), ("b", "1")):
        fit = ["units", "fit", recordings, str(tmp_path / name), "--features", "log_mel", "--clusters", "10", "--json"]
        assert main([*fit, "--seed", seed]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["unit_set"] == unit_set_of(tmp_path / name).digest
        assert (
            main(["units", "extract", str(tmp_path / name), recordings, "--out", str(tmp_path / f"{name}.jsonl")]) == 0
        )
    rows = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("a", "b")}
    (tmp_path / "both.jsonl").write_text(rows["a"] + rows["b"])
    bare = [json.loads(line) for line in rows["a"].splitlines()]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({"units": row["units"]}) + "\n" for row in bare))
    capsys.readouterr()

    def language(*sources: str, clusters: int = 10) -> tuple[int, str]:
        words = [str(tmp_path / source) for source in sources]
        code = main(["unit-language", "fit", *words, str(tmp_path / "l.json"), "--clusters", str(clusters)])
        return code, capsys.readouterr().err

    for sources in (("a.jsonl", "b.jsonl"), ("both.jsonl",)):
        code, said = language(*sources)
        assert code == 4 and "unit sets that differ in centroids" in said and "row 1 of" in said
    assert not (tmp_path / "l.json").exists()
    code, said = language("a.jsonl", clusters=12)
    assert code == 4 and "--clusters 12 is not the number of units" in said
    code, said = language("a.jsonl", "bare.jsonl")
    assert code == 0 and "warning: no unit_set.json" in said and "bare.jsonl" in said
    assert UnitLanguage.load(tmp_path / "l.json").unit_set == unit_set_of(tmp_path / "a")
    encode = ["unit-language", "encode", str(tmp_path / "l.json"), "--out", str(tmp_path / "words.jsonl")]
    assert main([*encode, str(tmp_path / "a.jsonl")]) == 0 and "warning" not in capsys.readouterr().err
    assert main([*encode, str(tmp_path / "b.jsonl")]) == 4
    assert "the unit language" in capsys.readouterr().err
    code, said = language("bare.jsonl")
    assert code == 0 and "warning" not in said and UnitLanguage.load(tmp_path / "l.json").unit_set is None


def test_a_recording_that_is_none_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from echox.units.cli import read_recordings

    write_audio(tmp_path / "a.wav", np.full(800, 0.1, np.float32))
    (tmp_path / "b.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "c.opus", np.full(4800, 0.1, np.float32), 48_000, format="OGG", subtype="OPUS")
    os.mkfifo(tmp_path / "d.wav")
    assert [name for name, _ in read_recordings(tmp_path)] == ["a.wav", "c.opus"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == ["b.wav", "d.wav"]
    (tmp_path / "a.wav").unlink()
    (tmp_path / "c.opus").unlink()
    with pytest.raises(DataError, match="Not one of 2 recordings can be used"):
        list(read_recordings(tmp_path))


def test_a_change_of_unit_costs_what_the_command_says(tmp_path: Path) -> None:
    """The same centroids; what a change costs only lets units last longer."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_audio(tmp_path / "in" / f"{number}.wav", tone(2.0, number))
    fit = ["units", "fit", str(tmp_path / "in"), "--features", "log_mel", "--clusters", "16"]
    assert main([*fit[:3], str(tmp_path / "free"), *fit[3:]]) == 0
    assert main([*fit[:3], str(tmp_path / "costly"), *fit[3:], "--switch", "3"]) == 0
    free, costly = (UnitExtractor.load(tmp_path / name) for name in ("free", "costly"))
    np.testing.assert_array_equal(free.kmeans.centroids_KD, costly.kmeans.centroids_KD)
    assert free.kmeans.switch_cost == 0 < costly.kmeans.switch_cost
    (many, _), (few, _) = (extractor.extract([tone(2.0, 7)])[0] for extractor in (free, costly))
    assert len(few) < 0.8 * len(many)


@pytest.mark.parametrize("given", ["-1", "nan", "1e9"])
def test_no_other_cost_is_taken(tmp_path: Path, given: str) -> None:
    with pytest.raises(SystemExit):
        main(["units", "fit", str(tmp_path), str(tmp_path / "out"), f"--switch={given}"])
