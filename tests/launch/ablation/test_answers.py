"""Units of the recorded answers: copies of the question sets that the annotated arm learns from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac, read_audio
from echox.config.load import load_recipe
from echox.config.schema import Recipe
from echox.errors import DataError
from echox.stream.format.writer import write_shards
from echox.units.extract import UnitExtractor
from echox.units.features import FeatureConfig, load_features
from echox.units.identity import read_unit_set
from echox.units.kmeans import KMeans
from launch.ablation.answers import annotated_sources
from shards.builder.rewrite import read_samples

TEXTS = ["Ghana is in Africa.", "Peru is in South America."]


def wave(text: str) -> Any:
    """Speech of a text: a chord of its own that changes over time."""
    time = np.arange(16_000) / 16_000
    return (0.4 * np.sin(2 * np.pi * (100 * len(text) * (1 + (time * 7).astype(int) / 5)) * time)).astype(np.float32)


class Voice:
    """Stands for Piper."""

    said: list[str] = []

    def __init__(self, folder: Path) -> None:
        pass

    def __enter__(self) -> Voice:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def speak(self, utterances: Sequence[Any], progress: Any) -> Iterator[list[Any]]:
        for utterance in utterances:
            assert [voice.name for voice in utterance.voices] == ["answer"]
            self.said.append(utterance.text)
            yield [wave(utterance.text)]
        progress(len(utterances), len(utterances))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    monkeypatch.setattr("shards.demo.speech.Speaker", Voice)
    monkeypatch.setattr(Voice, "said", [])
    root = tmp_path / "data" / "demo"
    for name, count in (("sqa-train", 6), ("sqa-valid", 2)):
        write_set(root / name, count)
    features = load_features(FeatureConfig(kind="log_mel"))
    frames = features([wave(text) for text in TEXTS])
    UnitExtractor(features, KMeans.fit(np.concatenate(frames), 8, seed=0)).save(root / "units")
    return root


def write_set(folder: Path, count: int) -> None:
    samples = (
        {
            "__key__": f"s{n}",
            "question.flac": encode_flac(np.full(800, n / 10, np.float32)),
            "question.encoded.npy": f"encoded {n}".encode(),
            "json": {"id": f"s{n}", "question_text": f"Where {n}?", "answer_text": TEXTS[n % 2], "question_s": 0.05},
        }
        for n in range(count)
    )
    write_shards(folder, samples, per_shard=4)
    (folder / "encoding.json").write_text('{"encoder": "e"}')
    (folder / "responses").mkdir()


def recipe(*overrides: str) -> Recipe:
    return load_recipe("demo/echo", overrides)


def test_every_question_gets_the_units_of_its_answer(corpus: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = annotated_sources(recipe(), corpus / "units", tmp_path / "copies", lines.append)
    copies = {group: tmp_path / "copies" / f"sqa-{group}" for group in ("train", "valid")}
    assert found == [f"data.train.0.path={copies['train']}", f"data.valid.0.path={copies['valid']}"]
    load_recipe("demo/echo", found)
    extractor = UnitExtractor.load(corpus / "units")
    heard = extractor.extract([read_audio(encode_flac(wave(text))) for text in TEXTS])
    assert not np.array_equal(heard[0][0], heard[1][0])
    for group, copy in copies.items():
        before, after = list(read_samples(corpus / f"sqa-{group}")), list(read_samples(copy))
        for old, new in zip(before, after, strict=True):
            units = np.frombuffer(new.pop("answer.units"), "<u2")
            assert old == new, "all else is as it was, the encoded question too"
            assert np.array_equal(units, heard[TEXTS.index(new["json"]["answer_text"])][0])
        assert read_unit_set(copy) == read_unit_set(corpus / "units")
        assert json.loads((copy / "encoding.json").read_text()) == {"encoder": "e"}
        assert not (copy / "responses").exists()
    assert Voice.said == TEXTS * 2, "each answer of a set is spoken once"


def test_a_copy_is_made_again_only_if_the_set_has_changed(corpus: Path, tmp_path: Path) -> None:
    def again() -> int:
        Voice.said.clear()
        annotated_sources(recipe(), corpus / "units", tmp_path / "copies", lambda line: None)
        return len(Voice.said)

    assert again() == 4 and again() == 0
    write_set_again = corpus / "sqa-valid"
    (write_set_again / "responses").rmdir()
    write_set(write_set_again, 1)
    assert again() == 1
    assert len(list(read_samples(tmp_path / "copies" / "sqa-valid"))) == 1
    (tmp_path / "copies" / "sqa-train" / "inputs.json").unlink()
    assert again() == 2, "an unfinished copy is no copy"


def test_sets_of_other_tasks_stay_and_absent_ones_are_named(corpus: Path, tmp_path: Path) -> None:
    mixed = ["data.train=[{path: demo/asr-train, task: asr}, {path: demo/sqa-train, task: sqa}]"]
    found = annotated_sources(recipe(*mixed), corpus / "units", tmp_path / "copies", lambda line: None)
    assert [words.partition("=")[0] for words in found] == ["data.train.1.path", "data.valid.0.path"]
    absent = recipe("data.train.0.path=demo/none")
    with pytest.raises(DataError, match="demo/none was not found"):
        annotated_sources(absent, corpus / "units", tmp_path / "copies", lambda line: None)
