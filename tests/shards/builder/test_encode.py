from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echox.audio.features import LogMel
from echox.audio.io import encode_flac
from echox.builders.encoded import check_encoded, encoding_identity
from echox.config.model_schema import ModelConfig
from echox.errors import DataError
from echox.stream.collate import Item, PromptTokens, SpeechCollate
from echox.stream.format.writer import write_shards
from echox.stream.storage.store import read_folder
from shards.builder import encode
from tests import tiny


def sample(number: int, length: int = 0) -> dict[str, Any]:
    length = length or 4000 + 2900 * (number % 4)
    wave = np.random.default_rng(number).standard_normal(length).astype(np.float32) * 0.1
    meta = {"id": f"s{number}", "question_text": "a", "answer_text": "b", "task": "sqa", "question_s": length / 16000}
    return {"__key__": f"s{number}", "question.flac": encode_flac(wave), "json": meta}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    whisper = tmp_path / "models" / "tiny"
    whisper.mkdir(parents=True)
    (whisper / "config.json").write_text("{}")
    (whisper / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(encode, "load_whisper_encoder", lambda ref, dtype: tiny.whisper_encoder())
    return tiny.model_config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", (sample(number) for number in range(9)), per_shard=4)
    (tmp_path / "set" / "inputs.json").write_text('"made of"')
    return tmp_path / "set"


def collate(model: ModelConfig, *, precomputed: bool) -> SpeechCollate:
    assert model.speech_encoder is not None
    log_mel = LogMel(8, input_mode=model.speech_encoder.input, stack=model.alignment.stack)
    prompt = PromptTokens(before=[1], after=[2], after_asr=[3], end=4)
    most = int(model.speech_encoder.max_audio_s * 16000)
    return SpeechCollate(lambda text: [5], prompt, log_mel, most, precomputed=16 if precomputed else None)


def changed(model: ModelConfig, **speech: Any) -> ModelConfig:
    assert model.speech_encoder is not None
    return model.model_copy(update={"speech_encoder": model.speech_encoder.model_copy(update=speech)})


def test_a_batch_from_encoded_shards_is_the_encoder_on_its_audio(folder: Path, model: ModelConfig) -> None:
    before = list(read_folder(folder))
    lines: list[str] = []
    assert encode.encode_folder(folder, model, lines.append) and lines
    after = list(read_folder(folder))
    assert [s.meta for s in after] == [s.meta for s in before]
    assert (folder / "inputs.json").read_text() == '"made of"'
    items = [Item(after[number], "sqa") for number in (3, 0, 6)]
    stored, heard = collate(model, precomputed=True)(items, 0), collate(model, precomputed=False)(items, 0)
    assert stored.frames_B.tolist() == heard.frames_B.tolist() and stored.mel_BMT.shape[2] == 0
    front_end = tiny.s2t_model(model).eval().front_end
    torch.testing.assert_close(front_end.align(*stored.audio)[0], front_end.align(*heard.audio)[0], rtol=0, atol=2e-2)


def test_encoding_twice_does_nothing_and_another_encoding_is_refused_by_name(folder: Path, model: ModelConfig) -> None:
    with pytest.raises(DataError, match="set has none"):
        check_encoded(folder, encoding_identity(model))
    encode.encode_folder(folder, model)
    shards = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not encode.encode_folder(folder, model)
    assert shards == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    check_encoded(folder, encoding_identity(model))
    record = json.loads((folder / "encoded.json").read_text())
    (folder / "encoded.json").write_text(json.dumps({**record, "margin_s": 0.1}))
    with pytest.raises(DataError, match="differs in margin_s"):
        check_encoded(folder, encoding_identity(model))


@pytest.mark.parametrize(("input_mode", "layout"), [("trim", "packed"), ("pad_30s", "padded")])
def test_long_questions_are_encoded_in_the_windows_that_are_heard_in_training(
    tmp_path: Path, model: ModelConfig, input_mode: str, layout: str
) -> None:
    model = changed(model, input=input_mode, max_audio_s=61.0).model_copy(update={"layout": layout})
    seconds = (0.5, 31.0, 61.0, 62.5)
    write_shards(tmp_path / "long", [sample(n, int(16000 * s)) for n, s in enumerate(seconds)], per_shard=4)
    lines: list[str] = []
    encode.encode_folder(tmp_path / "long", model, lines.append)
    assert lines == ["long: 4 questions encoded, 1 cut at max_audio_s"]
    items = [Item(found, "sqa") for found in read_folder(tmp_path / "long")]
    stored, heard = collate(model, precomputed=True)(items, 0), collate(model, precomputed=False)(items, 0)
    assert stored.frames_B.tolist() == heard.frames_B.tolist() == [100, 3152, 6152, 6152]
    assert stored.transcript_lengths_B.tolist() == heard.transcript_lengths_B.tolist() == [1, 1, 1, 0]
    front_end = tiny.s2t_model(model).eval().front_end
    found, rows = front_end.align(*stored.audio)[::2]
    expected, _ = front_end.align(*heard.audio)[::2]
    real = torch.arange(rows.size)[None, :, None] < rows.lengths_N[:, None, None]
    both = (rows.to_padded(aligned).masked_fill(~real, 0) for aligned in (found, expected))
    torch.testing.assert_close(*both, rtol=0, atol=2e-2)


def test_an_encoding_is_what_it_was_where_it_computes_what_it_did_and_another_elsewhere(model: ModelConfig) -> None:
    identity = encoding_identity(model)
    assert identity == {
        "weights": hashlib.sha256(b"weights").hexdigest(),
        "input": "trim",
        "margin_s": 0.5,
        "max_audio_s": 30.0,
        "stack": 2,
    }
    assert encoding_identity(changed(model, max_audio_s=45.0)) == {**identity, "max_audio_s": 45.0}
    attended = {"input": "pad_30s", "attention": "whole windows"}
    assert encoding_identity(changed(model, input="pad_30s")) == {**identity, **attended}
