"""A whole project with tiny networks: stopped in a training, gone on with, and done again after a change."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from echox import cli
from tests.evaluate.test_judges import write_whisper
from tests.shards.layouts import clip, encoded, put, put_lines

WORDS = ("what", "is", "the", "name", "of", "it", "one", "two", "three", "four")
TEMPLATE = "{% for each in messages %}<{{ each.role }}> {{ each.content }} </s> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


def write_llm(folder: Path) -> Path:
    """A random Llama with a tokenizer of words and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>", ".", "?", *WORDS]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def write_ear(folder: Path) -> Path:
    """A random Whisper of width 16 whose third layer makes units."""
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(1)
    config = WhisperConfig(
        d_model=16, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, vocab_size=60, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A new project of sixty sentences and sixty spoken questions, whose trainings have few steps."""
    for number in range(60):
        put(tmp_path / "voice" / f"{number:02d}.wav", encoded(clip(number, 1.0, 16_000), 16_000, "WAV"))
        put(tmp_path / "voice" / f"{number:02d}.txt", f"{WORDS[number % 10]} {WORDS[number // 10]} .")
        put(tmp_path / "asked" / f"{number:02d}.flac", encoded(clip(100 + number, 1.0, 16_000), 16_000, "FLAC"))
    rows = [
        {"id": f"q{number}", "audio": f"{number:02d}.flac", "text": "what is it ?", "answer_text": f"{word} ."}
        for number, word in enumerate(WORDS * 6)
    ]
    questions = put_lines(tmp_path / "asked" / "list.jsonl", rows)
    llm, ear, judge = write_llm(tmp_path / "llm"), write_ear(tmp_path / "ear"), write_whisper(tmp_path / "judge")
    folder = tmp_path / "mine"
    given = ["--llm", str(llm), "--voice", str(tmp_path / "voice"), "--questions", str(questions)]
    assert cli.main(["new", str(folder), *given, "--whisper", str(ear), "--judge", str(judge)]) == 0
    for name, steps in (("s2t", 60), ("t2c", 6), ("echo", 6), ("vocoder", 4)):
        text = (folder / f"{name}.yaml").read_text()
        text = re.sub(r"\n  steps: \d+", f"\n  steps: {steps}", text)
        text = re.sub(r"workers: \d+", "workers: 1", re.sub(r"align_steps: \d+", "align_steps: 2", text))
        put(folder / f"{name}.yaml", re.sub(r"warmup_steps: \d+", "warmup_steps: 1", text))
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "echox", "run", str(folder)]
    environment = {**os.environ, "ECHOX_CACHE": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def steps_run(said: str) -> list[str]:
    return re.findall(r"^\[\d+/\d+\] (\S+): running", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_project_is_stopped_in_a_training_goes_on_there_and_does_what_a_change_asks_for(mine: Path) -> None:
    running = start(mine)
    before: list[str] = []
    assert running.stderr is not None
    try:
        for line in running.stderr:
            before.append(line)
            if " step step=4 " in line:
                break
        children = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGTERM)
        _, rest = running.communicate(timeout=300)
    finally:
        running.kill()
    said = "".join(before) + rest
    assert running.returncode == 130, said[-4000:]
    assert "s2t: left, after" in said and not any(child.is_running() for child in children)
    assert cli.main(["run", str(mine), "--status"]) == 0

    again = start(mine)
    out, said = again.communicate(timeout=1800)
    assert again.returncode == 0, said[-4000:]
    ran = steps_run(said)
    assert ran[0] == "s2t" and ran[-3:] == ["listen", "evaluate", "report"] and "attempt=2" in said
    first = re.search(r" step step=(\d+) attempt=2", said)
    assert first is not None and int(first[1]) > 4, "it went on where it was stopped"
    assert out.splitlines()[-1] == str(mine / "report.html") and "0 left" in out
    page = (mine / "report.html").read_text()
    assert "<audio" in page and "questions-test" in page and "What it took" in page and "<td>s2t" in page
    assert "mine-echo" in (mine / "MODEL_CARD.md").read_text()
    scores = json.loads((mine / "runs" / "evaluation" / "scores.json").read_text())
    assert scores["judge"] == str(mine.parent / "judge") and scores["sets"]["questions-test"]["n"] >= 3

    put(mine / "vocoder.yaml", (mine / "vocoder.yaml").read_text().replace("lr: 1.0e-3", "lr: 5.0e-4"))
    third = start(mine)
    _, said = third.communicate(timeout=900)
    assert third.returncode == 0, said[-4000:]
    assert steps_run(said) == ["vocoder", "listen", "evaluate", "report"]
    assert list((mine / "runs" / "replaced").glob("vocoder-*/vocoder"))
