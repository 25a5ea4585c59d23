"""A voice of five units and a recipe for a network of a few thousand weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from echox.audio.io import SAMPLE_RATE, encode_flac
from echox.stream.format.writer import write_shards
from echox.units.identity import UnitSetIdentity, write_unit_set
from echox.vocoder.recipe import VoiceRecipe

HOP = 320
UNIT_SET = UnitSetIdentity(features="log_mel", clusters=5, centroids="aa")
GENERATOR = {"embedding": 8, "channels": 32, "resblock_kernels": [3], "resblock_dilations": [[1, 3]]}


class Voice(NamedTuple):
    """Pitch in Hz of unit 0, of which the others are multiples, and deviation of the noise in its sound."""

    lowest: float = 150.0
    breath: float = 0.05


ORDINARY = Voice()


def clip(
    seed: int, units: int = 9, voice: Voice = ORDINARY
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float32]]:
    """Units, frames of each, and a sound in which every unit is a pitch and lasts so long by what it is."""
    random = np.random.default_rng(seed)
    names = np.cumsum(random.integers(1, 4, units)).astype(np.uint16) % 5
    durations = (1 + names).astype(np.uint16)
    pitch = voice.lowest * (1 + np.repeat(names, durations.astype(int) * HOP))
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE) + random.normal(0, voice.breath, len(pitch))
    return names, durations, wave.astype(np.float32)


def sample(
    name: str, units: Any, durations: Any, wave: Any, speaker: str | None = None, **changes: Any
) -> dict[str, Any]:
    meta = {"id": name, "task": "tts", "question_s": None, "answer_s": len(wave) / SAMPLE_RATE}
    return {
        "__key__": name,
        "json": meta if speaker is None else {**meta, "fields": {"speaker": speaker}},
        "answer.units": np.asarray(units, "<u2").tobytes(),
        "answer.durations": np.asarray(durations, "<u2").tobytes(),
        "answer.flac": encode_flac(wave),
        **changes,
    }


def write_voice(folder: Path, clips: int = 6, units: int = 9) -> Path:
    write_shards(folder, [sample(f"s{seed}", *clip(seed, units)) for seed in range(clips)])
    write_unit_set(folder, UNIT_SET)
    return folder


def write_voices(folder: Path, voices: Mapping[str, Voice], clips: int = 4) -> Path:
    """The same units by several speakers, one after the other."""
    write_shards(
        folder,
        [
            sample(f"{name}-{seed}", *clip(seed, voice=voice), speaker=name)
            for name, voice in voices.items()
            for seed in range(clips)
        ],
    )
    write_unit_set(folder, UNIT_SET)
    return folder


def recipe_tree(voice: Path, storage: Path, name: str = "toy", **changes: Any) -> dict[str, Any]:
    """A recipe as plain values; changes are dotted keys with `__`."""
    tree: dict[str, Any] = {
        "name": name,
        "stage": "vocoder",
        "storage": str(storage),
        "data": {"train": [str(voice)], "global_batch": 4, "micro_batch": 2, "segment_frames": 8},
        "generator": dict(GENERATOR),
        "discriminators": {"channels": 16},
        "optim": {"steps": 5},
        "log_every": 1,
        "checkpoint_every": 2,
        "sample_every": 0,
        "scaling": {"workers": 1},
        "tracking": {"system_metrics": False},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def recipe(voice: Path, storage: Path, name: str = "toy", **changes: Any) -> VoiceRecipe:
    return VoiceRecipe.model_validate(recipe_tree(voice, storage, name, **changes), strict=False)
