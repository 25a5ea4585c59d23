"""Lists of recordings in the formats of others: what they mean is what comes out, and what cannot be used is named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from echox.errors import DataError
from shards.corpora.formats.registry import recognised
from tests.shards.layouts import RATE, build, clip, encoded, pitch, put, put_lines

LEFT, RIGHT = 2, 30
"""Seeds of tones: 240 and 800 Hz."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stereo recording of three seconds, a tone in each channel, and three short ones."""
    stereo = np.stack([clip(LEFT, 3.0), clip(RIGHT, 3.0)], axis=1)
    put(tmp_path / "in" / "stereo.wav", encoded(stereo))
    for number in range(3):
        put(tmp_path / "in" / "clips" / f"{number}.wav", encoded(clip(number)))
    return tmp_path / "in"


def made(source: Path, name: str, task: str = "", **more: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Samples by id and what was rejected; the format has to be the one that is meant."""
    found = recognised(source)
    assert found is not None and found.name == name
    samples, rejected = build("manifest", source, source.parent / f"out-{source.name}", task=task, **more)
    return samples, rejected


def short(number: int) -> np.ndarray:
    return clip(number)


def tone(sample: dict[str, Any], member: str = "question.flac") -> tuple[int, float]:
    """Loudest frequency and seconds."""
    return round(pitch(sample[member]), -1), len(sample[member]) / RATE


def test_kaldi_folder_with_segments_speakers_and_channels(folder: Path) -> None:
    put(folder / "wav.scp", "call-A stereo.wav\ncall-B stereo.wav\npiped sph2pipe -f wav x.sph |\nark foo.ark:17\n")
    put(folder / "reco2file_and_channel", "call-A call A\ncall-B call B\n")
    put(
        folder / "segments",
        "u1 call-A 0.5 1.5\nu2 call-B 1.0 -1\nu3 piped 0 1\nu4 ark 0 1\nu5 call-A 2 1\nu6 gone 0 1\n",
    )
    put(folder / "text", "u1 hello there\nu2 BONJOUR\nu3 x\nu4 x\n")
    put(folder / "utt2spk", "u1 anna\nu2 bo\n")
    samples, rejected = made(folder, "Kaldi folder")
    assert tone(samples["u1"]) == (240, 1.0) and tone(samples["u2"]) == (800, 2.0)
    assert samples["u1"]["json"]["question_text"] == "hello there"
    assert samples["u2"]["json"]["fields"]["speaker"] == "bo"
    assert rejected == {
        "line 3 of segments": "the output of a command, which is not run (sph2pipe -f wav x.sph |); "
        "write it to a file first",
        "line 4 of segments": "a place within an archive (foo.ark:17); copy it out first, as by wav-copy",
        "line 5 of segments": "from 2 to 1 s",
        "line 6 of segments": "wav.scp has no sound of gone",
    }


def test_kaldi_folder_without_segments(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    put(data / "wav.scp", "b in/clips/1.wav\na in/clips/0.wav\n")
    put(data / "text", "a first\nb second\n")
    samples, rejected = made(data, "Kaldi folder", audio_root=tmp_path)
    assert list(samples) == ["b", "a"] and not rejected
    np.testing.assert_array_equal(samples["a"]["question.flac"], short(0))


def lhotse(folder: Path) -> Path:
    """Cuts as lhotse 1.33 writes them."""
    recording = {
        "id": "st",
        "sources": [{"type": "file", "channels": [0, 1], "source": str(folder / "stereo.wav")}],
        "sampling_rate": 16000,
        "num_samples": 48000,
        "duration": 3.0,
        "channel_ids": [0, 1],
    }
    apart = {**recording, "sources": [
        {"type": "file", "channels": [0], "source": str(folder / "clips/0.wav")},
        {"type": "file", "channels": [1], "source": str(folder / "clips/1.wav")},
    ]}  # fmt: skip

    def said(name: str, start: float, seconds: float, channel: int, **more: Any) -> dict[str, Any]:
        return {"id": name, "recording_id": "st", "start": start, "duration": seconds, "channel": channel, **more}

    def cut(name: str, supervisions: list[Any], start: float = 0.0, channel: int = 0, **more: Any) -> dict[str, Any]:
        return {"id": name, "start": start, "duration": 3.0 - start, "channel": channel,
                "supervisions": supervisions, "recording": recording, "type": "MonoCut", **more}  # fmt: skip

    mono = cut("c1", [said("s1", 0.1, 0.4, 1, text="one", language="en", speaker="bo")], 0.5, 1)
    talk = [
        said("q1", 0.0, 0.5, 0, text="who?", speaker="user"),
        said("a1", 0.6, 0.5, 0, text="me.", speaker="agent"),
        said("q2", 1.2, 0.4, 0, text="why?", speaker="user"),
        said("a2", 1.8, 0.7, 0, text="so.", speaker="agent"),
    ]
    lines = [
        mono,
        cut("c2", talk, custom={"target_audio": {**recording, "channel_ids": [1]}}),
        cut("c3", [said("s3", 0.0, 0.3, 1, text="apart")], channel=1, recording=apart),
        {"id": "m", "tracks": [{"cut": mono, "type": "MonoCut", "offset": 0.0}], "type": "MixedCut"},
        cut("c4", [said("s4", 0, 1, 0)], recording={**recording, "transforms": [{"name": "Speed"}]}),
        cut("c5", [said("s5", 0, 1, 0)], recording={**recording, "sources": [{"type": "command", "source": "ls"}]}),
        cut("c6", [{"start": 0, "duration": 1}]),
    ]
    place = folder / "cuts.jsonl.gz"
    place.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return place


def test_lhotse_cuts_and_dialogues(folder: Path) -> None:
    samples, rejected = made(lhotse(folder), "Lhotse cuts", answers=True)
    assert tone(samples["s1"]) == (800, 0.4) and samples["s1"]["json"]["fields"]["speaker"] == "bo"
    np.testing.assert_array_equal(samples["s3"]["question.flac"], short(1))
    second = samples["a2"]
    assert second["json"]["task"] == "sqa" and second["json"]["answer_text"] == "so."
    assert second["json"]["turns"] == [{"role": "user", "text": "who?"}, {"role": "assistant", "text": "me."}]
    assert tone(second) == (240, 0.4) and tone(second, "answer.flac") == (240, 0.7)
    assert list(rejected.values()) == [
        "a MixedCut, which is computed from others; save it with its audio first",
        "its recording is to be changed (transforms); save it with its audio first",
        "sound of the type 'command' is not fetched; save it to a file first",
        "it has no 'id'",
    ]


def test_a_span_counts_from_its_cut(folder: Path) -> None:
    """A tone that changes at 1.5 s: the cut begins at 1.0 s, the words 0.5 s later."""
    put(folder / "stereo.wav", encoded(np.stack([np.concatenate([clip(LEFT, 1.5), clip(RIGHT, 1.5)])] * 2, axis=1)))
    place = lhotse(folder)
    lines = [json.loads(line) for line in gzip.decompress(place.read_bytes()).splitlines()][:1]
    lines[0] |= {"start": 1.0}
    lines[0]["supervisions"][0]["start"] = 0.5
    samples, _ = made(put_lines(folder / "one.jsonl", lines), "Lhotse cuts")
    np.testing.assert_array_equal(samples["s1"]["question.flac"], clip(RIGHT, 1.5)[: round(0.4 * RATE)])


def test_audiofolder_in_three_files_and_its_splits(folder: Path) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "transcription"), ("clips/0.wav", 'she said "no", twice')])
    put(folder / "test" / "1.wav", encoded(clip(1)))
    put_lines(folder / "test" / "metadata.jsonl", [{"file_name": "1.wav", "text": "one", "speaker_id": "x"}])
    put(folder / "train" / "2.wav", encoded(clip(2)))
    table = pyarrow.table({"file_name": ["2.wav"], "question": ["two?"], "answer": ["2."]})
    pyarrow.parquet.write_table(table, folder / "train" / "metadata.parquet")
    samples, rejected = made(folder, "audiofolder of Hugging Face")
    assert not rejected
    by_text = {sample["json"]["question_text"]: sample for sample in samples.values()}
    assert set(by_text) == {'she said "no", twice', "one", "two?"}
    np.testing.assert_array_equal(by_text["one"]["question.flac"], short(1))
    assert by_text["one"]["json"]["split"] == "test" and by_text["one"]["json"]["fields"] == {"speaker": "x"}
    assert by_text["two?"]["json"]["task"] == "sqa" and by_text["two?"]["json"]["answer_text"] == "2."


def test_parquet_with_sounds_within(folder: Path) -> None:
    def sounds(*numbers: int) -> list[Any]:
        return [{"bytes": encoded(clip(number)), "path": f"{number}.wav"} for number in numbers]

    rows = {"question": ["a", "b"], "question_audio": sounds(0, 1), "answer": ["A", "B"], "answer_audio": sounds(2, 0)}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "train-00000-of-00001.parquet")
    samples, _ = made(folder, "parquet of Hugging Face", answers=True)
    first, second = samples.values()
    assert (second["json"]["question_text"], second["json"]["answer_text"]) == ("b", "B")
    np.testing.assert_array_equal(second["question.flac"], short(1))
    np.testing.assert_array_equal(first["answer.flac"], short(2))
    assert first["json"]["split"] == "train"


def test_common_voice(folder: Path) -> None:
    names = ["client_id", "path", "sentence", "up_votes", "gender", "locale"]
    for split, number, said in (("train", 0, '"Nein, sagte er.'), ("dev", 1, "Zwei")):
        cells = ["\t".join(names), "\t".join(["who", f"{number}.wav", said, "2", "", "de"])]
        put(folder / f"{split}.tsv", "\n".join(cells) + "\n")
    put(folder / "dev.tsv", (folder / "dev.tsv").read_text() + "a\tb\n")
    samples, rejected = made(folder, "Common Voice")
    assert [sample["json"]["question_text"] for sample in samples.values()] == ['"Nein, sagte er.', "Zwei"]
    assert samples["clips/1"]["json"]["split"] == "dev"
    assert samples["clips/1"]["json"]["fields"] == {"locale": "de", "speaker": "who"}
    assert rejected == {"line 3 of dev.tsv": "2 cells under 6 names"}
    one, _ = made(folder / "train.tsv", "Common Voice")
    assert list(one) == ["clips/0"]


def chat(*messages: tuple[str, str], names: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    return [dict(zip(names, message, strict=True)) for message in messages]


def test_chats_of_ms_swift_and_llama_factory(folder: Path) -> None:
    first = chat(("system", "Be brief."), ("user", "<audio>"), ("assistant", "One."), ("user", "<audio>"),
                 ("assistant", "Two."))  # fmt: skip
    second = chat(("human", "<audio>"), ("gpt", "Three."), names=("from", "value"))
    beside = chat(("user", "<audio>What is said?"), ("assistant", "x"))
    rows = [
        {"id": "a", "messages": first, "audios": ["clips/0.wav", "clips/1.wav"], "question_text": "said"},
        {"id": "b", "conversations": second, "audios": ["clips/2.wav"], "question_text": "said"},
        {"id": "c", "messages": beside, "audios": ["clips/2.wav"]},
        {"id": "d", "messages": chat(("user", "<audio>"), ("assistant", "x")), "audios": []},
        {"id": "e", "messages": chat(("user", "hello"), ("assistant", "x"))},
    ]
    wanted = {
        "c": "text beside the sound, which nobody says: 'What is said?'",
        "d": "more placeholders than sounds",
        "e": "no answer to anything spoken",
    }
    lines, array = put_lines(folder / "swift.jsonl", rows), put(folder / "factory.json", json.dumps(rows, indent=2))
    for place, word in ((lines, "line"), (array, "entry")):
        samples, rejected = made(place, "list of chats")
        assert list(samples) == ["a", "a-1", "b"]
        np.testing.assert_array_equal(samples["a-1"]["question.flac"], short(1))
        assert samples["a-1"]["json"]["answer_text"] == "Two."
        assert samples["a-1"]["json"]["turns"][0] == {"role": "system", "text": "Be brief."}
        assert samples["a-1"]["json"]["turns"][-1] == {"role": "assistant", "text": "One."}
        assert rejected == {f"{word} {n} of {place.name}": wanted[key] for n, key in ((3, "c"), (4, "d"), (5, "e"))}


def test_speech_lists_of_llama_omni_and_vocalnet(folder: Path) -> None:
    said = chat(("human", "<speech>\nPlease directly answer the questions in the user's speech."), ("gpt", "Paris."),
                names=("from", "value"))  # fmt: skip
    rows = [{"id": "s1", "speech": "clips/1.wav", "conversations": said, "units": "u.npy", "transcript": "capital?"}]
    samples, rejected = made(put(folder / "list.json", json.dumps(rows)), "list of chats")
    assert not rejected and samples["s1"]["json"]["answer_text"] == "Paris."
    assert samples["s1"]["json"]["question_text"] == "capital?" and samples["s1"]["json"]["turns"] == []
    np.testing.assert_array_equal(samples["s1"]["question.flac"], short(1))


def test_moshi_lists_give_the_assistants_turns_from_the_left(folder: Path) -> None:
    put_lines(folder / "moshi.jsonl", [{"path": f"{name}.wav", "duration": 3.0} for name in ("stereo", "clips/0")])
    words = [["Hello", [0.2, 0.5], "SPEAKER_MAIN"], ["you", [0.6, 0.8], "SPEAKER_MAIN"], ["no", [1.0, 1.1], "OTHER"],
             ["Bye", [2.0, 2.4], "SPEAKER_MAIN"]]  # fmt: skip
    put(folder / "stereo.json", json.dumps({"alignments": words}))
    samples, rejected = made(folder / "moshi.jsonl", "list of moshi")
    first, second = samples.values()
    assert first["json"]["task"] == "tts" and first["json"]["answer_text"] == "Hello you"
    assert tone(first, "answer.flac") == (240, 0.8) and second["json"]["answer_text"] == "Bye"
    assert tone(second, "answer.flac")[1] == pytest.approx(0.6)
    assert list(rejected.values()) == ["no times of its words: 0.json is not there"]


def test_subtitles_cut_a_recording_longer_than_any_sample(folder: Path, tmp_path: Path) -> None:
    """Forty minutes, a tone that differs in the last of them."""
    quiet = np.zeros(39 * 60 * RATE, np.int16)
    put(tmp_path / "talk" / "long.flac", encoded(np.concatenate([quiet, clip(RIGHT, 60.0)]), kind="FLAC"))
    put(tmp_path / "talk" / "long.srt", "1\n00:39:10,000 --> 00:39:11,500\n<i>Here</i> it\nis.\n\n"
        "2\n00:39:20,000 --> 00:39:21,000\n[music]\n\n")  # fmt: skip
    put(tmp_path / "talk" / "alone.vtt", "WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n")
    samples, rejected = made(tmp_path / "talk", "subtitles")
    (found,) = samples.values()
    assert found["json"]["question_text"] == "Here it is."
    np.testing.assert_array_equal(found["question.flac"], clip(RIGHT, 60.0)[10 * RATE : round(11.5 * RATE)])
    assert rejected == {
        "alone.vtt": "no recording of its name beside it",
        "caption 2 of long.srt": "a caption in which nobody says anything",
    }


def test_a_part_of_another_rate_is_that_of_the_whole(folder: Path) -> None:
    """Cutting before and after the change of rate give the same samples, and so do formats that cannot be sought in."""
    sound = clip(LEFT, 3.0, rate=44_100)
    put(folder / "a.wav", encoded(sound, rate=44_100))
    put(folder / "b.ogg", encoded(sound, rate=44_100, kind="OGG"))
    rows = [{"audio": name, "text": "x", "offset": 0.75, "duration": 1.0, "id": name} for name in ("a.wav", "b.ogg")]
    rows.append({"audio": "a.wav", "text": "x", "id": "whole"})
    samples, _ = build("manifest", put_lines(folder / "m.jsonl", rows), folder.parent / "out", task="")
    part, whole = samples["a.wav"]["question.flac"], samples["whole"]["question.flac"]
    assert len(part) == RATE == len(samples["b.ogg"]["question.flac"])
    assert np.abs(part.astype(int) - whole[12_000:28_000]).max() <= 2
    assert tone(samples["b.ogg"])[0] == 240


def test_a_channel_that_is_not_there_is_named(folder: Path) -> None:
    rows = [{"audio": "stereo.wav", "text": "x", "channel": channel} for channel in (1, 2, "left")]
    samples, rejected = build("manifest", put_lines(folder / "m.jsonl", rows), folder.parent / "out", task="")
    first, second = rejected.values()
    assert [tone(sample) for sample in samples.values()] == [(800, 3.0)]
    assert "has no channel 2, but 2" in first and second == "channel is 'left', not the number of a channel, from 0"


def test_a_zipped_list_that_is_cut_short_is_no_shorter_list(folder: Path) -> None:
    place = lhotse(folder)
    place.write_bytes(place.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or cut short"):
        build("manifest", place, folder.parent / "out", task="")


def test_a_folder_of_recordings_with_texts_beside_some(tmp_path: Path) -> None:
    """Six kinds, three that are broken, and what is hidden."""
    kinds = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3", "aiff": "AIFF", "au": "AU"}
    folder = tmp_path / "voice"
    for number, (suffix, kind) in enumerate(kinds.items()):
        put(folder / suffix / f"{number}.{suffix}", encoded(clip(number, 1.0), kind=kind))
        put(folder / suffix / f"{number}.{'lab' if number % 2 else 'txt'}", f" said {number}\n")
    put(folder / "cut.wav", encoded(clip(1))[:1000])
    put(folder / "cut.txt", "x")
    put(folder / "none.mp3", b"")
    put(folder / "none.txt", "x")
    put(folder / "text.flac", b"hello there")
    put(folder / ".trash" / "old.wav", encoded(clip(1)))
    put(folder / "silent.wav", encoded(clip(2)))
    samples, rejected = made(folder, "folder of recordings", task="tts")
    assert [samples[f"{suffix}/{n}.{suffix}"]["json"]["answer_text"] for n, suffix in enumerate(kinds)] == [
        f"said {number}" for number in range(6)
    ]
    assert all(tone(sample, "answer.flac")[0] == 200 + 20 * n for n, sample in enumerate(
        samples[f"{suffix}/{n}.{suffix}"] for n, suffix in enumerate(kinds)))  # fmt: skip
    assert set(rejected) == {"cut.wav", "none.mp3", "text.flac", "silent.wav"}
    assert rejected["silent.wav"] == "no answer text", "nobody has written it down"


def festvox(folder: Path, lines: str) -> Path:
    """A voice as festvox lays it out: labels and features lie beside the recordings, and say nothing of the words."""
    put(folder / "etc" / "txt.done.data", lines)
    put(folder / "lab" / "ru_0001.lab", "#\n0.34 125 pau\n0.39 125 k\n")
    for number in range(1, 5):
        put(folder / "wav" / f"ru_{number:04d}.wav", encoded(clip(number)))
    return folder


def test_festvox_voice_reads_its_list_and_not_its_labels(tmp_path: Path) -> None:
    lines = (
        '( ru_0001 "Она завела, прядь волнистых волос за ухо." )\n'
        "; a comment\n\n"
        '(ru_0002 "Он сказал: \\"да\\", и ушёл (домой)." )\r\n'
        '( ru_0003 "Без конца )\n'
        "ru_0004 Без скобок\n"
        '( ru_0005 "Нет записи." )\n'
        '( ../ru_0004 "Снаружи." )\n'
    )
    samples, rejected = made(festvox(tmp_path / "voice", lines), "festvox voice", task="tts")
    assert {name: sample["json"]["answer_text"] for name, sample in samples.items()} == {
        "ru_0001": "Она завела, прядь волнистых волос за ухо.",
        "ru_0002": 'Он сказал: "да", и ушёл (домой).',
    }
    assert tone(samples["ru_0001"], "answer.flac") == (220, 0.3)
    assert tone(samples["ru_0002"], "answer.flac") == (240, 0.3)
    broken = 'not ( name "what was said" )'
    assert rejected["line 5 of txt.done.data"] == rejected["line 6 of txt.done.data"] == broken
    assert len(rejected) == 4 and "../ru_0004" in rejected


def test_the_list_of_a_festvox_voice_alone_is_refused_with_the_folder_to_name(tmp_path: Path) -> None:
    place = festvox(tmp_path / "voice", '( ru_0001 "Да." )\n') / "etc" / "txt.done.data"
    with pytest.raises(DataError, match="name the folder that has etc and wav in it"):
        build("manifest", place, tmp_path / "out", task="tts")


def test_ljspeech_takes_what_is_said_and_is_no_audiofolder(tmp_path: Path) -> None:
    lines = (
        'LJ001-0001|Printing, in 1455|Printing, in fourteen "fifty-five"\nLJ001-0002|only written|\nx|two|three|four\n'
    )
    put(tmp_path / "lj" / "metadata.csv", lines + "LJ001-0003.wav|with its ending\nalone\n")
    for number in range(1, 4):
        put(tmp_path / "lj" / "wavs" / f"LJ001-{number:04d}.wav", encoded(clip(number)))
    samples, rejected = made(tmp_path / "lj", "LJSpeech", task="tts")
    assert [sample["json"]["answer_text"] for sample in samples.values()] == [
        'Printing, in fourteen "fifty-five"', "only written", "with its ending"]  # fmt: skip
    assert tone(samples["LJ001-0003"], "answer.flac") == (260, 0.3)
    assert list(rejected) == ["line 3 of metadata.csv", "line 5 of metadata.csv"]
    put(tmp_path / "lj" / "metadata.csv", "file_name,transcription\nwavs/LJ001-0001.wav,a | b\n")
    samples, _ = made(tmp_path / "lj", "audiofolder of Hugging Face", task="tts", replace=True)
    assert [sample["json"]["answer_text"] for sample in samples.values()] == ["a | b"]


def test_captions_leave_out_what_nobody_says_in_any_brackets(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "talk" / "0.wav", (folder / "clips" / "0.wav").read_bytes())
    put(tmp_path / "talk" / "0.srt", "1\n00:00:00,000 --> 00:00:00,200\n（笑い）そうです【音楽】［拍手］ね\n")
    samples, _ = made(tmp_path / "talk", "subtitles")
    assert [sample["json"]["question_text"] for sample in samples.values()] == ["そうです ね"]


def test_a_folder_in_no_format_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.doc", encoded(clip(1)))
    with pytest.raises(DataError, match="Cannot find manifest"):
        build("manifest", tmp_path / "in", tmp_path / "out", task="")


def test_a_build_says_what_it_read_and_counts_what_it_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from echox.cli import main

    place, out = lhotse(folder), folder.parent / "out"
    source = ("--source", str(place), "--out", str(out), "--workers", "1", "--max-rejected", "1")
    assert main(["shards", "build", "manifest", *source]) == 0
    said = capsys.readouterr().err
    assert f"{place}: read as Lhotse cuts" in said
    assert (
        "4 utterances rejected (1 a MixedCut, which is computed from others; save it with its audio first; 1 " in said
    )
