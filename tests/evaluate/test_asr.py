"""The judge's decoding loop and windows on stand-in networks; the real judge on real recordings in the slow suite."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.config.paths import cache_dir
from echox.errors import MissingModelError
from echox.evaluate import asr
from echox.evaluate.asr import Judge

END, FIRST = 3, 8
LAYERS, HEADS, WIDTH = 2, 2, 4


@dataclass
class Port:
    name: str
    shape: tuple[Any, ...]


class Encoder:
    """Passes the loudness of each clip on in the first hidden number, and its window as its length."""

    def __init__(self, window: int) -> None:
        self.window = window

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        mel_BMT = feed["input_features"]
        assert names == ["last_hidden_state"] and mel_BMT.shape[2] == 2 * self.window
        hidden = np.zeros((len(mel_BMT), self.window, 1), np.float32)
        hidden[:, 0, 0] = mel_BMT.max(axis=(1, 2))
        return [hidden]


class Decoder:
    """Counts on from the sum of its cache: 8, 9, … for as many steps as the clip is loud, then the end.

    What the cache holds decides the next token, so a loop that loses, repeats or mixes up cache entries says something
    else; a banned token always scores best.
    """

    def __init__(self, steps: dict[float, int]) -> None:
        self.steps = steps
        self.calls = 0

    def get_inputs(self) -> list[Port]:
        kinds = [
            (layer, side, part)
            for layer in range(LAYERS)
            for side in ("decoder", "encoder")
            for part in ("key", "value")
        ]
        cache = [
            Port(f"past_key_values.{layer}.{side}.{part}", ("B", HEADS, "T", WIDTH)) for layer, side, part in kinds
        ]
        return [Port("input_ids", ()), Port("encoder_hidden_states", ()), *cache, Port("use_cache_branch", ())]

    def get_outputs(self) -> list[Port]:
        cache = [Port(item.name.replace("past_key_values", "present"), ()) for item in self.get_inputs()[2:-1]]
        return [Port("logits", ()), Port("decoder_attentions.0", ()), *cache]

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.calls += 1
        tokens_BN, hidden = feed["input_ids"], feed["encoder_hidden_states"]
        batch = len(tokens_BN)
        first = not feed["use_cache_branch"][0]
        assert "decoder_attentions.0" not in names
        assert tokens_BN.shape[1] == (4 if first else 1)
        present: dict[str, np.ndarray] = {}
        for name in names[1:]:
            past = feed[name.replace("present", "past_key_values")]
            if ".encoder." in name:
                # The branch with a cache gives nothing useful for the cross attention.
                new = hidden[:, None, :1, :].repeat(HEADS, 1).repeat(WIDTH, 3) if first else past[:0]
            else:
                new = np.concatenate([past, np.ones((batch, HEADS, 1, WIDTH), np.float32)], axis=2)
            present[name] = new
        said = present["present.1.decoder.value"].shape[2] - 1
        cross = present["present.0.encoder.key"] if first else feed["past_key_values.0.encoder.key"]
        logits = np.zeros((batch, tokens_BN.shape[1], 99), np.float32)
        for row in range(batch):
            limit = self.steps[round(float(cross[row, 0, 0, 0]), 2)]
            logits[row, -1, FIRST + said if said < limit else END] = 5.0
        logits[:, -1, 1] = 9.0
        if first:
            logits[:, -1, END] = 8.0
        return [logits, *(present[name] for name in names[1:])]


PROMPT = {"<|startoftranscript|>": 4, "<|en|>": 5, "<|de|>": 90, "<|transcribe|>": 6, "<|notimestamps|>": 7}


class Words:
    def token_to_id(self, name: str) -> int | None:
        return PROMPT.get(name)

    def decode(self, row: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " " + " ".join(str(token) for token in row)


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    (tmp_path / "onnx").mkdir()
    for name in ("encoder_model_quantized", "decoder_model_merged_quantized"):
        (tmp_path / "onnx" / f"{name}.onnx").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text('{"feature_size": 80}')
    generation = {"eos_token_id": END, "suppress_tokens": [1], "begin_suppress_tokens": [END]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    decoder = Decoder({0.1: 2, 0.2: 5, 0.3: 1})
    monkeypatch.setattr(asr, "open_session", lambda path, threads, replaced=None: decoder)
    monkeypatch.setattr("tokenizers.Tokenizer.from_file", lambda path: Words())

    def features(clips: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.full((80, 3000), clip[0], np.float32) for clip in clips])

    monkeypatch.setattr(asr, "_feature_extractor", lambda folder: features)
    monkeypatch.setattr(Judge, "_encoder", lambda self, window: Encoder(round(window * 50)))
    return Judge.load(tmp_path)


def sound(level: float, seconds: float) -> np.ndarray:
    return np.full(int(seconds * 16_000), level, np.float32)


def test_rows_end_on_their_own_and_come_back_in_order(judge: Judge) -> None:
    clips = [sound(0.2, 2.0), sound(0.1, 1.0), np.zeros(0, np.float32), sound(0.3, 8.0), sound(0.1, 25.0)]
    seen: list[tuple[int, int]] = []
    heard = judge.transcribe(clips, lambda *step: seen.append(step))
    assert heard == ["8 9 10 11 12", "8 9", "", "8", "8 9"]
    assert seen[-1] == (4, 4)


def test_a_long_clip_is_heard_in_pieces(judge: Judge) -> None:
    assert judge.transcribe([sound(0.1, 65.0)]) == ["8 9 8 9 8 9"]


def test_a_repetition_without_end_is_heard_again_in_the_full_window(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[float] = []
    real = Judge._encoder

    def encoder(self: Judge, window: float) -> Encoder:
        windows.append(window)
        judge._decoder.steps[0.1] = 2 if window == 30.0 else 10_000  # type: ignore[attr-defined]
        return real(self, window)

    monkeypatch.setattr(Judge, "_encoder", encoder)
    assert judge.transcribe([sound(0.2, 1.0), sound(0.1, 1.0)]) == ["8 9 10 11 12", "8 9"]
    assert windows == [4.0, 30.0]


def test_a_repetition_in_the_full_window_is_cut(judge: Judge) -> None:
    judge._decoder.steps[0.1] = 10_000  # type: ignore[attr-defined]
    assert len(judge.transcribe([sound(0.1, 1.0)])[0].split()) == asr.TOKENS_PER_S + 8


def test_the_smallest_window_with_room_for_silence_is_taken(judge: Judge) -> None:
    seconds = (0.5, 2.9, 3.1, 5.0, 8.9, 9.1, 30.0)
    assert [judge._window(int(length * 16_000)) for length in seconds] == [4.0, 4.0, 6.0, 6.0, 10.0, 30.0, 30.0]


def test_position_table_is_read_from_the_file(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(1500, 3)).astype("<f4")
    raw = table.tobytes()
    length, varint = len(raw), b""
    while length > 127:
        varint += bytes([length & 127 | 128])
        length >>= 7
    tensor = b"B\x16embed_positions.weightJ" + varint + bytes([length]) + raw
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"\x16embed_positions.weight\x12" + tensor + b"rest" * 9)
    assert (asr._position_table(path) == table).all()
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(MissingModelError, match="no position table"):
        asr._position_table(path)


class Polyglot(Decoder):
    """After the start alone it says the clip's language, loud clips being German; asked whole, it keeps the prompts."""

    def __init__(self) -> None:
        super().__init__({0.1: 2, 0.2: 5})
        self.prompts: list[list[list[int]]] = []

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        tokens_BN, hidden_BTD = feed["input_ids"], feed["encoder_hidden_states"]
        if tokens_BN.shape[1] == 1 and not feed["use_cache_branch"][0]:
            assert names == ["logits"] and (tokens_BN == PROMPT["<|startoftranscript|>"]).all()
            logits = np.zeros((len(tokens_BN), 1, 99), np.float32)
            logits[:, 0, 8] = 9.0  # no language
            loud = hidden_BTD[:, 0, 0] > 0.15
            logits[loud, 0, PROMPT["<|de|>"]] = logits[~loud, 0, PROMPT["<|en|>"]] = 1.0
            return [logits]
        if not feed["use_cache_branch"][0]:
            self.prompts.append(tokens_BN.tolist())
        return super().run(names, feed)


