"""The build on stand-ins for the text model and the voice: data contract, resuming, going on without recordings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from echox.audio.io import read_audio
from echox.errors import NetworkError
from echox.files import sha256_file
from echox.stream.format.catalogue import Catalogue
from echox.units.extract import UnitExtractor
from echox.units.features import FeatureConfig
from echox.units.identity import RECORD, read_unit_set
from echox.units.kmeans import KMeans
from echox.units.language import UnitLanguage
from shards.demo import build as module
from shards.demo.build import build, known_facts
from shards.demo.facts import COUNTRIES
from shards.demo.prompts import read_prompts, split_prompts, words
from shards.demo.units import TTS_SETS, UnitSettings, add_units


class FakeTextModel:
    """Knows each country whose name has an even number of letters; knows no language at all."""

    asked: list[str] = []

    def __init__(self, folder: Path) -> None:
        assert folder.is_dir()

    def ask(self, questions: list[str], progress: Any) -> list[str]:
        FakeTextModel.asked += questions
        progress(len(questions), len(questions))
        return [self.answer(text) for text in questions]

    @staticmethod
    def answer(text: str) -> str:
        for country in COUNTRIES:
            name = country.name[0].upper() + country.name[1:]
            if (country.name in text or name in text) and len(country.name) % 2 == 0 and "language" not in text:
                return f"It is {country.capital} in {country.continent}."
        return "I do not know."


class FakeSpeaker:
    """A tone as long as the text; counts what it was asked to say, and how often it was left."""

    said: list[str] = []
    left = 0

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.model = folder / "voice.onnx"

    def __enter__(self) -> FakeSpeaker:
        return self

    def __exit__(self, *_: object) -> None:
        FakeSpeaker.left += 1

    def speak(self, utterances: list[Any], progress: Any) -> Iterator[list[np.ndarray]]:
        for utterance in utterances:
            FakeSpeaker.said.append(utterance.text)
            yield [np.full(160 * len(utterance.text), 0.1, np.float32) for _ in utterance.voices]


class FakeFeatures:
    """A frame each 20 ms, random but fixed by the clip's length; counts the clips."""

    encoded = 0
    frame_rate = 50.0

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config

    def __call__(self, audio: Any) -> list[np.ndarray]:
        FakeFeatures.encoded += len(audio)
        return [
            np.random.default_rng(len(clip)).normal(size=(len(clip) // 320, 4)).astype(np.float32) for clip in audio
        ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    FakeTextModel.asked, FakeSpeaker.said, FakeSpeaker.left = [], [], 0
    models = tmp_path / "models"
    for folder, name in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "model.safetensors"),
        ("openai/whisper-base", "model.safetensors"),
        ("rhasspy/en_US-joe-medium", "voice.onnx"),
    ):
        (models / folder).mkdir(parents=True)
        (models / folder / name).write_bytes(b"1")
    prompts = tmp_path / "data" / "asterisk-prompts"
    (prompts / "wav" / "digits").mkdir(parents=True)
    lines = [
        "; a comment",
        "",
        "beep: [a beep]",
        "gone: This one has no file.",
        "digits/one: one",
        "long: A very long one.",
    ]
    for number in range(8):
        lines.append(f"p{number}: Please press   number {number} now.")
        soundfile.write(prompts / "wav" / f"p{number}.wav", np.full(8000, 0.1), 8000)
    lines.append("same: please press number 3 now")
    for name, count in (("beep", 8000), ("digits/one", 8000), ("long", 90_000), ("same", 8000)):
        soundfile.write(prompts / "wav" / f"{name}.wav", np.full(count, 0.1), 8000)
    (prompts / "transcripts.txt").write_text("\n".join(lines))
    monkeypatch.setattr("shards.demo.knowledge.TextModel", FakeTextModel)
    monkeypatch.setattr(module, "Speaker", FakeSpeaker)
    monkeypatch.setattr(module, "is_present", lambda name, cache: True)
    FakeFeatures.encoded = 0
    monkeypatch.setattr("echox.units.features.load_features", FakeFeatures)
    monkeypatch.setattr("echox.units.extract.load_features", FakeFeatures)
    return tmp_path


def read(folder: Path) -> list[dict[str, Any]]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def test_prompts_without_speech_or_file_or_end_are_left_out(cache: Path) -> None:
    prompts = read_prompts(cache / "data/asterisk-prompts")
    assert [prompt.name for prompt in prompts] == ["digits/one", *(f"p{n}" for n in range(8)), "same"]
    assert prompts[1].text == "Please press number 0 now." and prompts[1].seconds == 1.0


def test_held_out_prompts_are_sentences_that_training_never_says(cache: Path) -> None:
    prompts = read_prompts(cache / "data/asterisk-prompts")
    train, heldout = split_prompts(prompts, 8)
    assert len(heldout) == 8 and [prompt.name for prompt in train] == ["digits/one"]
    assert not {words(prompt.text) for prompt in train} & {words(prompt.text) for prompt in heldout}


def test_known_facts_hold_in_both_phrasings(cache: Path) -> None:
    asker = module.Asker(cache / "k.json", cache / "models/HuggingFaceTB/SmolLM2-135M-Instruct", print)
    facts = known_facts(asker)
    assert {relation for _, relation in facts} == {"capital", "continent"}
    assert {country for country, _ in facts} == {country.name for country in COUNTRIES if len(country.name) % 2 == 0}
    assert len(FakeTextModel.asked) == 3 * len(COUNTRIES) + len(facts)


def test_samples_follow_the_data_contract(cache: Path) -> None:
    corpus = build(cache, print, limit=20)
    root = cache / "data/demo"
    assert corpus == json.loads((root / "corpus.json").read_text())
    assert set(corpus["text_llm_acc"].values()) == {1.0}
    sqa, tts = read(root / "sqa-train"), read(root / "tts-train")
    assert len(sqa) == 20 and {"question.flac", "json"} == {name for name in sqa[0] if not name.startswith("__")}
    meta = json.loads(sqa[0]["json"])
    assert meta["id"] == sqa[0]["__key__"] and meta["task"] == "sqa"
    assert meta["relation"] in ("capital", "continent", "open") and meta["entity"][1] in meta["question_text"]
    assert meta["question_s"] == len(read_audio(sqa[0]["question.flac"])) / 16_000 and meta["answer_s"] is None
    assert any(answer in meta["answer_text"] for answer in meta["answers"])
    spoken = json.loads(tts[0]["json"])
    assert spoken["question_text"] is None and spoken["question_s"] is None and spoken["answer_s"] > 0
    assert "answer.flac" in tts[0] and "question.flac" not in tts[0]
    units, durations = (np.frombuffer(tts[0][f"answer.{name}"], "<u2") for name in ("units", "durations"))
    expected = UnitExtractor.load(root / "units").extract([read_audio(tts[0]["answer.flac"])])[0]
    assert np.array_equal(units, expected[0]) and np.array_equal(durations, expected[1])
    assert durations.sum() == len(read_audio(tts[0]["answer.flac"])) // 320 and (np.diff(units.astype(int)) != 0).all()
    assert all("answer.units" in sample for sample in read(root / "tts-heldout"))
    assert UnitLanguage.load(root / "units/unit_language.json").n_units == 40
    real = read(root / "asr-heldout-real")
    assert len(real) == 8 and len(read_audio(real[0]["question.flac"])) == 16_000
    sources = [json.loads(sample["json"])["source"] for sample in read(root / "asr-train")]
    assert sources.count("asterisk-core-sounds-en") == corpus["real_recordings"]["train"] == 1


def voiced(corpus: dict[str, Any]) -> int:
    """Spoken answers of all sets."""
    return sum(row["samples"] for name, row in corpus["sets"].items() if name.startswith("tts-"))


def test_a_second_build_does_nothing_and_says_so(cache: Path) -> None:
    first = build(cache, print, limit=20)
    asked, said, encoded = len(FakeTextModel.asked), len(FakeSpeaker.said), FakeFeatures.encoded
    lines: list[str] = []
    second = build(cache, lines.append, limit=20)
    assert (len(FakeTextModel.asked), len(FakeSpeaker.said)) == (asked, said)
    assert FakeFeatures.encoded == encoded == voiced(first)
    assert sum("already built" in line for line in lines) == len(first["sets"]) == 11
    assert sum("units: already made" in line for line in lines) == 1
    assert first["sets"] == second["sets"]
    assert FakeSpeaker.left == 2, "its threads end with the build"


def test_a_damaged_or_outdated_set_alone_is_built_again(cache: Path) -> None:
    first = build(cache, print, limit=20)
    shard = cache / "data/demo/sqa-train/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    FakeSpeaker.said.clear()
    assert build(cache, print, limit=20)["sets"] == first["sets"]
    assert len(FakeSpeaker.said) == 20 and FakeFeatures.encoded == voiced(first)
    FakeSpeaker.said.clear()
    shard = cache / "data/demo/tts-heldout/shard-000000.tar"
    shard.unlink()
    assert build(cache, print, limit=20)["sets"] == first["sets"]
    assert len(FakeSpeaker.said) == 20 and FakeFeatures.encoded == 2 * voiced(first)
    FakeSpeaker.said.clear()
    build(cache, print, limit=19)
    assert len(FakeSpeaker.said) > 60


def test_without_recordings_the_demo_goes_on_and_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(names: list[str], *_: Any) -> None:
        if names:
            raise NetworkError("Could not download the apt package")

    monkeypatch.setattr(module, "is_present", lambda name, cache: name != "prompts")
    monkeypatch.setattr(module, "fetch", refuse)
    lines: list[str] = []
    corpus = build(cache, lines.append, limit=20)
    assert any("goes on without them: Could not download" in line for line in lines)
    assert corpus["real_recordings"] == {"train": 0, "heldout": 0} and "asr-heldout-real" not in corpus["sets"]


def test_a_set_whose_index_is_gone_is_indexed_and_not_built_again(cache: Path) -> None:
    first = build(cache, limit=20)
    folder = cache / "data/demo/sqa-train"
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    (folder / "dataset.catalogue").unlink()
    assert build(cache, limit=20)["sets"] == first["sets"]
    assert Catalogue.open(folder).samples == first["sets"]["sqa-train"]["samples"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == shards


def test_everything_with_units_names_their_unit_set(cache: Path) -> None:
    build(cache, limit=20)
    root = cache / "data/demo"
    units = read_unit_set(root / "units")
    assert units is not None and (units.features, units.model, units.layer) == ("whisper", "whisper-base", 2)
    assert units.weights == sha256_file(cache / "models/openai/whisper-base/model.safetensors")
    assert units.centroids == KMeans.load(root / "units/kmeans.npz").sha256
    assert UnitLanguage.load(root / "units/unit_language.json").unit_set == units
    assert {folder.name for folder in root.iterdir() if (folder / RECORD).is_file()} == {
        "units",
        "tts-train",
        *TTS_SETS,
    }
    assert all(read_unit_set(root / name) == units for name in TTS_SETS)


def test_a_corpus_made_before_records_were_gets_them_and_nothing_else_changes(cache: Path) -> None:
    build(cache, limit=20)
    root = cache / "data/demo"
    language = root / "units/unit_language.json"
    with_records = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for path in root.rglob(RECORD):
        path.unlink()
    content = json.loads(language.read_text())
    del content["unit_set"]
    language.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path != language}
    encoded = FakeFeatures.encoded
    build(cache, limit=20)
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in after} == with_records
    assert {path: date for path, date in after.items() if path in before} == before
    assert FakeFeatures.encoded == encoded
    build(cache, limit=20)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == after


def test_killed_between_shards_and_record_the_units_are_unknown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(cache, limit=20)
    root = cache / "data/demo"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shards.demo.units.write_json", killed)
    monkeypatch.setattr("shards.demo.units.rewrite", killed)
    with pytest.raises(KeyboardInterrupt):
        add_units(cache, settings=UnitSettings(clusters=30, vocab_size=200))
    assert not (root / "tts-train" / RECORD).exists()
