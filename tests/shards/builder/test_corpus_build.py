"""The common machinery: order, keys, workers, interruptions, the ledger and its budget."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from webdataset.writer import TarWriter

import shards.builder.convert
import shards.builder.corpus_build
import shards.builder.publish
import shards.corpus
from echox.cli import main
from echox.errors import DataError, EchoXError
from shards.builder.convert import Job, keys, write_sample
from shards.builder.corpus_build import Settings, build_corpus
from shards.builder.progress import Meter
from shards.corpora.registry import CORPORA
from shards.corpus import FileAudio, Request, Utterance
from tests.shards.dying import die
from tests.shards.killing import killed
from tests.shards.layouts import build, clip, encoded, ledger, put, put_archive, put_lines, read

MANIFEST = CORPORA["manifest"]
ANY = Request(task="")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty recordings, of which the third is silent about its words and the eleventh is no audio."""
    rows = []
    for number in range(20):
        put(tmp_path / "wav" / f"{number}.wav", encoded(clip(number)) if number != 10 else b"noise")
        rows.append({"audio": f"wav/{number}.wav", "text": f"text {number}" if number != 2 else " "})
    return put_lines(tmp_path / "mine.jsonl", rows)


def settings(**more: Any) -> Settings:
    return Settings(**{"per_shard": 4, "max_rejected": 0.5, **more})


