"""Every recipe on a tiny copy of its corpus, laid out as its owners publish it, read back by plain webdataset."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from echox.errors import DataError
from shards.corpora.registry import CORPORA
from shards.corpora.speech_instruct import parse
from shards.corpus import Request
from tests.shards.layouts import build, clip, encoded, pitch, put, put_archive, put_lines

# As the owners of SpeechInstruct print it, with fewer units.
CHAIN = (
    "[Human]: <sosp><661><987><511><eosp><eoh>. [SpeechGPT]: What is a bad term for fog?; "
    "[ta] A bad term for fog; it is murk.; [ua] <sosp><497><63><999><eosp><eoa>."
)
SPEAK = (
    "[Human]: Try to speak out this sentence, please. This is input: The alchemist rode in front.<eoh> "
    "[SpeechGPT]: <sosp><661><588><604><eosp><eoa> "
)
HEAR = "[Human]: Write this down. This is input: <sosp><1><2><eosp><eoh> [SpeechGPT]: He rode in front.<eoa>"


def test_librispeech(tmp_path: Path) -> None:
    source = tmp_path / "LibriSpeech"
    put(source / "SPEAKERS.TXT", "; not a transcript\n")
    for part, speaker in (("train-clean-100", "19"), ("train-other-500", "7"), ("dev-clean", "84")):
        folder = source / part / speaker / "198"
        lines = []
        for number in (0, 1):
            name = f"{speaker}-198-{number:04d}"
            put(folder / f"{name}.flac", encoded(clip(number + int(speaker)), kind="FLAC"))
            lines.append(f"{name} NORTHANGER ABBEY {number}\n")
        put(folder / f"{speaker}-198.trans.txt", "".join(lines))
    samples, rejected = build("librispeech", source, tmp_path / "train")
    assert list(samples) == ["19-198-0000", "19-198-0001", "7-198-0000", "7-198-0001"] and not rejected
    meta = samples["19-198-0001"]["json"]
    assert meta["question_text"] == meta["answer_text"] == "northanger abbey 1"
    assert (meta["task"], meta["source"], meta["speaker"]) == ("asr", "librispeech", "19")
    assert (meta["split"], meta["turns"], meta["answer_s"]) == ("train-clean-100", [], None)
    np.testing.assert_array_equal(samples["19-198-0001"]["question.flac"], clip(20))
    assert samples["19-198-0001"]["__key__"] == "19-198-0001"
    assert list(build("librispeech", source, tmp_path / "dev", split="dev")[0]) == ["84-198-0000", "84-198-0001"]
    clean = build("librispeech", source, tmp_path / "one", split="train-clean-100")[0]
    assert list(clean) == ["19-198-0000", "19-198-0001"]
    inner = build("librispeech", source / "train-clean-100", tmp_path / "inner")[0]
    assert list(inner) == list(clean)


def put_parquet(path: Path, columns: dict[str, list[Any]], sounds: list[bytes | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = [{"bytes": sound, "path": f"{number}_8_000{number}.flac"} for number, sound in enumerate(sounds)]
    pyarrow.parquet.write_table(pyarrow.table({**columns, "audio": audio}), path, row_group_size=2)


def test_librispeech_in_parquet(tmp_path: Path) -> None:
    for file, first in (("clean/train.100/0000.parquet", 0), ("clean/test/0000.parquet", 50)):
        names = [f"9-8-{number:04d}" for number in range(first, first + 5)]
        sounds: list[bytes | None] = [encoded(clip(first + number), kind="FLAC") for number in range(5)]
        sounds[3] = None
        put_parquet(tmp_path / "hf" / file, {"id": names, "text": ["A B"] * 5, "speaker_id": [9] * 5}, sounds)
    samples, rejected = build("librispeech", tmp_path / "hf", tmp_path / "out")
    assert list(samples) == ["9-8-0000", "9-8-0001", "9-8-0002", "9-8-0004"]
    assert rejected == {"9-8-0003": "question: row 1 of row group 1 of 0000.parquet has no audio bytes"}
    for number in (0, 1, 2, 4):
        np.testing.assert_array_equal(samples[f"9-8-000{number}"]["question.flac"], clip(number))
    assert samples["9-8-0004"]["json"]["question_text"] == "a b"
    assert samples["9-8-0004"]["json"]["split"] == "train.100"


@pytest.mark.parametrize(("folder", "suffix"), [("mls_german", ".flac"), ("mls_german_opus", ".opus")])
def test_mls(tmp_path: Path, folder: str, suffix: str) -> None:
    for split in ("train", "dev"):
        names = [f"{speaker}_42_{number:06d}" for speaker in (10, 9) for number in range(2)]
        put(tmp_path / folder / split / "transcripts.txt", "".join(f"{name}\tgrüße {name}\n" for name in names))
        put(tmp_path / folder / split / "segments.txt", "not read\n")
        for number, name in enumerate(names):
            kind = ("FLAC", None) if suffix == ".flac" else ("OGG", "OPUS")
            sound = encoded(clip(number, 0.5), kind=kind[0], subtype=kind[1])
            put(tmp_path / folder / split / "audio" / name.partition("_")[0] / "42" / f"{name}{suffix}", sound)
    samples, rejected = build("mls", tmp_path / folder, tmp_path / "out", split="dev")
    assert list(samples) == names and not rejected
    for number, name in enumerate(names):
        meta = samples[name]["json"]
        assert (meta["question_text"], meta["language"], meta["split"]) == (f"grüße {name}", "german", "dev")
        assert meta["speaker"] == name.partition("_")[0]
        assert meta["question_s"] == pytest.approx(0.5, abs=0.01)
        assert pitch(samples[name]["question.flac"]) == pytest.approx(200 + 20 * number, abs=3)


def test_mls_in_parquet_takes_its_ids_from_the_files_where_there_is_no_column(tmp_path: Path) -> None:
    sounds: list[bytes | None] = [encoded(clip(number), kind="FLAC") for number in range(3)]
    columns = {"transcript": ["x", "y", "z"], "speaker_id": ["1"] * 3, "audio_duration": [0.3] * 3}
    put_parquet(tmp_path / "mls_eng" / "data" / "train-00000-of-01416.parquet", columns, sounds)
    put_parquet(tmp_path / "mls_eng" / "data" / "dev-00000-of-00001.parquet", columns, sounds)
    samples, _ = build("mls", tmp_path / "mls_eng", tmp_path / "out")
    assert list(samples) == ["0_8_0000", "1_8_0001", "2_8_0002"]
    assert samples["2_8_0002"]["json"]["question_text"] == "z"
    np.testing.assert_array_equal(samples["2_8_0002"]["question.flac"], clip(2))


def spoken(question: str, answer: str, sound: str | None, reply: str | None = None, **more: Any) -> dict[str, Any]:
    """One exchange as EchoX-Dialogues writes it."""
    asked = {"from": "human", "value": question, **({"audio": sound} if sound else {}), **more}
    replied = {"from": "gpt", "value": answer, **({"audio": reply} if reply else {})}
    return {"conversations": [asked, replied]}


def test_audioqa_of_echox(tmp_path: Path) -> None:
    for part in (0, 1):
        sounds = {f"wavs/{part}_{n}_{side}.wav": encoded(clip(10 * part + n)) for n in (0, 1) for side in "qa"}
        rows = [spoken(f"q{n}", f"a{n}", f"wavs/{part}_{n}_q.wav", f"wavs/{part}_{n}_a.wav") for n in (0, 1)]
        put_archive(tmp_path / "Plus" / "S2S-QA" / "AudioQA" / f"part{part}.tar.gz", rows, sounds)
    put_archive(tmp_path / "Plus" / "S2T-QA" / "Other" / "part0.tar.gz", [spoken("no", "no", None, "x.wav")], {})
    samples, rejected = build("audioqa", tmp_path / "Plus", tmp_path / "tts")
    assert list(samples) == ["part0-000000", "part0-000001", "part1-000000", "part1-000001"] and not rejected
    meta = samples["part1-000001"]["json"]
    assert (meta["task"], meta["answer_text"], meta["question_text"], meta["question_s"]) == ("tts", "a1", "q1", None)
    np.testing.assert_array_equal(samples["part1-000001"]["answer.flac"], clip(11))
    asked, _ = build("audioqa", tmp_path / "Plus" / "S2S-QA" / "AudioQA", tmp_path / "sqa", task="sqa")
    assert list(asked) == list(samples) and "answer.flac" not in asked["part0-000000"]
    np.testing.assert_array_equal(asked["part0-000001"]["question.flac"], clip(1))
    both, _ = build("audioqa", tmp_path / "Plus", tmp_path / "both", task="sqa", answers=True)
    assert {"question.flac", "answer.flac"} <= set(both["part0-000000"])


def test_audioqa_of_its_owners(tmp_path: Path) -> None:
    question = "QA_1450K_question_tar_16khz/question_shuf_part_6/wav/08_question.wav"
    answer = "QA_1450K_answer_part1_tar_16khz/answer_part1_shuf_part_3/wav/05_F10.wav"
    put(tmp_path / question, encoded(clip(1)))
    put(tmp_path / answer, encoded(clip(2)))
    conversation = [
        {"role": "system", "content": "You are an AI robot."},
        {"role": "user", "content": "能帮我写一首现代诗吗？", "wavpath": f"mnt/data/someone/{question}"},
        {
            "role": "assistant",
            "content": "松林里，爱情像薄雾。",
            "wavpath": f"/mnt/data/someone/{answer}",
            "speaker": "F10",
        },
    ]
    messages = [
        {"role": "user", "content": "<|audio|>"},
        {"role": "assistant", "content": "好的。\n<|audio|>"},
    ]
    audios = [f"datasets/VITA-MLLM/AudioQA-1M/{question}", f"datasets/VITA-MLLM/AudioQA-1M/{answer}"]
    rows = [{"conversations": conversation}, {"messages": messages, "audios": audios}]
    put(tmp_path / "train.json", json.dumps(rows, ensure_ascii=False))
    put(tmp_path / "eval.json", json.dumps([conversation]))
    samples, rejected = build("audioqa", tmp_path, tmp_path / "out")
    assert list(samples) == ["train-0000000", "train-0000001"] and not rejected
    assert samples["train-0000000"]["json"]["answer_text"] == "松林里，爱情像薄雾。"
    assert samples["train-0000000"]["json"]["turns"] == [{"role": "system", "text": "You are an AI robot."}]
    assert samples["train-0000001"]["json"]["answer_text"] == "好的。"
    for name in samples:
        np.testing.assert_array_equal(samples[name]["answer.flac"], clip(2))
    asked, rejected = build("audioqa", tmp_path, tmp_path / "sqa", task="sqa")
    assert list(asked) == ["train-0000000"] and rejected == {"train-0000001": "no transcript"}
    np.testing.assert_array_equal(asked["train-0000000"]["question.flac"], clip(1))
    held, _ = build("audioqa", tmp_path, tmp_path / "dev", split="dev")
    assert list(held) == ["eval-0000000"]


def test_speech_instruct(tmp_path: Path) -> None:
    lines = [CHAIN, SPEAK, HEAR, "[Human]: Hello<eoh> [SpeechGPT]: Hi<eoa>", CHAIN.replace("<497><63><999>", "")]
    rows = [{"prefix": "You are an AI assistant.", "plain_text": line} for line in lines]
    put_lines(tmp_path / "chain_of_modality_instruction.jsonl", rows)
    put_lines(tmp_path / "cross_modal_instruction.jsonl", rows[1:2])
    samples, rejected = build("speech-instruct", tmp_path, tmp_path / "out")
    name = "chain_of_modality_instruction-000000"
    assert list(samples) == [f"{name}0", f"{name}1", f"{name}2"]
    assert np.frombuffer(samples[f"{name}0"]["answer.units"], "<u2").tolist() == [497, 63, 999]
    meta = samples[f"{name}0"]["json"]
    assert meta["question_text"] == "What is a bad term for fog?"
    assert meta["answer_text"] == "A bad term for fog; it is murk."
    assert meta["units"] == "mhubert_base_vp_en_es_fr_it3_L11_km1000" and meta["task"] == "tts"
    assert samples[f"{name}1"]["json"]["answer_text"] == "The alchemist rode in front."
    assert np.frombuffer(samples[f"{name}2"]["answer.units"], "<u2").tolist() == [1, 2]
    assert samples[f"{name}2"]["json"]["answer_text"] == "He rode in front."
    assert rejected == {
        f"{name}3": "line 4 of chain_of_modality_instruction.jsonl: no text with its units",
        f"{name}4": "no spoken answer",
    }
    other, _ = build("speech-instruct", tmp_path / "cross_modal_instruction.jsonl", tmp_path / "cross")
    assert list(other) == ["cross_modal_instruction-0000000"]
    assert parse("[SpeechGPT]: [tq] Who?; [ta] Me.; [ua] <sosp> <1> <2> <eosp>") == ("Who?", "Me.", (1, 2))


def test_speech_instruct_of_echox(tmp_path: Path) -> None:
    put_archive(
        tmp_path / "SpeechInstruct" / "a.tar.gz", [spoken("q", "a", None, "a.wav")], {"a.wav": encoded(clip(3))}
    )
    samples, _ = build("speech-instruct", tmp_path, tmp_path / "out")
    np.testing.assert_array_equal(samples["a-000000"]["answer.flac"], clip(3))


def test_hh_rlhf_speech_speaks_what_was_chosen(tmp_path: Path) -> None:
    sounds = {f"{name}.wav": encoded(clip(number)) for number, name in enumerate(("a", "b", "bad"))}
    chosen = [
        {"from": "human", "value": "How?"},
        {"from": "gpt", "value": "So.", "audio": "a.wav"},
        {"from": "human", "value": "And then?"},
        {"from": "gpt", "value": "Thus.", "audio": "b.wav"},
    ]
    rejected_turns = [*chosen[:3], {"from": "gpt", "value": "Badly.", "audio": "bad.wav"}]
    rows = [{"id": "h.1", "chosen": chosen, "rejected": rejected_turns}, {"conversations": chosen[:1]}]
    put_archive(tmp_path / "S2S-QA" / "HH-RLHF-Speech" / "x.tgz", rows, sounds)
    samples, rejected = build("hh-rlhf-speech", tmp_path, tmp_path / "out")
    assert {name: sample["json"]["answer_text"] for name, sample in samples.items()} == {"h.1": "So.", "h.1-1": "Thus."}
    assert samples["h.1"]["__key__"] == "h_1"
    np.testing.assert_array_equal(samples["h.1-1"]["answer.flac"], clip(1))
    assert samples["h.1-1"]["json"]["turns"] == [{"role": "user", "text": "How?"}, {"role": "assistant", "text": "So."}]
    assert rejected == {"x-000001": "no spoken answer"}


def test_sharechatx_makes_a_sample_of_every_spoken_question(tmp_path: Path) -> None:
    turns = [
        {"from": "user", "value": "Hi.", "audio": "1.wav"},
        {"from": "assistant", "value": "Hello."},
        {"from": "user", "value": "", "asr": "How are you", "wer": 0.25, "audio": "2.wav"},
        {"from": "assistant", "value": "Fine."},
        {"from": "user", "value": "Written only."},
        {"from": "assistant", "value": "Yes."},
    ]
    rows = [
        {"conversations": turns},
        {"conversations": turns[4:]},
        {"other": 1},
        [1],
        {"conversations": [{"from": "x"}]},
    ]
    put_archive(tmp_path / "ShareChatX" / "s.tar", rows, {"1.wav": encoded(clip(1)), "2.wav": encoded(clip(2))})
    samples, rejected = build("sharechatx", tmp_path, tmp_path / "out")
    assert list(samples) == ["s-000000", "s-000000-1"]
    assert samples["s-000000"]["json"]["turns"] == []
    meta = samples["s-000000-1"]["json"]
    assert (meta["question_text"], meta["answer_text"], meta["question_wer"]) == ("How are you", "Fine.", 0.25)
    assert meta["turns"] == [{"role": "user", "text": "Hi."}, {"role": "assistant", "text": "Hello."}]
    np.testing.assert_array_equal(samples["s-000000-1"]["question.flac"], clip(2))
    assert rejected == {
        "s-000001": "no spoken question with an answer",
        "s-000002": "no list of turns among other",
        "s-000003": "no list of turns among no fields",
        "s-000004": "unknown role 'x'",
    }


def heard(data: bytes) -> np.ndarray:
    samples, _ = soundfile.read(io.BytesIO(data), dtype="int16")
    return np.asarray(samples)


def test_earlier_turns_keep_their_sound_where_it_is_wanted(tmp_path: Path) -> None:
    turns = [
        {"from": "user", "value": "Hi.", "audio": "1.wav"},
        {"from": "assistant", "value": "Hello.", "audio": "2.wav"},
        {"from": "user", "value": "Written only."},
        {"from": "assistant", "value": "Yes."},
        {"from": "user", "value": "So?", "audio": "3.wav"},
        {"from": "assistant", "value": "No.", "audio": "4.wav"},
    ]
    lost = [dict(turns[0], audio="none.wav"), turns[1], turns[4], turns[5]]
    sounds = {f"{number}.wav": encoded(clip(number)) for number in (1, 2, 3, 4)}
    put_archive(tmp_path / "ShareChatX" / "s.tar", [{"conversations": turns}, {"conversations": lost}], sounds)
    samples, rejected = build("sharechatx", tmp_path, tmp_path / "out", history=True)
    assert list(samples) == ["s-000000", "s-000000-1"]
    assert rejected == {name: f"{what}: s.tar has no member none.wav"
                        for name, what in (("s-000001", "question"), ("s-000001-1", "turn 0"))}  # fmt: skip
    first, second = samples.values()
    assert not any(name.startswith("turn-") for name in first)
    assert [name for name in second if name.startswith("turn-")] == ["turn-00.flac"]
    np.testing.assert_array_equal(heard(second["turn-00.flac"]), clip(1))
    said = second["json"]["turns"]
    assert said[0] == {"role": "user", "text": "Hi.", "audio": "turn-00.flac"} and len(said) == 4
    assert not any("audio" in turn for turn in said[1:]), "answers are read"
    plain, rejected = build("sharechatx", tmp_path, tmp_path / "plain")
    assert list(plain) == ["s-000000", "s-000000-1", "s-000001-1"] and list(rejected) == ["s-000001"]
    assert not any(name.startswith("turn-") for sample in plain.values() for name in sample)
    assert [turn.keys() for turn in plain["s-000000-1"]["json"]["turns"]] == [{"role", "text"}] * 4


def test_a_manifest_names_the_sounds_of_earlier_turns(tmp_path: Path) -> None:
    for number in (1, 2):
        put(tmp_path / f"{number}.wav", encoded(clip(number)))
    turns = [{"role": "system", "text": "s", "audio": "1.wav"}, {"role": "user", "text": "u", "audio": "1.wav"}]
    rows = [{"audio": "2.wav", "text": "q", "answer_text": "a", "turns": turns}]
    source = put_lines(tmp_path / "mine.jsonl", rows)
    samples, _ = build("manifest", source, tmp_path / "out", history=True)
    (sample,) = samples.values()
    assert [name for name in sample if name.startswith("turn-")] == ["turn-01.flac"]
    np.testing.assert_array_equal(heard(sample["turn-01.flac"]), clip(1))
    assert sample["json"]["turns"] == [
        {"role": "system", "text": "s"}, {"role": "user", "text": "u", "audio": "turn-01.flac"}]  # fmt: skip


def test_magpie_pro_speech(tmp_path: Path) -> None:
    sounds = {"./w/0.wav": encoded(clip(4, 0.5, 24_000), 24_000), "./w/1.wav": b"RIFF of nothing"}
    rows = [spoken("Q", "A", "w/0.wav"), spoken("Q", "A", "./w/1.wav"), spoken("Q", "A", "w/2.wav")]
    put_archive(tmp_path / "S2T-QA" / "Magpie-Pro-Speech+" / "m.tar.gz", rows, sounds)
    samples, rejected = build("magpie-pro-speech", tmp_path, tmp_path / "out")
    assert list(samples) == ["m-000000"]
    assert samples["m-000000"]["json"]["question_s"] == 0.5
    assert pitch(samples["m-000000"]["question.flac"]) == pytest.approx(280, abs=2)
    assert rejected["m-000001"].startswith("question: Cannot decode 15 bytes of audio")
    assert rejected["m-000002"] == "question: m.tar.gz has no member w/2.wav"


def test_archives_of_equal_names_in_different_folders_give_different_ids(tmp_path: Path) -> None:
    for folder in ("de", "en"):
        sounds = {"0.wav": encoded(clip(1))}
        put_archive(tmp_path / "Magpie-Pro-Speech+" / folder / "m.tar.gz", [spoken("Q", folder, "0.wav")], sounds)
    samples, _ = build("magpie-pro-speech", tmp_path, tmp_path / "out")
    assert {name: sample["json"]["answer_text"] for name, sample in samples.items()} == {
        "de-m-000000": "de",
        "en-m-000000": "en",
    }


def test_an_unpacked_archive_is_read_as_well(tmp_path: Path) -> None:
    put(tmp_path / "Magpie-Pro-Speech+" / "m" / "data.json", json.dumps([spoken("Q", "A", "w/0.wav")]))
    put(tmp_path / "Magpie-Pro-Speech+" / "m" / "w" / "0.wav", encoded(clip(5)))
    put_archive(tmp_path / "Magpie-Pro-Speech+" / "m.tar.gz", [spoken("Q", "A", "w/0.wav")], {})
    put_archive(tmp_path / "AudioQA" / "n.tar.gz", [spoken("Q", "A", "w/0.wav")], {})
    samples, _ = build("magpie-pro-speech", tmp_path, tmp_path / "out")
    assert list(samples) == ["m-000000"]
    np.testing.assert_array_equal(samples["m-000000"]["question.flac"], clip(5))


def test_manifest(tmp_path: Path) -> None:
    put(tmp_path / "calls" / "1.wav", encoded(clip(1)))
    put(tmp_path / "calls" / "2.mp3", encoded(clip(2, 1.0, 44_100), 44_100, "MP3"))
    put(tmp_path / "voice" / "3.flac", encoded(np.stack([clip(3), clip(3)], axis=1), kind="FLAC"))
    rows: list[Any] = [
        {"audio": "calls/1.wav", "text": " what is this "},
        {"audio": "calls/2.mp3", "text": "who", "answer_text": "Me.", "answer_audio": "voice/3.flac", "id": "q.2",
         "turns": [{"role": "user", "text": "before"}], "split": "dev"},
        {"answer_audio": "voice/3.flac", "answer_text": "An answer."},
        {"audio": "calls/1.wav", "txt": "misspelt"},
        ["no object"],
        {"audio": "calls/1.wav", "id": "no text"},
        {"text": "no audio"},
        {"audio": "calls/1.wav", "text": "a", "turns": ["x"]},
    ]  # fmt: skip
    source = put_lines(tmp_path / "mine.jsonl", rows)
    source.write_text(source.read_text() + "\n{broken\n")
    samples, rejected = build("manifest", source, tmp_path / "out")
    assert [(name, sample["json"]["task"]) for name, sample in samples.items()] == [
        ("calls/1", "asr"),
        ("q.2", "sqa"),
        ("voice/3", "tts"),
    ]
    assert [sample["__key__"] for sample in samples.values()] == ["calls_1", "q_2", "voice_3"]
    np.testing.assert_array_equal(samples["calls/1"]["question.flac"], clip(1))
    assert samples["calls/1"]["json"]["answer_text"] == samples["calls/1"]["json"]["question_text"] == "what is this"
    meta = samples["q.2"]["json"]
    assert (meta["split"], meta["source"], meta["turns"]) == ("dev", "mine", [{"role": "user", "text": "before"}])
    assert meta["question_s"] == pytest.approx(1.0, abs=0.06) and meta["answer_s"] == 0.3
    assert pitch(samples["q.2"]["question.flac"]) == pytest.approx(240, abs=2)
    np.testing.assert_array_equal(samples["voice/3"]["answer.flac"], clip(3))
    assert rejected == {
        "line 4 of mine.jsonl": "unknown field txt; did you mean text?",
        "line 5 of mine.jsonl": "not a JSON object",
        "no text": "no transcript",
        "text-c9875aee956f": "no recording",
        "line 8 of mine.jsonl": "turns is not a list of objects with role and text",
        "line 10 of mine.jsonl": rejected["line 10 of mine.jsonl"],
    }
    assert rejected["line 10 of mine.jsonl"].startswith("not JSON: ")
    answers, _ = build("manifest", source, tmp_path / "tts", task="tts", limit=1)
    assert answers["calls/1"]["json"]["answer_text"] == "what is this"
    np.testing.assert_array_equal(answers["calls/1"]["answer.flac"], clip(1))


@pytest.mark.parametrize("name", list(CORPORA))
def test_a_wrong_source_is_one_sentence_that_names_what_was_looked_for(tmp_path: Path, name: str) -> None:
    corpus = CORPORA[name]
    request = Request(task=corpus.tasks[0])
    with pytest.raises(DataError) as absent:
        next(corpus.discover(tmp_path / "absent", request))
    assert f"Cannot find {name}: there is no such file or folder" in str(absent.value)
    put(tmp_path / "empty" / "readme.txt", "")
    with pytest.raises(DataError) as empty:
        next(corpus.discover(tmp_path / "empty", request))
    looked_for = {
        "manifest": "recordings.jsonl", "librispeech": "*.trans.txt", "mls": "train/transcripts.txt",
        "audioqa": "S2S-QA/AudioQA/*.tar.gz", "speech-instruct": "chain_of_modality_instruction.jsonl",
        "hh-rlhf-speech": "HH-RLHF-Speech/*.tar.gz", "sharechatx": "ShareChatX/*.tar.gz",
        "magpie-pro-speech": "Magpie-Pro-Speech+/*.tar.gz",
    }[name]  # fmt: skip
    assert looked_for in str(empty.value) and f"echox shards build {name} --help" in str(empty.value)


def test_a_split_that_is_not_there_and_a_broken_parquet_file(tmp_path: Path) -> None:
    put(tmp_path / "q" / "train.json", "[]")
    with pytest.raises(DataError, match=r"no eval\.json is there"):
        next(CORPORA["audioqa"].discover(tmp_path / "q", Request(task="tts", split="dev")))
    put(tmp_path / "p" / "train" / "0000.parquet", b"not parquet")
    with pytest.raises(DataError, match="Cannot read the parquet file"):
        next(CORPORA["mls"].discover(tmp_path / "p", Request(task="asr")))


def test_a_corpus_names_no_file_outside_of_itself(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.wav", encoded(clip(1)))
    folder = tmp_path / "ShareChatX" / "part"
    inside = put(folder / "q.wav", encoded(clip(2)))

    def asked(audio: str) -> Any:
        return {"conversations": [{"from": "human", "value": "who", "audio": audio},
                                  {"from": "gpt", "value": "me", "wer": ["odd"]}]}  # fmt: skip

    examples = [asked(name) for name in ("q.wav", "../../secret.wav", str(secret), "/dev/zero", str(inside))]
    put(folder / "data.json", json.dumps([*examples, {"audios": 5, "messages": []}, asked("x" * 400)]))
    samples, rejected = build("sharechatx", tmp_path / "ShareChatX", tmp_path / "out", task="sqa")
    assert len(samples) == 2 and len(rejected) == 5
    assert sum("lies outside" in reason for reason in rejected.values()) == 3
    assert secret.exists()
