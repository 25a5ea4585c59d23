"""Identifies the answers to a benchmark: everything that decides what is said, and what is heard of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import MANIFEST, read_manifest, weights_name
from echox.errors import MissingModelError
from echox.files import sha256_file, sha256_files
from echox.speak.speakers import speaker_row

if TYPE_CHECKING:
    from echox.evaluate.benchmarks.decoding import Decoding
    from echox.evaluate.benchmarks.survey import Benchmark
    from echox.evaluate.judges import NamedJudge

_OF_VOCODER = ("*.json", "*.safetensors")


def setting_identity(
    run: Path,
    judge: NamedJudge,
    vocoder: Path,
    batch: int,
    quality: Mapping[str, Any] | None = None,
    speaker: str | None = None,
) -> dict[str, Any]:
    """What is the same for all benchmarks and decodings.

    Args:
        run: run or checkpoint folder.
        judge: what listens.
        vocoder: vocoder folder.
        batch: questions answered together.
        quality: what rates the sound, and how many answers; None where nothing does.
        speaker: name or number of who speaks, in a vocoder of several; None for the first.

    Questions answered together are part of it: padding moves a sum by its rounding, and a quantised judge scales its
    numbers by the loudest clip of its batch.

    Raises:
        CheckpointError: the run has no good checkpoint.
        MissingModelError: there is no vocoder.
        DataError: the vocoder has no such speaker.
    """
    checkpoint = find_weights(run).parent
    return {
        "run": {
            "weights": read_manifest(checkpoint)["files"][weights_name(checkpoint)]["sha256"],
            "manifest": sha256_file(checkpoint / MANIFEST),
        },
        "judge": {"language": "found for each clip", "files": judge.identity()},
        "vocoder": _vocoder(vocoder, speaker),
        "batch": batch,
        "quality": quality,
    }


def answers_identity(setting: Mapping[str, Any], benchmark: Benchmark, decoding: Decoding) -> dict[str, Any]:
    """The identity of the answers to one benchmark by one decoding."""
    questions = {"count": len(benchmark.items), "sha256": benchmark.sha256}
    return {**setting, "questions": questions, "decoding": decoding.identity()}


def _vocoder(folder: Path, speaker: str | None) -> dict[str, str | int]:
    """Hashes of its files, and the row of who speaks, if that is not the first."""
    found = sha256_files(folder, _OF_VOCODER)
    if not found:
        fix = "name a vocoder folder by --vocoder, or build the demo corpus"
        raise MissingModelError("There is no vocoder in the folder", where=str(folder), fix=fix)
    row = speaker_row(folder, speaker)
    return {**found, **({"speaker": row} if row else {})}
