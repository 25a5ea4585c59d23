"""The real models and recordings, where they were fetched: complete, unaltered, and doing what they are for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from echox.audio.io import read_audio
from echox.evaluate.text import wer
from echox.release.assets import ASSETS, is_present
from echox.release.checksums import verify

CACHE = Path(os.environ.get("ECHOX_CACHE", "~/.cache/echox")).expanduser()
pytestmark = pytest.mark.slow


def folder(name: str) -> Path:
    if not is_present(name, CACHE):
        pytest.skip(f"{name} has not been fetched")
    return CACHE / ASSETS[name].folder


def loaded(model_class: Any, path: Path) -> Any:
    model, info = model_class.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("name", list(ASSETS))
def test_every_file_has_its_recorded_hash(name: str) -> None:
    verify(folder(name))


def test_whisper_base_transcribes_real_recordings() -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = loaded(WhisperForConditionalGeneration, folder("whisper-base"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 72_593_920
    processor = WhisperProcessor.from_pretrained(folder("whisper-base"))
    said = {
        "cannot-complete-as-dialed": "Your call cannot be completed as dialed.",
        "agent-alreadyon": "That agent is already logged on. Please enter your agent number followed by the pound key.",
        "conf-full": "That conference is full.",
    }
    clips = [read_audio(folder("prompts") / "wav" / f"{name}.wav") for name in said]
    features = processor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    tokens = model.generate(features, language="en", task="transcribe", max_new_tokens=40)
    heard = processor.batch_decode(tokens, skip_special_tokens=True)
    assert wer(list(said.values()), heard) <= 0.1, heard


def test_smollm2_answers_a_question() -> None:
    from transformers import AutoModelForCausalLM

    from shards.demo.knowledge import TextModel

    model = loaded(AutoModelForCausalLM, folder("smollm2"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    answers = TextModel(folder("smollm2")).ask(["What is the capital of France?", "What is the capital of Japan?"])
    assert answers == ["The capital of France is Paris.", "The capital of Japan is Tokyo."]


def test_smollm2s_chat_template_is_rendered_as_hugging_face_tokenises_it() -> None:
    from transformers import AutoTokenizer

    from echox.builders.prompt import rendered_prompt

    tokenizer = AutoTokenizer.from_pretrained(folder("smollm2"))
    prompt, question = rendered_prompt(tokenizer, "smollm2"), "What is the capital of France?"
    pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt.before, question, prompt.after)]
    turn = [{"role": "user", "content": question}]
    assert sum(pieces, []) == tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert prompt.end == "<|im_end|>"
