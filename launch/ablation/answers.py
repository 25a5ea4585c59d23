"""Adds units of the recorded answers to copies of the question sets, for the arm that learns from annotated speech.

The answers are spoken for that arm alone: the corpus that the T2C decoder is trained on does not have them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.audio.io import encode_flac, read_audio
from echox.config.paths import cache_dir, resolve_data
from echox.evaluate.spoken import UNITS
from echox.files import sha256_file
from echox.release.assets import ASSETS
from echox.stream.format.catalogue import DATASET_NAME
from echox.units.identity import read_unit_set, write_unit_set
from shards.builder.records import INPUTS_NAME, digest, read_json, write_json
from shards.builder.rewrite import read_samples, rewrite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from echox.config.schema import Recipe

    Units = NDArray[np.uint16]

Say = Callable[[str], None]
KMEANS = "kmeans.npz"


def annotated_sources(recipe: Recipe, units: Path, folder: Path, say: Say) -> list[str]:
    """Make copies of a recipe's question sets whose samples have `answer.units`, unless they are there.

    Args:
        recipe: of Stage III.
        units: folder of the k-means that the unit language was fitted with.
        folder: where the copies go.
        say: called with one line a set or batch.

    Returns:
        Overrides that put the copies in the place of the sets.

    Raises:
        DataError: a set is absent, or not here but remote.
        MissingModelError: the voice, or the model of the units' features, is not there.
    """
    found: list[str] = []
    for group in ("train", "valid"):
        for index, source in enumerate(getattr(recipe.data, group)):
            if source.task == "sqa":
                copy = folder / Path(source.path).name
                _annotate(resolve_data(source.path), copy, units, say)
                found.append(f"data.{group}.{index}.path={copy}")
    return found


def _annotate(source: Path, copy: Path, units: Path, say: Say) -> None:
    """One copy; it is complete when its record says what it was made from."""
    voice = cache_dir() / ASSETS["voice"].folder
    made_from = digest([_listed(source), sha256_file(units / KMEANS), sorted(path.name for path in voice.glob("*"))])
    if read_json(copy / INPUTS_NAME) == made_from:
        say(f"{copy.name}: already has units of its answers")
        return
    texts = sorted({str(sample["json"]["answer_text"]) for sample in read_samples(source)})
    spoken = dict(zip(texts, speak(texts, voice, units, say), strict=True))
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(
        source, copy, ignore=lambda folder, names: [name for name in names if (Path(folder) / name).is_dir()]
    )
    rewrite(copy, _with_units(source, spoken))
    write_unit_set(copy, read_unit_set(units))
    write_json(copy / INPUTS_NAME, made_from)
    say(f"{copy.name}: units of {len(texts)} different answers")


def speak(texts: Sequence[str], voice: Path, units: Path, say: Say) -> list[Units]:
    """Units of texts as the answer voice says them.

    Args:
        texts: what to say.
        voice: folder of the Piper voice.
        units: folder of the k-means.
        say: called with one line a batch.
    """
    from echox.units.extract import UnitExtractor
    from shards.demo.speech import ANSWER_VOICE, Speaker, Utterance

    utterances = [Utterance(text=text, voices=(ANSWER_VOICE,)) for text in texts]
    with Speaker(voice) as speaker:
        said = speaker.speak(utterances, lambda done, total: say(f"answers: {done}/{total} spoken"))
        # Through the file format, as the corpus has it: its rounding may decide between two units.
        audio = [read_audio(encode_flac(waves[0])) for waves in said]
    found = UnitExtractor.load(units).extract(audio, lambda what, done, total: say(f"answers: {what} {done}/{total}"))
    return [sequence for sequence, _ in found]


def _with_units(source: Path, spoken: Mapping[str, Units]) -> Iterator[dict[str, Any]]:
    for sample in read_samples(source):
        yield {**sample, UNITS: spoken[str(sample["json"]["answer_text"])].astype("<u2").tobytes()}


def _listed(folder: Path) -> Any:
    listing = read_json(folder / DATASET_NAME)
    return listing and listing["fingerprint"]
