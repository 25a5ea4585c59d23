"""Reads clips of a voice from shards: a segment of each to speak, and all its units to predict durations of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from echox.audio.io import header_rate, read_audio
from echox.builders.unit_sets import units_of_dataset
from echox.errors import CorruptSampleError, DataError
from echox.stream.batch import Batch
from echox.stream.collate import Item, decoded, id_of, pad_rows
from echox.stream.format.scan import UNITS
from echox.stream.format.speakers import answer_speaker
from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.sampling.batching import SampleBudget
from echox.stream.sampling.keyed_rng import raw
from echox.stream.sampling.plan import Plan
from echox.stream.sampling.source import Source
from echox.stream.storage.remote import locate
from echox.stream.storage.store import ShardStore, open_catalogue
from echox.units.identity import UnitPart, UnitSetIdentity, check_same_unit_set
from echox.vocoder.recipe import FRAMES_PER_S

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.vocoder.recipe import VoiceRecipe

ANSWER, DURATIONS = "answer.flac", "answer.durations"
MEMBERS = frozenset({ANSWER, UNITS, DURATIONS})
MOST_APART_S = 0.1
"""A clip and its frames may end so far apart; features leave a window of the end out, or fill one."""


@dataclass(frozen=True)
class Clip:
    """One clip: its units, the frames of each, and its waveform, cut or filled to the end of the last frame.

    `speaker` is the row of who speaks; 0 for a vocoder of one voice.
    """

    id: str
    weight: float
    units: NDArray[np.int64]
    durations: NDArray[np.int64]
    wave: NDArray[np.float32]
    speaker: int = 0

    @property
    def frames(self) -> NDArray[np.int64]:
        """The unit of each frame."""
        return np.repeat(self.units, self.durations)


@dataclass(kw_only=True)
class VoiceBatch(Batch):
    """A micro-batch.

    Attributes:
        frames_BT, wave_BN: the unit of each frame of a segment, and its waveform.
        speakers_B: the row of who speaks.
        units_BU, durations_BU, mask_BU: units of the whole clips, frames of each, and which of them are real.
    """

    frames_BT: Tensor
    wave_BN: Tensor
    speakers_B: Tensor
    units_BU: Tensor
    durations_BU: Tensor
    mask_BU: Tensor


class VoiceCollate:
    """Items to a `VoiceBatch`.

    Args:
        known: number of units K.
        segment: frames of a segment.
        seed: of the places of segments.
        rate: samples a second of what is learnt.
        speakers: names of those who speak, in the order of their rows; none for a vocoder of one voice.
    """

    members = MEMBERS

    def __init__(self, known: int, segment: int, seed: int, rate: int, speakers: Sequence[str] = ()) -> None:
        self.known, self.segment, self.seed, self.rate = known, segment, seed, rate
        self.rows: Mapping[str, int] = {name: row for row, name in enumerate(speakers)}
        self._hop = rate // FRAMES_PER_S

    def decode(self, item: Item) -> Clip:
        """Read a clip.

        Raises:
            CorruptSampleError: it cannot be decoded, its members do not fit each other, or a unit or the speaker is
                unknown.
        """
        sample = item.sample
        units, durations = (decoded(sample, name, _numbers) for name in (UNITS, DURATIONS))
        wave = decoded(sample, ANSWER, self._heard)
        frames = int(durations.sum()) if len(units) == len(durations) else -1
        speaker = answer_speaker(sample.meta) if self.rows else ""
        problem = ""
        if frames < 0:
            problem = f"{len(units)} units cannot have {len(durations)} durations"
        elif frames == 0:
            problem = "it has no units"
        elif int(units.max()) >= self.known:
            problem = f"unit {int(units.max())} is unknown to a vocoder of {self.known} units"
        elif abs(len(wave) / self.rate - frames / FRAMES_PER_S) > MOST_APART_S:
            problem = f"{frames} frames of 20 ms are not the {len(wave) / self.rate:.2f} s of its {ANSWER}"
        elif self.rows and speaker not in self.rows:
            problem = f"speaker {speaker!r:.60} is unknown to a vocoder of {len(self.rows)} speakers"
        if problem:
            raise CorruptSampleError(f"sample {sample.key}: {problem}", kind="schema", fix="build the shard again")
        filled = np.zeros(frames * self._hop, np.float32)
        filled[: len(wave)] = wave[: len(filled)]
        return Clip(id_of(sample), item.weight, units, durations, filled, self.rows.get(speaker, 0))

    def join(self, rows: Sequence[Clip], step: int) -> VoiceBatch:
        """A segment of each clip, from a place that seed, step and clip decide; a short clip is repeated."""
        segments = [self._segment(row, step) for row in rows]
        units_BU, mask_BU = pad_rows([row.units.tolist() for row in rows])
        durations_BU, _ = pad_rows([row.durations.tolist() for row in rows])
        return VoiceBatch(
            ids=[row.id for row in rows],
            step=step,
            weight_B=torch.tensor([row.weight for row in rows], dtype=torch.float32),
            frames_BT=torch.from_numpy(np.stack([frames for frames, _ in segments])),
            wave_BN=torch.from_numpy(np.stack([wave for _, wave in segments])),
            speakers_B=torch.tensor([row.speaker for row in rows]),
            units_BU=units_BU,
            durations_BU=durations_BU,
            mask_BU=mask_BU,
        )

    def blank(self, step: int) -> VoiceBatch:
        """One silent frame that counts nothing."""
        one = np.ones(1, np.int64)
        batch = self.join([Clip("", 0.0, 0 * one, one, np.zeros(self._hop, np.float32))], step)
        return replace(batch, ids=[], mask_BU=torch.zeros_like(batch.mask_BU))

    def _heard(self, content: bytes) -> NDArray[np.float32]:
        """A waveform at the rate of the vocoder, which must not be higher than its own: it would lack the highs."""
        wave, own = read_audio(content, rate=self.rate), header_rate(content)
        if own < self.rate:
            raise DataError(f"it has {own:,} samples a second, fewer than the {self.rate:,} of generator.sample_rate")
        return wave

    def _segment(self, clip: Clip, step: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        frames, wave = clip.frames, clip.wave
        times = -(-self.segment // len(frames))
        frames, wave = np.tile(frames, times), np.tile(wave, times)
        places = len(frames) - self.segment + 1
        first = int(raw(1, self.seed, "segment", step, clip.id)[0] % np.uint64(places))
        last = first + self.segment
        return frames[first:last], wave[first * self._hop : last * self._hop]


def _numbers(data: bytes) -> NDArray[np.int64]:
    return np.frombuffer(data, dtype="<u2").astype(np.int64)


def open_voice(places: Sequence[str]) -> list[Source]:
    """Datasets of a vocoder; of their samples, those serve that have audio, units and durations.

    Raises:
        DataError: one is absent, or has no sample that serves.
    """
    sources = [
        Source(path=path, task="tts", catalogue=open_catalogue(locate(path)), members=MEMBERS) for path in places
    ]
    for source in sources:
        if not source.samples:
            raise DataError(
                f"no sample of {source.path} has {', '.join(sorted(MEMBERS))}, which a vocoder is trained on",
                where=source.catalogue.location,
                fix="build it with units: `echox shards build ... --units FOLDER --keep-answer-audio`",
            )
    return sources


def units_of_voice(sources: Sequence[Source], known: int | None) -> tuple[int, UnitSetIdentity | None]:
    """Number of units K, and which they are, as far as the records of the datasets say.

    Args:
        sources: the datasets.
        known: K as the recipe says; None for that of the records.

    Raises:
        DataError: the datasets are of different unit sets, or nothing says how many units there are, or two differ.
    """
    parts = [UnitPart(f"dataset {source.path}", units_of_dataset(source)) for source in sources]
    found = check_same_unit_set(parts, fix="train on datasets of one unit set")
    recorded = None if found is None else found.clusters
    if known is None and recorded is None:
        fix = "give generator.units=K"
        raise DataError("no record says how many units the datasets have", where=sources[0].catalogue.location, fix=fix)
    if None not in (known, recorded) and known != recorded:
        raise DataError(
            f"generator.units={known}, and the datasets have {recorded} units",
            where=sources[0].catalogue.location,
            fix="leave generator.units out",
        )
    return known or recorded or 0, found


def speakers_of_voice(sources: Sequence[Source], known: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of those who speak in datasets, in the order of their rows.

    Args:
        sources: the datasets.
        known: those that a run began with, whose rows stay; none for a run that begins.

    Raises:
        DataError: a sample does not say who speaks, or somebody whom the run did not begin with.
    """
    found: dict[str, str] = {}
    for source in sources:
        numbers, place = source.numbers(), source.catalogue.location
        own = source.catalogue.speakers[numbers]
        nameless = np.flatnonzero(own == 0)
        if len(nameless):
            key = source.catalogue.key(int(numbers[nameless[0]]))
            raise DataError(
                f"{len(nameless):,} of the {len(own):,} samples of {source.path} do not say who speaks, "
                f"the first is {key}",
                where=place,
                fix="give each a `speaker` and build again (`echox shards index FOLDER` notes speakers in a catalogue "
                "from before that), or train one voice with generator.speaker=0",
            )
        found |= {source.catalogue.speaker_names[each - 1]: place for each in np.unique(own).tolist()}
    new = sorted(found.keys() - set(known))
    if known and new:
        raise DataError(
            f"speaker {new[0]!r:.60} is not one of the {len(known)} that the run began with",
            where=found[new[0]],
            fix="go on with the datasets of before, or start a new run under another name",
        )
    return tuple(known) or tuple(new)