def run(source: Path, out: Path, say: Callable[[str], None] | None = None, **more: Any) -> dict[str, Any]:
    return build_corpus(MANIFEST, source, out, ANY, settings(**more), say)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_folder_is_what_its_description_says(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    described = run(source, tmp_path / "out", lines.append)
    assert sorted(contents(tmp_path / "out")) == [
        "build.json",
        "dataset.catalogue",
        "dataset.json",
        "rejected.jsonl",
        *(f"shard-{number:06d}.tar{index}" for number in range(5) for index in ("", ".idx")),
    ]
    assert [shard["samples"] for shard in described["shards"]] == [3, 4, 3, 4, 4]
    assert described["hours"] == pytest.approx(18 * 0.3 / 3600, abs=1e-6)
    hashes = [contents(tmp_path / "out")[shard["name"]] for shard in described["shards"]]
    assert hashes == [shard["sha256"] for shard in described["shards"]]
    assert described["fingerprint"] == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert list(read(tmp_path / "out")) == [f"wav/{number}" for number in range(20) if number not in (2, 10)]
    assert ledger(tmp_path / "out").keys() == {"wav/2", "wav/10"}
    assert lines[-1] == (
        "manifest: 18 samples in 5 shards, 0.00 h of audio, 2 utterances rejected (1 no transcript; "
        "1 question: Cannot decode … bytes of audio: Format not recognised.)"
    )
    assert not (tmp_path / ".out.building").exists()


def test_a_sample_has_the_bytes_that_webdataset_writes(tmp_path: Path) -> None:
    members = {"question.flac": b"sound" * 300, "json": {"b": "ü", "a": 1}, "answer.units": b"\1\0"}
    with tarfile.open(tmp_path / "ours.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        write_sample(tar, "key", members)
    fixed = {"user": "echox", "group": "echox", "mode": 0o644, "mtime": 0}
    encoded_json = json.dumps(members["json"], ensure_ascii=False, sort_keys=True).encode()
    with (
        (tmp_path / "theirs.tar").open("wb") as file,
        TarWriter(file, encoder=False, compress=False, **fixed) as writer,
    ):
        writer.write({"__key__": "key", **members, "json": encoded_json})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_keys_are_plain_and_unique() -> None:
    ids = ["a.b/c", "a b c", "a_b_c", "a_b_c-2", "ü", "", "x" * 200, "x" * 201]
    found = list(keys(Utterance(id=name, task="asr", source="s") for name in ids))
    made = [key for key, _ in found]
    assert made == ["a_b_c", "a_b_c-1", "a_b_c-2", "a_b_c-2-3", "utterance", "utterance-5", "x" * 80, "x" * 80 + "-7"]
    assert [utterance.id for _, utterance in found] == ids


def test_shards_without_sounds_of_turns_are_known_as_before_there_were_any() -> None:
    plain = Utterance(
        id="a", task="sqa", source="s", question=FileAudio(Path("/x/q.wav")), turns=({"role": "user", "text": "t"},)
    )
    known = "5f5a2bafacb3539ed24ed210f7e5e85f1dd51bffd3c78496a1cb712aa7957031"
    assert Job(0, Path("/x"), 2.0, [("k", plain)]).digest() == known
    spoken = dataclasses.replace(plain, turn_audio=(FileAudio(Path("/x/t.wav")),))
    assert Job(0, Path("/x"), 2.0, [("k", spoken)]).digest() != known


def test_workers_do_not_change_a_byte(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one")
    run(source, tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_limit_takes_the_first_utterances(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "some", limit=6)
    assert list(read(tmp_path / "some")) == ["wav/0", "wav/1", "wav/3", "wav/4", "wav/5"]


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        ("shards.builder.corpus_build", "convert", 1),
        ("shards.builder.convert", "write_sample", 6),
        ("shards.builder.convert", "write_json", 2),
        ("shards.builder.corpus_build", "convert", 5),
        ("shards.builder.publish", "add_shard", 3),
        ("shards.builder.publish", "complete", 1),
        ("shards.builder.publish", "finish_publishing", 1),
    ],
)
def test_killed_anywhere_it_goes_on_and_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, calls: int
) -> None:
    run(source, tmp_path / "whole")
    out, work = tmp_path / "out", tmp_path / ".out.building"
    killed(partial(run, source, out), module, name, calls)
    assert not out.exists()
    finished = sorted(path.name for path in work.glob("part-*.json"))
    converted: list[str] = []
    real = shards.builder.corpus_build.convert
    monkeypatch.setattr(
        shards.builder.corpus_build,
        "convert",
        lambda job, *rest: (converted.append(f"part-{job.number:06d}.json"), real(job, *rest))[1],
    )
    run(source, out)
    assert contents(out) == contents(tmp_path / "whole") and not work.exists()
    assert not set(converted) & set(finished) and len(converted) == 5 - len(finished)


def test_killed_between_its_last_two_steps_it_only_names_the_folder(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    run(source, out, limit=3)
    killed(partial(run, source, out, replace=True), "shutil", "rmtree", 3)
    assert (tmp_path / ".out.building" / "complete").is_dir()
    lines: list[str] = []
    run(source, out, lines.append)
    assert lines == ["out: already built, 18 samples"]
    assert contents(out) == contents(tmp_path / "whole")


def test_workers_end_when_the_build_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.wav")
    source = put_lines(tmp_path / "mine.jsonl", [{"audio": "endless.wav", "text": "a"}])
    words = ["shards", "build", "manifest", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "2"]
    build = subprocess.Popen([sys.executable, "-m", "echox", *words], stderr=subprocess.DEVNULL)
    # Opening a pipe waits for its reader: from here on a worker is in the middle of an utterance.
    with (tmp_path / "endless.wav").open("wb"):
        family = psutil.Process(build.pid).children(recursive=True)
        build.kill()
        build.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
    assert family and not alive


def test_interrupted_from_the_keyboard_it_says_so_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.wav")
    put(tmp_path / "good.wav", encoded(clip(1)))
    rows = [{"audio": name, "text": "a", "id": name} for name in ("good.wav", "endless.wav", "good.wav", "good.wav")]
    source = put_lines(tmp_path / "mine.jsonl", rows)
    words = ["shards", "build", "manifest", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "4"]
    command = [sys.executable, "-m", "echox", *words, "--per-shard", "1"]
    build = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with (tmp_path / "endless.wav").open("wb"):  # held open: at its end the recording would be a bad one
        os.killpg(build.pid, signal.SIGINT)
        said = build.communicate(timeout=60)[1]
    assert said.endswith("interrupted\n") and "Traceback" not in said and build.returncode == 130


def test_a_finished_shard_that_was_altered_is_made_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    killed(partial(run, source, tmp_path / "out"), "shards.builder.publish", "add_shard", 1)
    part = tmp_path / ".out.building" / "part-000001.tar"
    data = bytearray(part.read_bytes())
    data[700] ^= 1
    part.write_bytes(data)
    run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_built_already_it_says_so_and_built_differently_it_asks(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    lines: list[str] = []
    run(source, tmp_path / "out", lines.append)
    assert lines == ["out: already built, 18 samples"]
    with pytest.raises(DataError, match=r"other utterances or with other settings .*--replace"):
        run(source, tmp_path / "out", limit=8)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "shard-000002.tar").write_bytes(b"cut")
    with pytest.raises(DataError, match="are incomplete"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", limit=8, replace=True)["samples"] == 7
    assert not (tmp_path / ".out.building").exists()


def test_a_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    put(tmp_path / "thesis" / "chapter.txt", "years of work")
    with pytest.raises(DataError, match="holds something else"):
        run(source, tmp_path / "thesis", replace=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert run(source, tmp_path / "empty")["samples"] == 18


def test_every_bad_utterance_is_in_the_ledger_with_its_reason(tmp_path: Path) -> None:
    put(tmp_path / "good.wav", encoded(clip(1)))
    put(tmp_path / "none.wav", encoded(clip(1, 0.0)))
    put(tmp_path / "short.wav", encoded(clip(1, 0.05)))
    put(tmp_path / "long.wav", encoded(clip(1, 2.5)))
    put(tmp_path / "zero.wav", b"")
    (tmp_path / "folder.wav").mkdir()
    names = ("good", "none", "short", "long", "zero", "absent", "folder")
    source = put_lines(tmp_path / "mine.jsonl", [{"audio": f"{name}.wav", "text": name} for name in names])
    samples, rejected = build("manifest", source, tmp_path / "out", task="", longest_s=2.0)
    assert list(samples) == ["good"]
    assert rejected == {
        "none": "question: The audio of 44 bytes of audio is empty",
        "short": "question: 0.05 s of audio, outside 0.1 to 2 s",
        "long": "question: 2.50 s of audio, outside 0.1 to 2 s",
        "zero": rejected["zero"],
        "absent": "question: no such file",
        "folder": "question: no such file",
    }
    assert rejected["zero"].startswith("question: Cannot decode 0 bytes of audio")
    (row,) = [row for row in map(json.loads, (tmp_path / "out" / "rejected.jsonl").open()) if row["id"] == "absent"]
    assert row["files"] == [str(tmp_path / "absent.wav")]


def test_a_file_that_was_cut_is_bad(tmp_path: Path) -> None:
    sound = clip(3, 2.0, 24_000)
    kinds = {
        "wav": encoded(sound, 24_000),
        "mp3": encoded(sound, 24_000, "MP3"),
        "flac": encoded(sound, 24_000, "FLAC"),
    }
    for kind, data in kinds.items():
        put(tmp_path / f"whole.{kind}", data)
        put(tmp_path / f"cut.{kind}", data[: len(data) // 2])
    piped = bytearray(kinds["wav"])
    piped[4:8] = b"\xff" * 4
    put(tmp_path / "piped.wav", bytes(piped))
    streamed = encoded(sound[::3], 16_000, "FLAC")
    rate_to_length = int.from_bytes(streamed[18:26], "big") >> 36 << 36  # and no samples: the length is not known
    put(tmp_path / "piped.flac", streamed[:18] + rate_to_length.to_bytes(8, "big") + streamed[26:])
    names = [*(f"{state}.{kind}" for kind in kinds for state in ("whole", "cut")), "piped.wav", "piped.flac"]
    rows = [{"audio": name, "text": "a", "id": name} for name in names]
    samples, rejected = build("manifest", put_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out", task="")
    assert list(samples) == ["whole.wav", "whole.mp3", "whole.flac", "piped.wav", "piped.flac"]
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        flacs = [tar.extractfile(member).read() for member in tar if member.name.endswith(".flac")]  # type: ignore[union-attr]
    assert soundfile.info(io.BytesIO(flacs[-1])).frames == len(sound[::3]), "other programs believe the header"
    assert rejected["cut.wav"] == rejected["cut.mp3"] == "question: the file is cut short"
    assert rejected["cut.flac"].startswith("question: Cannot decode")


def test_sound_that_says_nothing_is_rejected_and_sound_that_is_clipped_is_noted(tmp_path: Path) -> None:
    loud = np.clip(clip(2, 1.0).astype(np.float32) / 4000, -1, 1)
    sounds = {
        "silent": np.zeros(16_000, np.float32),
        "cancels": np.stack([loud, -loud], 1),
        "integers": clip(1, 1.0).astype(np.float32),
        "clipped": loud,
        "fine": loud / 2,
    }
    for name, samples in sounds.items():
        put(tmp_path / f"{name}.wav", encoded(samples, subtype="FLOAT"))
    said: list[str] = []
    rows = [{"audio": f"{name}.wav", "text": "t"} for name in sounds]
    run(put_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out", said.append, max_rejected=1.0)
    assert ledger(tmp_path / "out") == {
        "silent": "question: silent",
        "cancels": "question: silent, or its 2 channels cancel out",
        "integers": "question: its samples reach 8,086 where 1 is full scale: whole numbers as floats",
    }
    metas = {name: sample["json"] for name, sample in read(tmp_path / "out").items()}
    assert metas["clipped"]["clipped"] == {"question": pytest.approx(float((np.abs(loud) >= 0.99).mean()), abs=1e-3)}
    assert "clipped" not in metas["fine"] and said[-1].endswith("1 clipped (`clipped` in their json)")


def test_a_text_that_nobody_can_say_in_the_time_is_rejected(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", encoded(clip(1, 2.0)))
    rows = [
        {"audio": "a.wav", "text": "x" * 150, "id": "fast"},
        {"audio": "a.wav", "text": "x" * 151, "id": "faster"},
        {"audio": "a.wav", "text": "who", "answer_text": "y" * 50_000, "id": "long answer"},
        {"audio": "a.wav", "text": "who", "answer_text": "y" * 50_001, "id": "longer answer"},
        {"answer_audio": "a.wav", "answer_text": "y" * 1000, "id": "spoken"},
    ]
    samples, rejected = build("manifest", put_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out", task="")
    assert list(samples) == ["fast", "long answer"]
    assert rejected == {
        "faster": "transcript: 151 characters for 2.00 s of audio, more than 150",
        "longer answer": "answer text: 50,001 characters, more than 50,000",
        "spoken": "answer text: 1,000 characters for 2.00 s of audio, more than 150",
    }


def test_an_hour_of_sound_is_rejected_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*args: Any) -> None:
        raise AssertionError("decoded")

    put(tmp_path / "hour.flac", encoded(np.zeros(16_000 * 600, np.int16), kind="FLAC"))
    source = put_lines(tmp_path / "mine.jsonl", [{"audio": "hour.flac", "text": "t"}])
    monkeypatch.setattr(shards.builder.convert, "read_audio", decode)
    with pytest.raises(DataError, match="Not one utterance"):
        run(source, tmp_path / "out", max_rejected=1.0)
    assert "600.00 s of audio, outside" in (tmp_path / ".out.building" / "ready" / "rejected.jsonl").read_text()


def test_tags_and_pictures_of_a_recording_stay_behind(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 16_000, 1, format="FLAC", subtype="PCM_16") as file:
        file.artist = "A. Person"
        file.write(clip(1))
    put(tmp_path / "a.flac", buffer.getvalue())
    samples, _ = build(
        "manifest", put_lines(tmp_path / "m.jsonl", [{"audio": "a.flac", "text": "t"}]), tmp_path / "out"
    )
    np.testing.assert_array_equal(samples["a"]["question.flac"], clip(1))
    assert (
        b"A. Person" in buffer.getvalue() and b"A. Person" not in (tmp_path / "out" / "shard-000000.tar").read_bytes()
    )


def weakly_packed(samples: np.ndarray) -> bytes:
    """FLAC as this project would not write it."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="FLAC", subtype="PCM_16", compression_level=0.0)
    return buffer.getvalue()


def test_flac_that_fits_keeps_its_bytes_and_other_flac_is_converted(tmp_path: Path) -> None:
    fits = put(tmp_path / "fits.flac", weakly_packed(clip(1))).read_bytes()
    put(tmp_path / "fast.flac", encoded(clip(1, rate=48_000), 48_000, "FLAC"))
    put(tmp_path / "deep.flac", encoded(clip(1), kind="FLAC", subtype="PCM_24"))
    rows = [{"audio": f"{name}.flac", "text": "a"} for name in ("fits", "fast", "deep")]
    run(put_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        kept = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert kept["fits.question.flac"] == fits
    info = soundfile.info(io.BytesIO(kept["deep.question.flac"]))
    assert (info.subtype, info.samplerate) == ("PCM_16", 16_000)
    assert read(tmp_path / "out")["fast"]["json"]["question_s"] == 0.3


def test_answers_keep_the_rate_that_a_vocoder_needs_and_questions_their_own(tmp_path: Path) -> None:
    put(tmp_path / "q.wav", encoded(clip(1, rate=48_000), 48_000))
    fits = put(tmp_path / "a.flac", encoded(clip(2, rate=24_000), 24_000, "FLAC")).read_bytes()
    put(tmp_path / "b.wav", encoded(clip(3, rate=48_000), 48_000))
    put(tmp_path / "d.ogg", encoded(clip(4, rate=48_000), 48_000, "OGG", "VORBIS"))
    rows = [
        {"id": name, "audio": "q.wav", "text": "a", "answer_audio": audio, "answer_text": "b"}
        for name, audio in (("a", "a.flac"), ("b", "b.wav"), ("c", "b.wav"), ("d", "d.ogg"))
    ]
    for row in rows[2:]:
        row |= {"answer_offset": 0.1, "answer_duration": 0.15}
    source = put_lines(tmp_path / "mine.jsonl", rows)
    words = ["shards", "build", "manifest", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*words, "--keep-answer-audio", "--answer-rate", "24000"]) == 0
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        kept = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name, rate in (("a.answer", 24_000), ("b.answer", 24_000), ("a.question", 16_000), ("b.question", 16_000)):
        assert soundfile.info(io.BytesIO(kept[f"{name}.flac"])).samplerate == rate, name
    assert kept["a.answer.flac"] == fits
    assert [json.loads(kept[f"{key}.json"])["answer_s"] for key in "abcd"] == [0.3, 0.3, 0.15, 0.15]
    for key in "cd":
        assert soundfile.info(io.BytesIO(kept[f"{key}.answer.flac"])).frames == 3600, "a part of a recording too"
    assert main(words) == 4, "shards of another rate are other shards"


def test_a_source_that_moved_is_the_same(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path / "out")
    (tmp_path / "moved").mkdir()
    for path in (source, tmp_path / "wav"):
        path.rename(tmp_path / "moved" / path.name)
    monkeypatch.chdir(tmp_path / "moved")
    lines: list[str] = []
    run(Path("mine.jsonl"), tmp_path / "out", lines.append)
    assert lines == ["out: already built, 18 samples"]


def test_too_many_bad_utterances_stop_the_build_and_lose_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(source, tmp_path / "out", max_rejected=0.05)
    assert str(caught.value).startswith("2 of 20 utterances are bad, more than 5.0%; the first, wav/2: no transcript [")
    assert "raise --max-rejected" in str(caught.value)
    listed = Path(caught.value.where)
    assert [json.loads(line)["id"] for line in listed.read_text().splitlines()] == ["wav/2", "wav/10"]
    parts = {path: path.stat().st_mtime_ns for path in listed.parent.glob("part-*")}
    put(tmp_path / "wav" / "10.wav", encoded(clip(10)))
    killed(partial(run, source, tmp_path / "out", max_rejected=0.05), "shards.builder.publish", "add_shard", 1)
    changed = {path.name for path, time in parts.items() if path.stat().st_mtime_ns != time}
    assert changed == {"part-000002.json", "part-000002.tar"}, "only the shard of the repaired file is made again"
    assert run(source, tmp_path / "out", max_rejected=0.05)["samples"] == 19


def test_a_hopeless_source_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.builder.corpus_build, "_EARLY", 8)
    source = put_lines(tmp_path / "mine.jsonl", [{"audio": "absent.wav", "text": "a", "id": str(n)} for n in range(40)])
    with pytest.raises(DataError, match="8 of 8 utterances are bad"):
        run(source, tmp_path / "out", max_rejected=0.2)
    with pytest.raises(DataError, match="Not one utterance could be used"):
        run(source, tmp_path / "out", max_rejected=1.0)


def test_a_shard_without_a_sample_is_left_out(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", encoded(clip(1)))
    rows = [{"audio": "a.wav" if n < 4 or n > 7 else "b.wav", "text": "a", "id": str(n)} for n in range(12)]
    described = run(put_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    assert [shard["name"] for shard in described["shards"]] == ["shard-000000.tar", "shard-000001.tar"]
    assert list(read(tmp_path / "out")) == ["0", "1", "2", "3", "8", "9", "10", "11"]


def test_a_second_build_of_the_folder_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = shards.builder.corpus_build.convert, []

    def convert(*args: Any) -> Any:
        with pytest.raises(EchoXError, match="Another build is at work there"):
            run(source, tmp_path / "out", replace=True)
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(shards.builder.corpus_build, "convert", convert)
    run(source, tmp_path / "out")
    assert len(seen) == 5


def test_a_full_disk_and_a_share_that_is_away_are_one_sentence_and_cost_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards.builder.convert, "write_json", full)
        with pytest.raises(EchoXError, match="Cannot write a shard: No space left on device"):
            run(source, tmp_path / "out")

    def stale(path: Path, most: int) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(shards.corpus, "read_regular", stale)
        with pytest.raises(EchoXError, match=r"Cannot read audio: Stale file handle .*0\.wav"):
            run(source, tmp_path / "out")
    assert run(source, tmp_path / "out")["samples"] == 18


def test_a_worker_that_dies_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.wav", encoded(clip(1)))
    source = put_lines(tmp_path / "mine.jsonl", [{"audio": "a.wav", "text": "a"}])
    monkeypatch.setattr(shards.builder.corpus_build, "convert", die)
    with pytest.raises(EchoXError, match="A worker process died.*fewer --workers"):
        run(source, tmp_path / "out", workers=2)


def put_dialogues(folder: Path, parts: int = 3) -> None:
    """Archives of five dialogues each; of the third archive, the sound of one is no sound."""
    for part in range(parts):
        names = ["0.wav"] * 4 + ["1.wav" if part == 2 else "0.wav"]
        spoken = [[{"from": "user", "value": "q", "audio": name}, {"from": "gpt", "value": "a"}] for name in names]
        rows = [{"conversations": turns} for turns in spoken]
        put_archive(folder / f"{part}.tar.gz", rows, {"0.wav": encoded(clip(part)), "1.wav": b"noise"})


def build_dialogues(source: Path, out: Path) -> None:
    build_corpus(CORPORA["sharechatx"], source, out, Request(task="sqa"), settings())


def test_archives_killed_in_the_middle_end_in_the_same_bytes_and_are_named_in_the_ledger(tmp_path: Path) -> None:
    put_dialogues(tmp_path / "ShareChatX")
    out = tmp_path / "out"
    build_dialogues(tmp_path, tmp_path / "whole")
    killed(partial(build_dialogues, tmp_path, out), "shards.builder.corpus_build", "convert", 3)
    killed(partial(build_dialogues, tmp_path, out), "shards.builder.publish", "add_shard", 1)
    (row,) = map(json.loads, (tmp_path / "whole" / "rejected.jsonl").open())
    assert row["id"] == "2-000004" and row["files"] == [str(tmp_path / "ShareChatX" / "2.tar.gz")]
    build_dialogues(tmp_path, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_members_of_a_decompressed_archive_are_cleared_away(tmp_path: Path) -> None:
    whole: dict[str, int] = {}
    put_dialogues(tmp_path / "ShareChatX", parts=6)
    request, scratch = Request(task="sqa"), tmp_path / ".out.building" / "scratch"
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        whole[line] = len(list(scratch.glob("*.tar")))

    build_corpus(CORPORA["sharechatx"], tmp_path, tmp_path / "out", request, settings(), say)
    assert lines[:6] == [f"decompressing {part}.tar.gz" for part in range(6)] and len(read(tmp_path / "out")) == 29
    assert whole["decompressing 5.tar.gz"] <= 2 and not scratch.exists()


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("shards.builder.progress.time.monotonic", lambda: now[0])
    lines: list[str] = []
    meter = Meter("corpus", lambda: iter([Utterance(id="a", task="asr", source="s")] * 4000), lines.append)
    meter.counting.join()
    record = {"rejected": [1], "question_s": 1800.0, "answer_s": 0.0}
    meter.add(record, 1000, kept=True)
    now[0] += 5
    meter.add(record, 1000, kept=False)
    assert lines == ["corpus: 2,000 of 4,000 utterances, 1.00 h, 200.0/s, 10 s left, 2 rejected"]
    assert (meter.seen, meter.rejected) == (2000, 2)
