"""Judges by name: which form a folder has, what identifies it, and a random Whisper through transformers' pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox.errors import MissingModelError
from echox.evaluate import judges
from echox.evaluate.judges import NamedJudge, TransformersWhisper


def write_whisper(folder: Path) -> Path:
    """A random Whisper of width 16 with a tokenizer of letters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    torch.manual_seed(0)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>",
               "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    times = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]
    vocabulary = {token: number for number, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = WhisperTokenizer(vocab=vocabulary, merges=[], unk_token="<|endoftext|>")
    made.add_tokens(special, special_tokens=True)
    made.add_tokens(times)
    ids = {token: made.convert_tokens_to_ids(token) for token in special}
    config = WhisperConfig(
        vocab_size=len(made), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, init_std=0.5,
        pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"], max_target_positions=64,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    generation: dict[str, Any] = {
        "no_timestamps_token_id": ids["<|notimestamps|>"], "is_multilingual": True, "max_length": 24,
        "lang_to_id": {"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]}, "max_initial_timestamp_index": 1,
        "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        "suppress_tokens": [], "begin_suppress_tokens": [],
        "_from_model_config": False,  # else it would be made again when the model is loaded
    }  # fmt: skip
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8), made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


def test_a_whisper_of_transformers_hears_each_clip_alone(whisper: Path) -> None:
    judge = NamedJudge.find(str(whisper)).open(None)
    assert isinstance(judge, TransformersWhisper)
    noise = np.random.default_rng(0).normal(size=(2, 8000)).astype(np.float32)
    heard = judge.transcribe([noise[0], np.zeros(0, np.float32), noise[1][:4000]])
    assert len(heard) == 3 and heard[1] == "" and heard[0]
    assert judge.transcribe([noise[1][:4000]]) == heard[2:] and judge.transcribe([noise[0]]) == heard[:1]


def test_the_language_is_named_only_where_one_is_given(whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def pipe(given: dict[str, Any], **options: Any) -> dict[str, str]:
        assert given["sampling_rate"] == 16_000
        asked.append(options)
        return {"text": " hello "}

    monkeypatch.setattr("transformers.pipeline", lambda *_, **__: pipe)
    for language in (None, "de"):
        assert TransformersWhisper(whisper, language).transcribe([np.zeros(9, np.float32)]) == ["hello"]
    assert asked == [
        {"return_timestamps": True, "generate_kwargs": {}},
        {"return_timestamps": True, "generate_kwargs": {"language": "de"}},
    ]


def test_a_language_that_it_does_not_know_is_refused_and_english_only_is_told_nothing(
    whisper: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingModelError, match="does not know the language 'fr'"):
        NamedJudge.find(str(whisper)).open("fr")
    alone = shutil.copytree(whisper, tmp_path / "english")
    config = json.loads((alone / "generation_config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("lang_to_id", "task_to_id")}
    (alone / "generation_config.json").write_text(json.dumps({**kept, "is_multilingual": False}))
    with pytest.raises(MissingModelError, match="does not know the language 'de'"):
        NamedJudge.find(str(alone)).open("de")
    judge = NamedJudge.find(str(alone)).open("en")
    assert isinstance(judge, TransformersWhisper) and judge._options == {}


def test_a_folder_that_is_no_whisper_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(MissingModelError, match="this is no Whisper"):
        NamedJudge.find(str(tmp_path)).open(None)
    with pytest.raises(MissingModelError, match="nobody/none was not found"):
        NamedJudge.find("nobody/none")


def test_onnx_is_opened_as_such_and_the_language_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "onnx" / "encoder_model.onnx").write_text("")
    opened: list[Any] = []
    stand = SimpleNamespace(load=lambda folder, language: opened.append((folder, language)))
    monkeypatch.setattr("echox.evaluate.asr.Judge", stand)
    monkeypatch.setattr(judges, "TransformersWhisper", None)
    NamedJudge.find(str(tmp_path)).open(None)
    assert opened == [(tmp_path, None)]


def test_its_files_identify_it(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for name in ("config.json", "vocab.json", "onnx/encoder_model.onnx", "README.md"):
        (tmp_path / name).write_text(name)
    judge = NamedJudge("x", tmp_path)
    before = judge.identity()
    assert sorted(before) == ["config.json", "onnx/encoder_model.onnx", "vocab.json"]
    (tmp_path / "onnx" / "encoder_model.onnx").write_text("other")
    assert {name for name, digest in judge.identity().items() if before[name] != digest} == {"onnx/encoder_model.onnx"}
