"""Code HiFi-GANs of fairseq become vocoder folders that sound the same, or are refused by name."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from echox import cli
from echox.errors import DataError
from echox.speak.vocoder import CodeHifiGan, load_vocoder
from echox.units.identity import UnitSetIdentity, read_unit_set, write_unit_set
from echox.vocoder.fairseq import convert
from tests.vocoder import fairseq

UNITS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], np.uint16)


def imported(folder: Path, config: dict[str, Any], state: Any, *words: str) -> Path:
    checkpoint, settings = fairseq.write(folder / "theirs", config, state)
    assert cli.main(["vocoder", "import", str(checkpoint), str(settings), str(folder / "ours"), *words]) == 0
    return folder / "ours"


@pytest.mark.parametrize(
    ("config", "speaker"),
    [(fairseq.SMALL, None), (fairseq.TRUE, None), (fairseq.AT_24K, None), (fairseq.SPEAKERS, 0), (fairseq.SPEAKERS, 4)],
    ids=["small", "true", "24 kHz", "first speaker", "a speaker"],
)
def test_the_waveform_is_that_of_fairseq(config: dict[str, Any], speaker: int | None, tmp_path: Path) -> None:
    state = fairseq.random_state(config)
    words = [] if speaker is None else ["--speaker", str(speaker)]
    vocoder = load_vocoder(imported(tmp_path, config, state, *words))
    assert isinstance(vocoder, CodeHifiGan) and vocoder.sample_rate == config["sampling_rate"]
    units = UNITS[:5] if config is fairseq.TRUE else UNITS
    units_U = torch.from_numpy(units.astype(np.int64))
    wanted = fairseq.speak(config, state, units_U, speaker).numpy()
    frames = fairseq.durations(state, units_U)
    assert len(wanted) == int(frames.sum()) * config["code_hop_size"] and len(set(frames.tolist())) > 1
    assert 0.02 < wanted.std() < 0.8, "a sound that is neither silent nor clipped"
    (wave,) = vocoder([units])
    np.testing.assert_allclose(wave, wanted, rtol=0, atol=1e-5)


def test_a_model_of_several_speakers_keeps_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = fairseq.random_state(fairseq.SPEAKERS)
    ours = imported(tmp_path, fairseq.SPEAKERS, state, "--json")
    assert json.loads(capsys.readouterr().out)["speakers"] == 7
    assert torch.equal(load_file(ours / "model.safetensors")["speaker_embedding.weight"], state["spkr.weight"])
    units_U = torch.from_numpy(UNITS.astype(np.int64))
    waves = []
    for speaker in range(7):
        (wave,) = load_vocoder(ours, str(speaker))([UNITS])
        wanted = fairseq.speak(fairseq.SPEAKERS, state, units_U, speaker).numpy()
        np.testing.assert_allclose(wave, wanted, rtol=0, atol=1e-5)
        waves.append(wave)
    assert min(np.abs(one - other).max() for one in waves for other in waves if one is not other) > 0.05
    (first,) = load_vocoder(ours)([UNITS])
    assert np.array_equal(first, waves[0]), "the first where none is named"
    # Cut out, one sounds as it does among the others.
    (alone,) = load_vocoder(imported(tmp_path / "one", fairseq.SPEAKERS, state, "--speaker", "4"))([UNITS])
    assert np.array_equal(alone, waves[4])
    with pytest.raises(DataError, match="it has no speaker 7: its 7 have the numbers from 0"):
        convert(tmp_path / "theirs" / "g_00500000", tmp_path / "theirs" / "config.json", 7)


def test_another_speaker_is_another_voice(tmp_path: Path) -> None:
    state = fairseq.random_state(fairseq.SPEAKERS)
    waves = [
        load_vocoder(imported(tmp_path / str(each), fairseq.SPEAKERS, state, "--speaker", str(each)))([UNITS])[0]
        for each in (0, 4)
    ]
    assert np.abs(waves[0] - waves[1]).max() > 0.05


def test_a_stream_of_an_imported_voice_is_the_whole(tmp_path: Path) -> None:
    vocoder = load_vocoder(imported(tmp_path, fairseq.AT_24K, fairseq.random_state(fairseq.AT_24K)))
    units = np.resize(UNITS, 60)
    (whole,) = vocoder([units])
    for size in (1, 7, 60):
        stream = vocoder.stream()
        pieces = [stream.push(units[start : start + size]) for start in range(0, 60, size)]
        assert np.array_equal(np.concatenate([*pieces, stream.close()]), whole), size


def test_the_folder_holds_folded_weights_of_every_tensor_and_the_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = fairseq.random_state(fairseq.SMALL)
    units = UnitSetIdentity(features="hubert", model="mhubert-base", layer=11, clusters=20, centroids="aa")
    write_unit_set(tmp_path / "units", units)
    ours = imported(tmp_path, fairseq.SMALL, state, "--units", str(tmp_path / "units"), "--json")
    weights = load_file(ours / "model.safetensors")
    assert read_unit_set(ours) == units
    numbers = sum(tensor.numel() for name, tensor in state.items() if not name.endswith("_g"))
    assert sum(tensor.numel() for tensor in weights.values()) == numbers
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(ours), "units": 20, "sample_rate": 16000, "weights": numbers, "unit_set": units.digest,
    }  # fmt: skip
    # Imported again without naming the units, it keeps no record of those before.
    imported(tmp_path, fairseq.SMALL, state)
    assert read_unit_set(ours) is None
    write_unit_set(tmp_path / "units", UnitSetIdentity(features="log_mel", clusters=21))
    given = [str(tmp_path / "theirs" / name) for name in ("g_00500000", "config.json")]
    for place, said in (("units", "speaks 20 units"), ("theirs", "does not record which units")):
        assert cli.main(["vocoder", "import", *given, str(ours), "--units", str(tmp_path / place)]) == 4
        assert said in capsys.readouterr().err


def test_every_reason_against_a_checkpoint_is_given_at_once(tmp_path: Path) -> None:
    state: dict[str, Any] = fairseq.random_state(fairseq.SMALL)
    del state["conv_pre.weight_g"]
    state["ups.0.weight_v"] = state["ups.0.weight_v"][:, :-1]
    state["conv_post.bias"] = torch.zeros(1, dtype=torch.long)
    state["ups.1.bias"] = state["ups.1.bias"] * float("nan")
    state["quantizer.codebook"] = torch.zeros(2)
    config = {**fairseq.SMALL, "f0": True, "resblock": "2", "code_hop_size": 160, "embedder_params": {"a": 1}}
    config["dur_predictor_params"] = {"var_pred_hidden_dim": 8, "var_pred_kernel_size": 5}
    with pytest.raises(DataError) as raised:
        convert(*fairseq.write(tmp_path, config, state), speaker=3)
    for reason in (
        "it takes a pitch", "its resblock is '2'", "code_hop_size is 160, where the other sizes make 320",
        "embedder_params", "var_pred_hidden_dim is 8", "var_pred_kernel_size is 5", "no speaker can be chosen",
        "conv_pre.weight_g is missing", "ups.0.weight_v is [64, 31, 11], not [64, 32, 11]",
        "conv_post.bias is no tensor of floating-point numbers", "ups.1.bias has numbers that are not finite",
        "'quantizer.codebook' is unknown",
    ):  # fmt: skip
        assert reason in raised.value.what, reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dur_predictor_params": None}, "it predicts no durations"),
        ({"multispkr": "_"}, "spkr.weight is missing"),
        ({"multispkr": "_", "num_speakers": 0}, "speakers is 0, not a whole number from 1"),
        ({"num_embeddings": 1 << 40}, "units is 1099511627776"),
        ({"upsample_initial_channel": 1 << 15}, "weights, and the file has"),
        ({"upsample_initial_channel": 60}, "60 channels cannot be halved 5 times"),
        ({"upsample_rates": [5, 4], "code_hop_size": 20}, "there are 2 rates and 5 kernels"),
        ({"upsample_rates": [5, 4, 4, 2, 3]}, "kernel 4 at rate 3"),
        ({"upsample_rates": "x"}, "rates is ('x',)"),
        ({"upsample_rates": [[5]] * 5}, "rates is "),
        ({"resblock_dilation_sizes": [1, 3, 5]}, "resblocks.0.convs1.1.weight_g' is unknown"),
        ({"resblock_kernel_sizes": [3, 7, 10]}, "are not all odd"),
        ({"sampling_rate": "fast"}, "sample_rate is 'fast'"),
        ({"sampling_rate": True}, "sample_rate is True"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    files = fairseq.write(tmp_path, {**fairseq.SMALL, **change}, fairseq.random_state(fairseq.SMALL))
    with pytest.raises(DataError) as raised:
        convert(*files)
    assert said in raised.value.what


class Runs:
    """What leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.mark), "w"))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    mark, state = tmp_path / "mark", fairseq.random_state(fairseq.SMALL)
    files = fairseq.write(tmp_path, fairseq.SMALL, {**state, "evil": Runs(mark)})
    with pytest.raises(DataError, match="something other than plain tensors, and nothing in it was executed"):
        convert(*files)
    files[0].write_bytes(pickle.dumps({"generator": Runs(mark)}))
    with pytest.raises(DataError, match="no file that torch.save has written"):
        convert(*files)
    assert not mark.exists()
    # The same file is dangerous to a reader that trusts it.
    pickle.loads(files[0].read_bytes())["generator"].close()
    assert mark.exists()


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    state = fairseq.random_state(fairseq.SMALL)
    checkpoint, config = fairseq.write(tmp_path, fairseq.SMALL, state)

    def said() -> str:
        with pytest.raises(DataError) as raised:
            convert(checkpoint, config)
        return raised.value.what

    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "no file that torch.save has written" in said()
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x/data.pkl", bytes(1 << 20))
    assert "compressed" in said()
    torch.save({"model": state}, checkpoint)
    assert "no tensors under `generator`" in said()
    checkpoint.unlink()
    assert "No such file" in said()
    config.write_text("[")
    assert "The configuration cannot be read" in said()
