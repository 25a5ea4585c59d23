"""Each public layout is read from a tiny copy of it, streamed; whatever is none of them is refused in one sentence."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.errors import DataError
from echox.evaluate.benchmarks import questions as questions_module
from echox.evaluate.benchmarks.readers import read_questions
from echox.evaluate.benchmarks.survey import batch_numbers, survey
from tests.evaluate.benchmarks.layouts import ASKED, GOLDS, sound, write_parquet, write_tsv

SOUNDS = [sound(number) for number in range(3)]


def hub(tmp_path: Path, name: str) -> tuple[Path, tuple[tuple[str, ...], ...]]:
    """A folder as `hf download` leaves it, and the answers it accepts."""
    singles = tuple((golds[0],) for golds in GOLDS)
    columns: dict[str, dict[str, Any]] = {
        "llama-questions": {"Questions": ASKED, "Answer": [golds[0] for golds in GOLDS]},
        "speech-web-questions": {"url": ["u"] * 3, "question": ASKED, "answers": [list(golds) for golds in GOLDS]},
        "speech-triavia-qa": {"question": ASKED, "answer": [golds[0] for golds in GOLDS]},
    }
    write_parquet(tmp_path / name / "data" / "test-00000-of-00001.parquet", columns[name], SOUNDS, row_group_size=2)
    (tmp_path / name / "README.md").write_text("---\n")
    return tmp_path / name, GOLDS if name == "speech-web-questions" else singles


@pytest.mark.parametrize("name", ["llama-questions", "speech-web-questions", "speech-triavia-qa"])
def test_parquet_of_the_hub(tmp_path: Path, name: str) -> None:
    place, golds = hub(tmp_path, name)
    found = list(read_questions(place))
    assert [each.text for each in found] == list(ASKED)
    assert tuple(each.golds for each in found) == golds
    assert [(each.number, each.id) for each in found] == [(0, "q0"), (1, "q1"), (2, "q2")]
    assert [each.sound for each in found] == SOUNDS
    file = place / "data" / "test-00000-of-00001.parquet"
    assert [each.id for each in read_questions(file, 2)] == ["q0", "q1"], "its file is the same"


def test_a_limit_reads_nothing_behind_it(tmp_path: Path) -> None:
    place = write_tsv(tmp_path)
    (place / "3.wav").unlink()
    assert [each.id for each in read_questions(place, 2)] == ["1", "2"]


def test_several_files_of_a_split_are_one_benchmark_and_other_splits_are_left_out(tmp_path: Path) -> None:
    for number, name in enumerate(("test-00000-of-00002", "test-00001-of-00002", "train-00000-of-00001")):
        write_parquet(tmp_path / f"{name}.parquet", {"answer": [f"gold {number}"]}, SOUNDS[:1])
    assert [(each.number, each.golds) for each in read_questions(tmp_path)] == [(0, ("gold 0",)), (1, ("gold 1",))]


def test_tsv_with_wav_files(tmp_path: Path) -> None:
    found = list(read_questions(write_tsv(tmp_path)))
    assert [(each.id, each.text, each.golds) for each in found] == [
        (str(n + 1), ASKED[n], GOLDS[n][:1]) for n in range(3)
    ]
    assert [each.sound for each in found] == SOUNDS
    assert [each.id for each in read_questions(tmp_path / "llama_questions.tsv")] == ["1", "2", "3"]


def test_a_manifest_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(SOUNDS[0])
    rows = [
        {"id": "first", "audio": "sounds/a.wav", "question": ASKED[0], "answers": ["Paris", "", "paree"]},
        {"id": 7, "audio": "sounds/a.wav", "answers": "Lima"},
        {"audio": "sounds/a.wav", "answer": "Oslo"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows))
    found = [(each.id, each.text, each.golds) for each in read_questions(tmp_path)]
    assert found == [("first", ASKED[0], ("Paris", "paree")), ("7", "", ("Lima",)), ("3", "", ("Oslo",))]


def test_the_audio_is_16_khz_mono_whatever_it_was(tmp_path: Path) -> None:
    found = list(read_questions(write_tsv(tmp_path)))
    for number, question in enumerate(found):
        wave = question.audio()
        assert wave.dtype == np.float32 and wave.ndim == 1
        assert len(wave) == pytest.approx(16_000 * (0.25 + 0.05 * number), abs=2)
        assert float(np.abs(wave[500:-500]).max()) == pytest.approx(0.1 + 0.05 * number, rel=0.05)


def test_a_survey_hashes_what_decides_the_score(tmp_path: Path) -> None:
    place = write_tsv(tmp_path)
    whole = survey("llama-questions", place, None)
    assert [item.golds for item in whole.items] == [golds[:1] for golds in GOLDS]
    assert [item.seconds for item in whole.items] == pytest.approx([0.25, 0.3, 0.35], abs=0.01)
    assert survey("another-name", place, None).sha256 == whole.sha256
    assert len(survey("llama-questions", place, 2).items) == 2
    seen = {whole.sha256, survey("llama-questions", place, 2).sha256}
    (place / "2.wav").write_bytes(sound(1, 0.26))
    seen.add(survey("llama-questions", place, None).sha256)
    write_tsv(tmp_path, [(ASKED[n], f"{GOLDS[n][0]}s", f"{n + 1}.wav") for n in range(3)])
    seen.add(survey("llama-questions", place, None).sha256)
    assert len(seen) == 4
    batches = [[each.number for each in batch] for batch in whole.batches(2)]
    assert batches == [[0, 1], [2]] == [list(each) for each in batch_numbers(3, 2)]


def test_no_more_than_a_row_group_is_in_memory(tmp_path: Path) -> None:
    big = [os.urandom(2 << 20) for _ in range(24)]
    file = write_parquet(tmp_path / "test-0.parquet", {"answer": ["x"] * 24}, big, compression="none", row_group_size=3)
    del big
    import pyarrow as pa

    count, before = 0, pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()
    for _ in read_questions(file):
        count, most = count + 1, max(most, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 24 and file.stat().st_size > 48 << 20
    assert peak + most < 32 << 20, f"{peak >> 20} MiB of Python, {most >> 20} MiB of Arrow"


def tsv_of(tmp_path: Path, name: str, golds: str = "Paris") -> Path:
    return write_tsv(tmp_path, [(ASKED[0], golds, name)])


def refused(place: Path, *words: str) -> None:
    """It is refused by one sentence with these words, which names where and what to do."""
    with pytest.raises(DataError) as caught:
        for question in read_questions(place):
            question.audio()
    assert str(place.name) in caught.value.where and caught.value.fix and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_audio_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(SOUNDS[0])
    folder = tmp_path / "set"
    for name in ("../secret.wav", str(tmp_path / "secret.wav"), "link.wav", "dir/secret.wav", "", "."):
        tsv_of(folder, name)
        (folder / "link.wav").unlink(missing_ok=True)
        (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
        (folder / "dir").unlink(missing_ok=True)
        (folder / "dir").symlink_to(tmp_path)
        refused(folder / "llama_questions.tsv", "line 2", "the audio")
    lines = folder / "own.jsonl"
    for value in ("../secret.wav", 5, None, "a\0.wav", ["x"]):
        lines.write_text(json.dumps({"audio": value, "answers": ["x"]}) + "\n")
        refused(lines, "is no file of the benchmark")


def test_a_folder_whose_list_is_a_link_out_of_it_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "elsewhere.parquet", {"answer": ["x"]}, SOUNDS[:1])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    refused(tmp_path / "set", "link out of the folder")


def test_audio_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tsv_of(tmp_path, "none.wav") / "llama_questions.tsv", "none.wav cannot be read", "No such file")
    (tmp_path / "text.wav").write_text("no sound at all")
    refused(tsv_of(tmp_path, "text.wav") / "llama_questions.tsv", "Cannot decode question text")
    os.mkfifo(tmp_path / "pipe.wav")
    refused(tsv_of(tmp_path, "pipe.wav") / "llama_questions.tsv", "not a regular file")
    monkeypatch.setattr("echox.evaluate.benchmarks.readers.LARGEST_SOUND", 100)
    refused(tsv_of(tmp_path, "1.wav") / "llama_questions.tsv", "has more than")
    monkeypatch.undo()
    monkeypatch.setattr(questions_module, "LONGEST_S", 0.1)
    refused(tsv_of(tmp_path, "1.wav") / "llama_questions.tsv", "longer than 0 s")


def test_parquet_that_lacks_something_is_refused(tmp_path: Path) -> None:
    refused(write_parquet(tmp_path / "a.parquet", {"Questions": ["x"]}, SOUNDS[:1]), "no column answers or answer")
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"answer": ["x"], "sound": [b"x"]}), tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", "no column audio")
    refused(write_parquet(tmp_path / "c.parquet", {"answer": ["x"]}, [None]), "row 1", "not in the file")
    pa.parquet.write_table(pa.table({"answer": ["x"], "audio": ["q.wav"]}), tmp_path / "d.parquet")
    refused(tmp_path / "d.parquet", "not in the file")
    refused(write_parquet(tmp_path / "e.parquet", {"answer": [5]}, SOUNDS[:1]), "accepted answers are a int")
    refused(write_parquet(tmp_path / "f.parquet", {"answer": [["", " "]]}, SOUNDS[:1]), "no accepted answer")
    (tmp_path / "g.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-9])
    refused(tmp_path / "g.parquet", "cannot be read")
    empty = write_parquet(tmp_path / "h.parquet", {"answer": []}, [])
    refused(empty, "no question")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this is no benchmark"),
        ("hello", "this is no benchmark"),
        ("Questions\tAnswer\tFile\nx\ty\tz\n", "no column wav filename, but Questions, Answer, File"),
        ("Questions\tAnswer\tWav Filename\nx\ty\n", "line 2 "),
        ("Questions\tAnswer\tWav Filename\n", "no question"),
        ("Questions\tAnswer\tWav Filename\nx\t \t1.wav\n", "no accepted answer"),
        ('{"audio": "1.wav"}\n', "no object with audio and answers"),
        ('{"answers": ["x"]}\n', "no object with audio and answers"),
        ('{"audio": "1.wav", "answers": {"x": 1}}\n', "accepted answers are a dict"),
        ('{"audio": "1.wav", "answers": [1]}\n', "accepted answers are a list"),
        ('{"audio": "1.wav", "answers": []}\n', "no accepted answer"),
        ('{"audio": "1.wav", "answers": "x", "question": 5}\n', "question is a int"),
        ('{"audio": "1.wav", "answers": "x", "id": 1.5}\n', "id is a float"),
        ("{no json}\n", "the line is no JSON"),
        ('{"a":' * 90_000 + "\n", "nested too deeply"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "1.wav").write_bytes(SOUNDS[0])
    (tmp_path / "list").write_text(text)
    refused(tmp_path / "list", words)


def test_a_list_that_is_not_utf8_or_holds_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(SOUNDS[0])
    (tmp_path / "list").write_bytes(b"Questions\tAnswer\tWav Filename\nM\xfcnchen\tx\t1.wav\n")
    refused(tmp_path / "list", "'utf-8' codec can't decode")
    (tmp_path / "list").write_text('{"audio": "1.wav", "answers": ["a\\ud800b"], "question": "\\udfff?"}\n')
    (question,) = read_questions(tmp_path / "list")
    assert (question.text, question.golds) == ("??", ("a?b",))


def test_places_that_hold_no_benchmark_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trivia-qa was not found") as caught:
        survey("trivia-qa", tmp_path / "none", None)
    assert "hf download TwinkStart/speech-triavia-qa --repo-type dataset" in caught.value.fix
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no benchmark in the folder")
    write_tsv(tmp_path / "both")
    (tmp_path / "both" / "more.tsv").write_text("a\tb\tc\n")
    refused(tmp_path / "both", "more than once: llama_questions.tsv, more.tsv", "name the file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
