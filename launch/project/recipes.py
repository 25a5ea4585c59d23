"""Writes the recipes of a project, each choice with its reason."""

from __future__ import annotations

import json

from launch.project.look import Llm, Recordings
from launch.project.plan import Project, Sizes


def recipes(project: Project, llm: Llm, voice: Recordings, size: Sizes) -> dict[str, str]:
    """File name to content: the three stages and the vocoder."""
    model = _model(project, size)
    return {
        "s2t.yaml": _s2t(project, size, model),
        "t2c.yaml": _t2c(project, llm, voice, size),
        "echo.yaml": _echo(project, llm, size, model),
        "vocoder.yaml": _vocoder(project, size),
    }


def _quoted(value: object) -> str:
    """A text as YAML reads it back, whatever is in it."""
    return json.dumps(str(value), ensure_ascii=False)


def _head(project: Project, name: str, stage: str, what: str) -> str:
    return f"""\
# {what}
name: {_quoted(name)}
stage: {stage}
scale: {_quoted(project.title)}
storage: {_quoted(project.runs)}
"""


def _stage_head(project: Project, stage: str, what: str) -> str:
    spoken = f"language: {_quoted(project.language)}\n" if project.language else ""
    return _head(project, project.run(stage).name, stage, what) + spoken


def _llm(project: Project) -> str:
    return f"""\
  llm:
    path: {_quoted(project.llm)} # the prompt is its chat template; write `prompt:` to have another
"""


def _model(project: Project, size: Sizes) -> str:
    on_cpu = project.gpus == 0
    head = "corpus # the tokens of the questions: a head over all would cost as much as the LLM" if on_cpu else "llm"
    encoded = " # read from the shards: in every step it would cost a processor as much as all the rest"
    return f"""\
model:
{_llm(project)}  speech_encoder:
    path: {_quoted(project.whisper)}
    precomputed: {str(on_cpu).lower()}{encoded if on_cpu else ""}
  ctc:
    vocabulary: {head}
"""


def _t2c_model(project: Project, llm: Llm, size: Sizes) -> str:
    small = """\
    layers: 4 # little speech: a small decoder, and what keeps it from reciting
    width: 256
    heads: 4
    ffn: 512
    dropout: 0.1
    history_dropout: 0.1
    text_embeddings: centred
"""
    large = """\
    layers: 6 # as published at 3B
    width: 512
    heads: 8
    ffn: 2048
"""
    return f"""\
  t2c:
{small if size.small else large}    prefix: {_quoted(llm.begin)} # special tokens of the LLM around the text
    unit_header: {_quoted(llm.end)}
    unit_language: {_quoted(project.folder / "unit_language.json")}
"""


def _training(project: Project, size: Sizes, steps: int, rates: str) -> str:
    gpus = "  gpus_per_worker: 1\n" if project.gpus else ""
    json = "ds_configs/zero3_3b.json" if project.gpus else "ds_configs/zero3_cpu.json"
    micro = max(1, min(16, size.batch // size.workers))
    return f"""\
  global_batch: {size.batch}
  micro_batch: {micro}
optim:
  steps: {steps}
  warmup_steps: {max(1, steps // 50)}
  lr: {rates}
engine:
  deepspeed: {json}
  precision: auto
  validate_every: {max(20, steps // 6)}
  checkpoint_every: {max(20, steps // 6)}
scaling:
  workers: {size.workers}
{gpus}tracking:
  parent_run: {_quoted(project.title)}
"""


def _data(project: Project, task: str, name: str) -> str:
    data = project.folder / "data"
    return f"""\
data:
  train:
    - {{path: {_quoted(data / f"{name}-train")}, task: {task}}}
  valid:
    - {{path: {_quoted(data / f"{name}-valid")}, task: {task}}}
"""


def _s2t(project: Project, size: Sizes, model: str) -> str:
    align = size.s2t_steps // 2 if size.small else min(1000, size.s2t_steps // 8)
    model += f"    align_steps: {align} # before the words are aligned, the LLM would learn to ignore the audio\n"
    rates = "{align: 3e-3, adapters: 5e-4, lora: 1e-3}" if size.small else "{adapters: 1e-4, lora: 1e-4}"
    return (
        _stage_head(project, "s2t", "Stage I: hears a question, writes the answer.")
        + model
        + _data(project, "sqa", "questions")
        + _training(project, size, size.s2t_steps, rates)
    )


def _t2c(project: Project, llm: Llm, voice: Recordings, size: Sizes) -> str:
    return (
        _stage_head(project, "t2c", f"Stage II: reads text in the units of {voice.hours:.2f} h of the voice.")
        + "model:\n"
        + _llm(project)
        + _t2c_model(project, llm, size)
        + _data(project, "tts", "voice")
        + _training(project, size, size.t2c_steps, "{t2c: 2.5e-3}" if size.small else "{t2c: 5e-4}")
    )


def _echo(project: Project, llm: Llm, size: Sizes, model: str) -> str:
    init = f"init:\n  s2t: {_quoted(project.run('s2t'))}\n  t2c: {_quoted(project.run('t2c'))}\n"
    echo = f"""\
  echo:
    denoising: {{align_steps: {size.align_steps}}} # first steps, of the Denoising Adapter alone
"""
    small = "{lora: 1e-4, denoising: 1e-3, echo: 1e-3}"
    rates = small if size.small else "{lora: 1e-4, denoising: 2e-4, echo: 2e-4}"
    return (
        _stage_head(project, "echo", "Stage III: joins the two, and answers speech with speech.")
        + init
        + model
        + _t2c_model(project, llm, size)
        + echo
        + _data(project, "sqa", "questions")
        + _training(project, size, size.align_steps + size.echo_steps, rates)
    )


def _vocoder(project: Project, size: Sizes) -> str:
    data = project.folder / "data"
    small = """\
generator:
  embedding: 32
  channels: 64
  resblock_kernels: [3, 7]
  resblock_dilations: [[1, 3], [1, 3]]
discriminators:
  channels: 64
"""
    return (
        _head(project, project.vocoder.parent.name, "vocoder", "A unit HiFi-GAN of the voice: units to waveforms.")
        + f"data:\n  train: [{_quoted(data / 'voice-train')}]\n  valid: {_quoted(data / 'voice-valid')}\n"
        + f"  global_batch: {4 * size.workers if project.gpus else 4}\n  micro_batch: 4\n"
        + ("" if project.gpus else small)
        + f"optim:\n  steps: {size.vocoder_steps}\n  lr: {'2.0e-4' if project.gpus else '1.0e-3'}\n"
        + f"scaling:\n  workers: {size.workers if project.gpus else 1}\n"
        + ("  gpus_per_worker: 1\n" if project.gpus else "")
    )