def voice_reader(
    recipe: VoiceRecipe, sources: Sequence[Source], collate: VoiceCollate, rank: int, world_size: int, *, pin: bool
) -> StreamReader:
    """The training data of one rank; it begins to read with `start`."""
    data = recipe.data
    budget = SampleBudget(data.global_batch, data.global_batch // data.micro_batch)
    plan = Plan(sources, seed=recipe.seed, budget=budget, window_shards=data.window_shards, pool=1)
    return StreamReader(
        plan,
        [ShardStore(source.catalogue) for source in sources],
        collate,
        rank=rank,
        world_size=world_size,
        threads=data.reader_threads,
        prefetch=data.prefetch,
        allowance=Allowance(data.quarantine.samples, data.quarantine.share),
        pin=pin,
    )


def held_out(place: str, collate: Any, most: int) -> list[Clip]:
    """The first clips of a dataset that can be read; of several speakers, the first of each before the second of any.

    Raises:
        DataError: there is none.
    """
    (source,) = open_voice([place])
    numbers = _by_turns(source, collate.rows) if collate.rows else source.numbers()
    store, found, reason = ShardStore(source.catalogue), list[Clip](), "nobody speaks there whom it is trained on"
    try:
        for number in numbers.tolist():
            if len(found) == most:
                break
            try:
                found.append(collate.decode(Item(store.read(number, MEMBERS), source.task)))
            except CorruptSampleError as error:
                reason = error.what  # `echox shards check` names them all; a listening sample needs any clip
    finally:
        store.close()
    if not found:
        fix = "look at it with `echox shards check`"
        raise DataError(f"no clip of {place} can be spoken: {reason}", where=source.catalogue.location, fix=fix)
    return found


def _by_turns(source: Source, rows: Mapping[str, int]) -> NDArray[np.int64]:
    """Numbers of the clips whose speakers have rows, the first of each speaker before the second of any."""
    numbers, catalogue = source.numbers(), source.catalogue
    has_row = np.array([False, *(name in rows for name in catalogue.speaker_names)])
    numbers = numbers[has_row[catalogue.speakers[numbers]]]
    speakers = catalogue.speakers[numbers]
    order = np.argsort(speakers, kind="stable")
    _, firsts, counts = np.unique(speakers[order], return_index=True, return_counts=True)
    turns = np.empty(len(numbers), dtype=np.int64)
    turns[order] = np.arange(len(numbers)) - np.repeat(firsts, counts)
    spoken: NDArray[np.int64] = numbers[np.argsort(turns, kind="stable")]
    return spoken
