from __future__ import annotations

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


def sample(number: int) -> dict[str, Any]:
    length = 4000 + 2900 * (number % 4)
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
    log_mel = LogMel(8, stack=model.alignment.stack)
    prompt = PromptTokens(before=[1], after=[2], after_asr=[3], end=4)
    return SpeechCollate(lambda text: [5], prompt, log_mel, 480_000, precomputed=16 if precomputed else None)


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
