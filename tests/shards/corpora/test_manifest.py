"""Manifests as other programs and other people write them: every line is a sample or a named rejection."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from shards.builder.corpus_build import Settings, build_corpus
from shards.corpora.registry import CORPORA
from shards.corpus import Request, Utterance, clean
from tests.shards.layouts import build, clip, encoded, put, put_lines

MANIFEST = CORPORA["manifest"]


def lines(path: Path, content: bytes, **request: Any) -> list[Utterance]:
    path.write_bytes(content)
    return list(MANIFEST.discover(path, Request(**{"task": "", **request})))


def one(path: Path, row: Any, **request: Any) -> Utterance:
    (found,) = lines(path, json.dumps(row).encode(), **request)
    return found


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    put(tmp_path / "a.wav", encoded(clip(1)))
    return tmp_path / "mine.jsonl"


@pytest.mark.parametrize("value", ["", " ", "\u200b", None])
def test_an_answer_that_is_there_and_says_nothing_makes_no_transcript(manifest: Path, value: Any) -> None:
    row = {"audio": "a.wav", "text": "who", "answer_text": value}
    assert one(manifest, row).problem == (
        "answer_text is there but says nothing; leave it out of a line to transcribe, or name a --task"
    )
    asked = one(manifest, row, task="asr")
    assert (asked.problem, asked.task, asked.answer_text) == (None, "asr", "who")
    assert one(manifest, row, task="sqa").answer_text is None, "which the builder rejects"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"audio": "a.wav", "text": "who", "answer_text": 5}, "answer_text is a int, not text"),
        ({"audio": "a.wav", "text": ["who"]}, "text is a list, not text"),
        ({"audio": {"path": "a.wav"}, "text": "who"}, "audio is a dict, not text"),
        ({"audio": "a.wav", "text": "who", "split": 1}, "split is a int, not text"),
        ({"audio": "a.wav", "text": "who", "id": ["x"]}, "id is a list, not text"),
        ({"audio": "a.wav", "text": "who", "id": True}, "id is a bool, not text"),
        ({"audio": "a.wav", "text": "who", "turns": "before"}, "turns is a str, not a list"),
        ({"audio": "a.wav", "text": "who", "turns": [{"role": "user", "text": 1}]}, "text is a int, not text"),
        (
            {"audio": "a.wav", "text": "who", "turns": [{"role": "boss", "text": "x"}]},
            "a turn's role is 'boss', not system, user, assistant",
        ),
        ({"audio": "a.wav", "text": "who", "duration": "3"}, "duration is '3', not a number of seconds"),
        ({"audio": "a.wav", "text": "who", "offset": -1}, "offset is '-1', not a number of seconds"),
        ({"audio": "a\0.wav", "text": "who"}, "audio has a character that no path has"),
        ({"audio": "a.wav", "audio_filepath": "b.wav"}, "audio_filepath and audio say the same thing twice"),
        ({"audio": "a.wav", "txt": "who"}, "unknown field txt; did you mean text?"),
        (7, "not a JSON object"),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_named(manifest: Path, row: Any, problem: str) -> None:
    assert one(manifest, row).problem == problem


def test_bytes_that_are_no_utf_8_and_lines_that_are_no_lines(manifest: Path) -> None:
    good = b'{"audio": "a.wav", "text": "caf\xc3\xa9"}\n'
    latin = b'{"audio": "a.wav", "text": "caf\xe9"}\n'
    deep = b'{"audio": "a.wav", "text": ' + b"[" * 100_000 + b"\n"
    long = b'{"text": "' + b"x" * (5 << 20) + b'"}\n'
    found = lines(manifest, b"\xef\xbb\xbf" + good + latin + deep + long + good + good.rstrip())
    assert [each.question_text for each in found] == ["café", None, None, None, "café", "café"]
    assert found[1].problem == "not UTF-8 at byte 31; convert the file, as by iconv -f LATIN1 -t UTF-8"
    assert found[2].problem is not None and found[3].problem == "longer than 4 MiB"
    assert [each.id for each in found[1:4]] == ["line 2 of mine.jsonl", "line 3 of mine.jsonl", "line 4 of mine.jsonl"]


def test_texts_are_composed_and_have_something_to_say() -> None:
    assert clean("cafe\u0301") == clean("café") == "café"
    assert clean(" \u200b\u200d\ufeff ") is None and clean("\n") is None
    assert clean("a\x00b\x1bc\td") == "abc\td"
    assert clean("👩‍🚀 नमस्ते") == "👩‍🚀 नमस्ते", "joiners stay within what they join"
    assert clean("a\ud800") == "a?"


def test_manifests_of_nemo_are_read_with_their_segments_and_speakers(manifest: Path, tmp_path: Path) -> None:
    put(tmp_path / "long.wav", encoded(np.concatenate([clip(1), clip(5), clip(9)])))
    rows = [
        {"audio_filepath": "long.wav", "text": "two", "offset": 0.3, "duration": 0.3, "speaker": "s1", "lang": None},
        {"audio_filepath": str(tmp_path / "long.wav"), "text": "all", "duration": 0.9, "nested": {"a": 1}},
        {"audio_filepath": "long.wav", "text": "behind the end", "offset": 0.9, "duration": 0.3},
    ]
    samples, rejected = build("manifest", put_lines(manifest, rows), tmp_path / "out", task="")
    np.testing.assert_array_equal(samples["long-0.3"]["question.flac"], clip(5))
    assert samples["long-0.3"]["json"]["fields"] == {"speaker": "s1"}
    whole = samples[str(tmp_path / "long")]
    assert whole["json"]["question_s"] == 0.9 and "fields" not in whole["json"]
    assert rejected == {"long-0.9": "question: 0.00 s of audio, outside 0.1 to 120 s"}


def test_accepted_answers_are_kept_where_scores_look_for_them(manifest: Path, tmp_path: Path) -> None:
    put(tmp_path / "a.wav", encoded(clip(1)))
    odd: list[Any] = [["Paris", " the city of Paris ", 3, "", None], "Paris", [], {"a": 1}, [["x"]], "x" * 2000, None]
    rows = [
        {"id": f"q{number}", "audio": "a.wav", "text": "which?", "answer_text": "It is Paris.", "answers": answers}
        for number, answers in enumerate(odd)
    ]
    samples, rejected = build("manifest", put_lines(manifest, rows), tmp_path / "out", task="")
    kept = [samples[f"q{number}"]["json"].get("answers") for number in range(len(odd))]
    assert kept == [["Paris", "the city of Paris"], ["Paris"], None, None, None, None, None] and not rejected
    assert not any("fields" in sample["json"] for sample in samples.values())


def test_audio_lies_in_the_folder_of_the_manifest_or_where_it_was_said(tmp_path: Path) -> None:
    put(tmp_path / "else" / "secret.wav", encoded(clip(1)))
    folder = tmp_path / "data"
    put(folder / "a.wav", encoded(clip(2)))
    (folder / "link.wav").symlink_to(tmp_path / "else" / "secret.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    os.mkfifo(folder / "pipe.wav")
    names = ["a.wav", "link.wav", "loop.wav", "pipe.wav", "../else/secret.wav", "/dev/zero", "x" * 300, "a.wav/b"]
    source = put_lines(
        folder / "mine.jsonl", [{"audio": name, "text": "t", "id": str(i)} for i, name in enumerate(names)]
    )
    samples, rejected = build("manifest", source, tmp_path / "out", task="")
    assert list(samples) == ["0"]
    outside = {key: "lies outside" in reason for key, reason in rejected.items()}
    assert outside == {"1": True, "2": False, "3": False, "4": True, "5": True, "6": False, "7": False}
    assert "--audio-root" in rejected["4"]
    assert rejected["3"] == "question: not a regular file"
    samples, rejected = build("manifest", source, tmp_path / "all", task="", audio_root=tmp_path)
    assert list(samples) == ["0", "1", "4"]
    samples, rejected = build("manifest", source, tmp_path / "top", task="", audio_root=Path("/"))
    assert rejected["5"] == "question: not a regular file"


def test_no_line_whatever_is_in_it_ends_a_build(manifest: Path, tmp_path: Path) -> None:
    random.seed(3)
    odd: list[Any] = [None, True, 0, -1, 1e308, 10**30, float("nan"), [], [[]], {}, {"a": []}]
    odd += ["", " ", "\ud800", "\0", "x" * 5000, "a.wav", "..", ".", "/", "\u202e"]
    odd += [[{"role": "user", "text": "t"}], [{"role": None, "text": None}]]
    fields = ["audio", "text", "answer_text", "answer_audio", "id", "split", "turns", "offset", "duration",
              "audio_filepath", "speaker", "json", "fields", "\ud800", ""]  # fmt: skip
    rows: list[Any] = [{field: value, "audio": "a.wav", "text": "t"} for field in fields for value in odd]
    rows += [{field: random.choice(odd) for field in random.sample(fields, random.randint(0, 9))} for _ in range(1500)]
    good = {"audio": "a.wav", "text": "good", "id": "good"}
    source = put_lines(manifest, [*rows, good])
    for task in ("", "asr", "sqa", "tts"):
        assert len(list(MANIFEST.discover(source, Request(task=task, history=True)))) == len(rows) + 1
    build_corpus(MANIFEST, source, tmp_path / "out", Request(task="", history=True), Settings(max_rejected=1.0))
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert len(rejected) > 500 and all(row["reason"] for row in rejected)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    metas = [json.loads(sample["json"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert "good" in [meta["id"] for meta in metas] and len(metas) + len(rejected) == len(rows) + 1
    json.dumps(metas, allow_nan=False)