@pytest.mark.parametrize(
    ("language", "spoken"), [(None, ["<|en|>", "<|de|>"]), ("en", ["<|en|>"] * 2), ("de", ["<|de|>"] * 2)]
)
def test_the_language_of_each_clip_is_found_unless_it_is_named(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str | None, spoken: list[str]
) -> None:
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    languages = {name: PROMPT[name] for name in ("<|en|>", "<|de|>")}
    (tmp_path / "generation_config.json").write_text(json.dumps({**generation, "lang_to_id": languages}))
    decoder = Polyglot()
    monkeypatch.setattr(asr, "open_session", lambda path, threads, replaced=None: decoder)
    heard = Judge.load(tmp_path, language=language).transcribe([sound(0.1, 1.0), sound(0.2, 2.0)])
    assert heard == ["8 9", "8 9 10 11 12"]
    assert decoder.prompts == [[[4, PROMPT[name], 6, 7] for name in spoken]]


@pytest.mark.parametrize(("language", "most"), [("en", 16), ("de", 48), (None, 16)])
def test_other_languages_may_have_more_tokens_a_second(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str | None, most: int
) -> None:
    """A clip of a second that never ends: English has 8 tokens and a spare 8, Burmese or Georgian need 40."""
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    languages = {name: PROMPT[name] for name in ("<|en|>", "<|de|>")}
    (tmp_path / "generation_config.json").write_text(json.dumps({**generation, "lang_to_id": languages}))
    decoder = Polyglot()
    decoder.steps = {0.1: 60}
    monkeypatch.setattr(asr, "open_session", lambda path, threads, replaced=None: decoder)
    (heard,) = Judge.load(tmp_path, language=language).transcribe([sound(0.1, 1.0)])
    assert len(heard.split()) == most


