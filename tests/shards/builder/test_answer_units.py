"""Units of spoken answers: the pass over finished shards, and the command that builds and then makes units."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.cli import main
from echox.errors import DataError
from echox.stream.format.writer import write_shards
from echox.units.extract import UnitExtractor, fit_extractor, unit_set_of
from echox.units.features import FeatureConfig
from echox.units.identity import RECORD as UNIT_SET
from echox.units.identity import read_unit_set
from shards.builder.answer_units import add_answer_units
from shards.corpora.registry import CORPORA
from tests.shards.killing import killed
from tests.shards.layouts import build, clip, encoded, put, put_archive, put_lines, read


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    audio = [waveform(number) for number in range(10)]
    fit_extractor(audio, FeatureConfig(kind="log_mel"), 8).save(folder)
    return folder


def waveform(number: int) -> np.ndarray:
    return np.asarray(clip(number, 0.3 + 0.05 * number) / 32768, dtype=np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows: list[dict[str, str]] = [{"audio": "0.wav", "text": "heard", "id": "asr"}]
    for number in range(10):
        put(tmp_path / f"{number}.wav", encoded(clip(number, 0.3 + 0.05 * number)))
        rows.append({"answer_audio": f"{number}.wav", "answer_text": f"said {number}"})
    return put_lines(tmp_path / "mine.jsonl", rows)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def build_shards(source: Path, out: Path) -> Path:
    build("manifest", source, out, per_shard=4)
    return out


def check(out: Path, units: Path, *, audio: bool) -> None:
    """Each answer has the units of its own source recording."""
    extractor = UnitExtractor.load(units)
    samples: dict[str, Any] = {}
    # The duration of an answer stays in its json when the sound itself goes.
    import webdataset

    described = json.loads((out / "dataset.json").read_text())
    for sample in webdataset.WebDataset([str(out / s["name"]) for s in described["shards"]], shardshuffle=False):
        samples[json.loads(sample["json"])["id"]] = sample
    assert list(samples) == ["asr", *map(str, range(10))]
    assert "question.flac" in samples["asr"] and "answer.units" not in samples["asr"]
    for number in range(10):
        sample = samples[str(number)]
        assert ("answer.flac" in sample) == audio
        assert json.loads(sample["json"])["answer_s"] == pytest.approx(0.3 + 0.05 * number, abs=1e-3)
        ((expected, durations),) = extractor.extract([waveform(number)])
        assert np.frombuffer(sample["answer.units"], "<u2").tolist() == expected.tolist()
        assert np.frombuffer(sample["answer.durations"], "<u2").tolist() == durations.tolist()
    hashes = [hashlib.sha256((out / s["name"]).read_bytes()).hexdigest() for s in described["shards"]]
    assert hashes == [shard["sha256"] for shard in described["shards"]]


@pytest.mark.parametrize("keep", [False, True])
def test_every_answer_gets_its_units(source: Path, units: Path, tmp_path: Path, keep: bool) -> None:
    out = build_shards(source, tmp_path / "out")
    before = json.loads((out / "dataset.json").read_text())
    lines: list[str] = []
    made = add_answer_units(out, units, lines.append, keep_audio=keep, workers=2)
    check(out, units, audio=keep)
    after = json.loads((out / "dataset.json").read_text())
    assert (after["samples"], after["hours"]) == (before["samples"], before["hours"])
    assert after["fingerprint"] != before["fingerprint"]
    assert made["answers"] == 10 and made["clusters"] == 8 and made["features"]["kind"] == "log_mel"
    assert lines[-1] == f"out: 10 answers, {made['units_per_s']} units a second"
    assert {"build.json", "rejected.jsonl", "units.json"} <= set(contents(out))
    again = contents(out)
    add_answer_units(out, units, lines.append, keep_audio=keep)
    assert lines[-1] == "out: already has these units" and contents(out) == again


@pytest.mark.parametrize(("name", "calls"), [("write_json", 2), ("add_shard", 2), ("complete", 1), ("is_kept", 1)])
def test_killed_anywhere_it_goes_on_and_ends_in_the_same_bytes(
    source: Path, units: Path, tmp_path: Path, name: str, calls: int
) -> None:
    out = build_shards(source, tmp_path / "out")
    shutil.copytree(out, tmp_path / "whole")
    # The name of the folder is in no file.
    add_answer_units(tmp_path / "whole", units)
    if name == "is_kept":
        _killed(out, units, "write_json", 3)
    _killed(out, units, name, calls)
    add_answer_units(out, units)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.units").exists()


def test_interrupted_and_called_with_other_units_it_starts_again(source: Path, units: Path, tmp_path: Path) -> None:
    out = build_shards(source, tmp_path / "out")
    fit_extractor([waveform(5)], FeatureConfig(kind="log_mel"), 4).save(tmp_path / "other")
    _killed(out, tmp_path / "other", "add_shard", 1)
    add_answer_units(out, units)
    check(out, units, audio=False)


def test_killed_in_its_last_step_the_next_build_finishes_it(
    source: Path, units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shards", "build", "manifest", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 0
    _killed(tmp_path / "out", units, "rmtree", 3, "shutil")
    # What it was killed in, done.
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    assert main([*words, "--units", str(units)]) == 0
    assert capsys.readouterr().err == "out: already built, 11 samples\nout: already has these units\n"
    check(tmp_path / "out", units, audio=False)
    assert {path.name for path in tmp_path.glob(".out*")} == set()


def _killed(out: Path, units: Path, name: str, calls: int, module: str = "shards.builder.answer_units") -> None:
    killed(partial(add_answer_units, out, units), module, name, calls)


def test_what_cannot_be_done_is_one_sentence(source: Path, units: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no kmeans\.npz .*echox units fit"):
        add_answer_units(tmp_path, tmp_path)
    with pytest.raises(DataError, match="There are no shards"):
        add_answer_units(tmp_path / "absent", units)
    build("manifest", source, tmp_path / "asr", limit=1)
    with pytest.raises(DataError, match=r"No sample has answer\.flac.*--keep-answer-audio"):
        add_answer_units(tmp_path / "asr", units)
    assert list(read(tmp_path / "asr")) == ["asr"] and not (tmp_path / ".asr.units").exists()
    out = build_shards(source, tmp_path / "out")
    add_answer_units(out, units)
    with pytest.raises(DataError, match="No sample has answer"):
        add_answer_units(out, units, keep_audio=True)
    check(out, units, audio=False)


@pytest.mark.parametrize("keep", [False, True])
def test_units_of_another_set_are_not_put_in_their_place(
    source: Path, units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: bool
) -> None:
    out, other = build_shards(source, tmp_path / "out"), tmp_path / "other"
    add_answer_units(out, units, keep_audio=keep)
    fit_extractor([waveform(5)], FeatureConfig(kind="log_mel"), 4).save(other)
    before = contents(out)
    with pytest.raises(DataError) as caught:
        add_answer_units(out, other, keep_audio=keep)
    said = str(caught.value)
    for part in (f"dataset {out}", f"k-means {other}", str(unit_set_of(units)), str(unit_set_of(other)), "--replace"):
        assert part in said
    assert contents(out) == before and not (tmp_path / ".out.units").exists()
    # Which units the shards have is not known: said, and made again where the sound is still there.
    (out / UNIT_SET).unlink()
    if keep:
        add_answer_units(out, other, keep_audio=True)
        check(out, other, audio=True)
        assert read_unit_set(out) == unit_set_of(other)
    else:
        with pytest.raises(DataError, match="No sample has answer"):
            add_answer_units(out, other)
        assert read_unit_set(out) is None
    assert f"which units dataset {out} has" in capsys.readouterr().err


def test_shards_record_their_unit_set_also_those_made_before_records_were(
    source: Path, units: Path, tmp_path: Path
) -> None:
    out = build_shards(source, tmp_path / "out")
    add_answer_units(out, units)
    assert read_unit_set(out) == unit_set_of(units)
    before = contents(out)
    (out / UNIT_SET).unlink()
    add_answer_units(out, units)
    assert contents(out) == before


def test_samples_with_units_and_no_sound_do_not_stay_beside_new_units(units: Path, tmp_path: Path) -> None:
    told = {"id": "a", "answer_text": "said", "task": "tts", "question_s": None, "answer_s": 0.4}
    sound = encode_flac(waveform(1))
    samples = [
        {"__key__": "a", "json": told, "answer.units": b"\1\0"},
        {"__key__": "b", "json": {**told, "id": "b"}, "answer.flac": sound},
    ]
    write_shards(tmp_path / "out", samples, optional=("answer.units", "answer.flac"))
    with pytest.raises(DataError, match=r"Some samples have answer\.flac, and others units without it"):
        add_answer_units(tmp_path / "out", units)


def test_a_corpus_that_comes_with_units_names_their_unit_set(
    source: Path, units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "[Human]: This is input: Hello.<eoh> [SpeechGPT]: <sosp><1><2><eosp>"
    put_lines(tmp_path / "chain_of_modality_instruction.jsonl", [{"plain_text": line}])
    words = ["shards", "build", "speech-instruct", "--workers", "1", "--source"]
    out = tmp_path / "out"
    assert main([*words, str(tmp_path), "--out", str(out)]) == 0
    assert read_unit_set(out) == CORPORA["speech-instruct"].unit_set
    # Built before records were, it gets one.
    (out / UNIT_SET).unlink()
    assert main([*words, str(tmp_path), "--out", str(out)]) == 0
    assert read_unit_set(out) == CORPORA["speech-instruct"].unit_set
    # In the archives of EchoX the corpus has sound: its units are those of the k-means that made them.
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "audio": "a.wav"}]
    put_archive(tmp_path / "S/SpeechInstruct/a.tar.gz", [{"conversations": turns}], {"a.wav": encoded(clip(3))})
    spoken = tmp_path / "spoken"
    assert main([*words, str(tmp_path / "S"), "--out", str(spoken)]) == 0
    assert read_unit_set(spoken) is None
    for _ in range(2):
        assert main([*words, str(tmp_path / "S"), "--out", str(spoken), "--units", str(units)]) == 0
        assert read_unit_set(spoken) == unit_set_of(units)
    assert main([*words, str(tmp_path / "S"), "--out", str(spoken)]) == 0
    assert read_unit_set(spoken) == unit_set_of(units)
    assert "warning" not in capsys.readouterr().err


def test_one_command_builds_and_makes_units(
    source: Path, units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shards", "build", "manifest", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*words, "--units", str(units), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert "11 samples in 1 shards" in said.err and "10 answers" in said.err
    check(tmp_path / "out", units, audio=False)
    assert main([*words, "--units", str(units)]) == 0
    said = capsys.readouterr()
    assert said.out == f"corpus manifest: {tmp_path / 'out'}\n"
    assert "already built" in said.err and "already has these units" in said.err
    # The k-means can be fitted on shards that were built without one.
    assert main([*words, "--replace", "--limit", "9"]) == 0
    fit = ["units", "fit", str(tmp_path / "out"), str(tmp_path / "own"), "--features", "log_mel", "--clusters", "6"]
    assert main(fit) == 0
    assert main([*words, "--limit", "9", "--units", str(tmp_path / "own")]) == 0
    assert json.loads((tmp_path / "out" / "units.json").read_text())["clusters"] == 6


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", "build", "--help"])
    said = capsys.readouterr().out
    for name in ("demo", "manifest", "librispeech", "mls", "audioqa", "speech-instruct", "hh-rlhf-speech"):
        assert f"\n    {name} " in said
    with pytest.raises(SystemExit):
        main(["shards", "build", "mls", "--help"])
    said = capsys.readouterr().out
    assert "openslr.org/94" in said and "CC BY 4.0" in said and "transcripts.txt" in said and "--units" not in said
    for wrong in (["--limit", "0"], ["--max-rejected", "2"], ["--task", "sing"]):
        with pytest.raises(SystemExit) as caught:
            main(["shards", "build", "manifest", "--source", "a", "--out", "b", *wrong])
        assert caught.value.code == 2
    assert main(["shards", "build", "mls", "--source", str(tmp_path / "x"), "--out", str(tmp_path / "y")]) == 4
    assert "Cannot find mls" in capsys.readouterr().err
