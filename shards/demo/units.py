"""Fits k-means and unit language on the demo's answer voice, and adds units of the spoken answers to the shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.audio.io import read_audio
from echox.errors import DataError
from echox.files import sha256_file
from echox.release.assets import ASSETS
from echox.stream.format.catalogue import DATASET_NAME
from echox.units.identity import read_unit_set, write_unit_set
from shards.builder.records import INPUTS_NAME, digest, read_json, write_json
from shards.builder.rewrite import read_samples, rewrite
from shards.demo.plan import Scale

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from echox.units.features import FeatureConfig, FrameFeatures
    from echox.units.identity import UnitSetIdentity

    Units = NDArray[np.uint16]

Progress = Callable[[str], None]

TTS_SETS = ("tts-train", "tts-valid", "tts-heldout", "tts-references")
"""Sets that carry `answer.flac`; the first one is fitted on."""
_DONE = "units.json"
_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class UnitSettings:
    """What the units are.

    Attributes:
        model: Whisper model of the features, by its name below the cache.
        layer: encoder block whose output is clustered, counted from 1.
        clusters: number of units K.
        switch: what a change of unit costs, see `KMeans.fit`.
        vocab_size: words of the unit language, single units included.
        order: 1- or 2-gram unit language.
        max_word: most units a word.
        seed: of k-means.
    """

    model: str = "openai/whisper-base"
    layer: int = 2
    clusters: int = 500
    switch: float = 0.8
    vocab_size: int = 2000
    order: int = 2
    max_word: int = 4
    seed: int = 0

    def features(self) -> FeatureConfig:
        """The frame features these units are made of."""
        from echox.units.features import FeatureConfig

        return FeatureConfig(kind="whisper", model=self.model, layer=self.layer)


SWITCH: dict[Scale, float] = {"demo": UnitSettings.switch, "small": 0.4}
"""Hours of speech teach longer sequences than an hour does, and they sound better."""


def settings_for(limit: int | None, scale: Scale = "demo") -> UnitSettings:
    """Settings of a whole corpus, or of one cut down to `limit` samples a set: too few frames for all clusters."""
    clusters = UnitSettings.clusters if limit is None else min(UnitSettings.clusters, 2 * limit)
    return UnitSettings(clusters=clusters, switch=SWITCH[scale])


def _audio(folder: Path) -> list[NDArray[np.float32]]:
    return [read_audio(sample["answer.flac"]) for sample in read_samples(folder)]


def _frames(
    features: FrameFeatures, audio: list[NDArray[np.float32]], tell: Callable[[str, int, int], None]
) -> list[NDArray[np.float32]]:
    """Frames of every clip, encoded in groups of similar length."""
    order = sorted(range(len(audio)), key=lambda index: len(audio[index]))
    found: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), _GROUP):
        group = order[start : start + _GROUP]
        found.update(zip(group, features([audio[index] for index in group]), strict=True))
        tell("frames", len(found), len(audio))
    return [found[index] for index in range(len(audio))]


def _with_units(folder: Path, found: list[tuple[Units, Units]]) -> Iterator[dict[str, Any]]:
    for sample, (units, durations) in zip(read_samples(folder), found, strict=True):
        yield {
            **sample,
            "answer.units": units.astype("<u2").tobytes(),
            "answer.durations": durations.astype("<u2").tobytes(),
        }


def _record(target: Path, folders: list[Path], unit_set: UnitSetIdentity) -> None:
    """Say in units, unit language and shards which unit set they are of; those made before such records were."""
    from echox.units.language import UnitLanguage

    path = target / "unit_language.json"
    language = UnitLanguage.load(path)
    language.unit_set = unit_set
    language.save(path)
    for folder in (target, *folders):
        write_unit_set(folder, unit_set)


def add_units(
    cache: Path, progress: Progress | None = None, settings: UnitSettings | None = None, scale: Scale = "demo"
) -> dict[str, Any]:
    """Fit units and unit language on `tts-train`; write them to `units/` and every unit sequence into the tts sets.

    Done already with the same settings on the same audio, it only reports that.

    Args:
        cache: root of the cache, with the demo corpus built.
        progress: called with one line a step or batch; None is silent.
        settings: None takes the defaults.
        scale: of the corpus.

    Returns:
        The content of `units/units.json`: settings, sequences, units a second, words a second, vocabulary size.

    Raises:
        DataError: the corpus was not built or a shard is damaged.
        MissingModelError: the feature model is not there.
    """
    import numpy as np

    from echox.units.extract import UnitExtractor, collapse, identify
    from echox.units.features import load_features
    from echox.units.kmeans import KMeans
    from echox.units.language import UnitLanguage

    say: Progress = progress or (lambda line: None)
    settings = settings or UnitSettings()
    root = cache / "data" / scale
    target = root / "units"
    folders = [root / name for name in TTS_SETS if (root / name / DATASET_NAME).is_file()]
    if not folders:
        raise DataError("The demo corpus has no spoken answers", where=str(root), fix="Build the demo corpus first.")
    weights = sha256_file(cache / ASSETS["whisper-base"].folder / "model.safetensors")
    done = digest([asdict(settings), weights, read_json(folders[0] / INPUTS_NAME)])
    record = read_json(target / _DONE)
    fitted = record is not None and record["inputs"] == done and (target / "kmeans.npz").is_file()
    if fitted and all(read_json(folder / _DONE) == done for folder in folders):
        if any(read_unit_set(place) is None for place in (target, *folders)):
            kmeans = KMeans.load(target / "kmeans.npz")
            _record(target, folders, identify(settings.features(), kmeans, weights=weights))
        say(f"units: already made, {settings.clusters} units, {record['vocabulary']} words")
        return dict(record)

    started = time.perf_counter()

    def tell(what: str, count: int, total: int) -> None:
        say(f"units: {what}, {count}/{total}")

    audio = _audio(folders[0])
    target.mkdir(parents=True, exist_ok=True)
    extractor = UnitExtractor.load(target) if fitted else None
    features = extractor.features if extractor is not None else load_features(settings.features())
    frames = _frames(features, audio, tell)
    if extractor is None:
        tell("k-means", 0, 1)
        extractor = UnitExtractor(
            features, KMeans.fit(np.concatenate(frames), settings.clusters, seed=settings.seed, switch=settings.switch)
        )
        extractor.save(target, weights=weights)
    unit_set = identify(settings.features(), extractor.kmeans, weights=weights)
    write_unit_set(target, unit_set)
    # The frames serve both the fit and the units; extracting again would encode all audio twice.
    found = [collapse(extractor.kmeans.segment(frames_TD)) for frames_TD in frames]
    language = UnitLanguage.fit(
        [units for units, _ in found],
        settings.clusters,
        settings.order,
        settings.max_word,
        settings.vocab_size,
        unit_set=unit_set,
        progress=tell,
    )
    language.save(target / "unit_language.json")
    length = sum(len(samples) for samples in audio) / 16_000
    words = sum(len(ids) for ids in language.encode_batch([units for units, _ in found]))
    for folder in folders:
        units = found if folder == folders[0] else extractor.extract(_audio(folder), tell)
        # Interrupted between the two, the shards are of unknown units rather than of the wrong ones.
        write_unit_set(folder, None)
        rewrite(folder, _with_units(folder, units))
        write_unit_set(folder, unit_set)
        write_json(folder / _DONE, done)
    record = {
        "inputs": done,
        "settings": asdict(settings),
        "sequences": len(found),
        "units_per_s": round(sum(len(units) for units, _ in found) / length, 2),
        "words_per_s": round(words / length, 2),
        "vocabulary": language.size,
        "fingerprints": {folder.name: read_json(folder / DATASET_NAME)["fingerprint"] for folder in folders},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(target / _DONE, record)
    say(
        f"units: {record['units_per_s']} units and {record['words_per_s']} words a second of speech, "
        f"made in {record['seconds']:.0f} s"
    )
    return record