@pytest.mark.parametrize(("known", "language"), [(PROMPT, "fr"), (PROMPT, "german"), ({"<|transcribe|>": 6}, "de")])
def test_a_judge_that_does_not_know_the_language_is_refused(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: dict[str, int], language: str
) -> None:
    """Without its token it would transcribe all the same, in any language or none."""
    monkeypatch.setattr(Words, "token_to_id", lambda self, name: known.get(name))
    with pytest.raises(MissingModelError, match=f"does not know the language '{language}'"):
        Judge.load(tmp_path, language=language)


@pytest.mark.parametrize("language", ["en", None])
def test_an_english_only_judge_hears_english(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str | None
) -> None:
    known = {name: PROMPT[name] for name in ("<|startoftranscript|>", "<|notimestamps|>")}
    monkeypatch.setattr(Words, "token_to_id", lambda self, name: known.get(name))
    assert Judge.load(tmp_path, language=language)._prompt.tolist() == [4, 7]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingModelError, match="encoder_model.onnx"):
        Judge.load(tmp_path)


@pytest.mark.slow
def test_short_windows_hear_what_the_full_window_hears() -> None:
    from echox.audio.io import read_audio
    from echox.evaluate.text import wer

    model = cache_dir() / "models" / "Xenova" / "whisper-small"
    prompts = cache_dir() / "data" / "asterisk-prompts"
    if not model.is_dir() or not prompts.is_dir():
        pytest.skip("the demo's models and recordings have not been fetched")
    lines = [
        line.split(": ", 1)
        for line in (prompts / "transcripts.txt").read_text().splitlines()
        if ": " in line and line[0] != ";"
    ]
    chosen = [(prompts / "wav" / f"{name}.wav", text) for name, text in lines if 25 < len(text) < 60][:12]
    clips = [read_audio(path) for path, _ in chosen if path.is_file()]
    texts = [text for path, text in chosen if path.is_file()]
    short, full = (Judge(model, windows_s=windows).transcribe(clips) for windows in (asr.WINDOWS_S, (30.0,)))
    assert wer(texts, short) < 0.12
    assert wer(full, short) < 0.05
