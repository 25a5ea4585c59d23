"""Collates samples into micro-batches: decoding, log-mel, tokens, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from echox.audio.features import LogMel
from echox.audio.io import SAMPLE_RATE, read_audio, sayable
from echox.errors import CorruptSampleError, DataError, EchoXError
from echox.stream.batch import SpeechBatch, UnitBatch
from echox.stream.dialogue import History, Turn, hear, newest, spoken_tokens, turns_of, vectors
from echox.stream.format.encoded_features import pad_features, unpack
from echox.stream.format.scan import AUDIO, ENCODED, TURN_MEMBERS, UNITS
from echox.stream.storage.store import Sample

_BLANK_FRAMES = 32
ENCODED_PER_S = 50
"""Frames that the speech encoder makes of a second."""
FEWEST_UNITS_PER_S = 5
"""Slow speech has so many units, each counted once while it lasts; quick speech has some thirty."""
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Item:
    """One sample in memory, what it is used for, whether it counts, and the key of its source (`Source.key`)."""

    sample: Sample
    task: str
    weight: float = 1.0
    source: int = 0


RowT = TypeVar("RowT")
BatchT = TypeVar("BatchT", covariant=True)


class Collate(Protocol[RowT, BatchT]):
    """Samples to one micro-batch, in two halves, so that a sample that cannot be decoded is dropped alone."""

    @property
    def members(self) -> frozenset[str]:
        """Members of a sample that are read, beside `json`."""
        ...

    def decode(self, item: Item) -> RowT:
        """One row to be. Its attributes `cut_s` and `turns_dropped`, if it has them, are counted.

        They are the seconds of audio, and the turns of the dialogue before it, that are left out.

        Raises:
            CorruptSampleError: the sample cannot be used.
        """
        ...

    def join(self, rows: Sequence[RowT], step: int) -> BatchT:
        """Pad one row or more into a batch of optimizer step `step`."""
        ...

    def blank(self, step: int) -> BatchT:
        """A batch of one row that counts nothing, for a micro-batch without samples."""
        ...


@dataclass(frozen=True)
class PromptTokens:
    """Token ids around one spoken turn.

    Attributes:
        before: template before the audio.
        after: template after the audio; `after_asr` has the transcription instruction in front.
        end: end token of the response.
        begin: token that begins a response; None where its text does.
        unseen: token that nothing attends to in a prompt.
    """

    before: list[int]
    after: list[int]
    after_asr: list[int]
    end: int
    begin: int | None = None
    unseen: int | None = None


@dataclass(frozen=True)
class RowPrompt:
    """The prompt of one row.

    Attributes:
        before: token ids before the first clip, between it and the next one, and so on, up to the question's audio.
        after: token ids after the question's audio.
        clips: earlier turns that are heard, 16 kHz mono; one fewer than pieces of `before`.
    """

    before: list[list[int]]
    after: list[int]
    clips: list[np.ndarray] = field(default_factory=list)


class SpeechFeatures(NamedTuple):
    """Audio as the speech front end takes it, see `SpeechBatch`."""

    mel_BMT: Tensor
    frames_B: Tensor
    features_BTd: Tensor | None = None


def pad_rows(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad integer rows: `[B, longest]` and the mask of real positions (at least one column)."""
    longest = max(1, max(len(row) for row in rows))
    values = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
    return values, mask


def _pad_pieces(rows: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Pieces of each row side by side, each padded by itself: `[B, P]`, their mask, and the columns of each piece."""
    pieces = max(len(row) for row in rows)
    padded = [pad_rows([row[piece] if piece < len(row) else [] for row in rows]) for piece in range(pieces)]
    sizes = tuple(values.shape[1] for values, _ in padded)
    return torch.cat([values for values, _ in padded], 1), torch.cat([mask for _, mask in padded], 1), sizes


def _clip_numbers(counts: Sequence[int]) -> Tensor:
    """Which of the clips behind the questions each row hears, in order: `[B, most]`, -1 for none."""
    numbers = torch.full((len(counts), max(counts)), -1, dtype=torch.long)
    first = 0
    for row, count in zip(numbers, counts, strict=True):
        row[:count] = torch.arange(first, first + count)
        first += count
    return numbers


def pad_audio(clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Zero-pad waveforms: `[B, longest]` float32 and their lengths in samples."""
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.zeros(len(clips), int(lengths.max()))
    for row, clip in zip(audio, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    return audio, lengths


@dataclass(frozen=True)
class SpeechRow:
    """A spoken turn, decoded.

    Attributes:
        id, task, weight: of the item.
        speech: 16 kHz mono samples, or the encoder's output `[frames, width]` where the shards hold it.
        question, answer: what is said, and what to answer.
        cut_s: seconds of audio left out at the end, where it was longer than the encoder is given.
        address: key of its source, and number in it.
        prompt: with the dialogue before the question; None for that of the task alone.
        turns_dropped: turns of that dialogue for which there was no room.
        units: of the recorded answer, where they are read.
    """

    id: str
    task: str
    weight: float
    speech: np.ndarray | Tensor
    question: str
    answer: str
    cut_s: float = 0.0
    address: tuple[int, int] = (0, -1)
    prompt: RowPrompt | None = None
    turns_dropped: int = 0
    units: np.ndarray | None = None


class SpeechCollate:
    """Items of sqa and asr sources to a `SpeechBatch`.

    Audio longer than `max_samples` is cut (U27). Its row keeps the response and gets an empty transcript, which is no
    target for CTC: the whole one has words that are not heard. Of features that were cut when they were precomputed,
    the metadata tell it (`question_s`).

    Args:
        tokenize: text of the data to LLM token ids, none of them a special token.
        prompt: template tokens.
        log_mel: features of the speech encoder.
        max_samples: longest audio, in samples of 16 kHz.
        precomputed: width of the encoder's output that the shards hold, so that audio is not decoded; None decodes it.
        needs_transcript: whether a loss reads the transcript, so that a sample without one cannot be used.
        history: how the dialogue before a question enters its prompt; None leaves it out. A transcript has none.
        labels: language of the units of recorded answers, which then are in the batch; None leaves them out. A
            transcript has none.
    """

    def __init__(
        self,
        tokenize: Callable[[str], list[int]],
        prompt: PromptTokens,
        log_mel: LogMel,
        max_samples: int,
        *,
        precomputed: int | None = None,
        needs_transcript: bool = False,
        history: History | None = None,
        labels: UnitWords | None = None,
    ) -> None:
        self.tokenize = tokenize
        self.prompt = prompt
        self.log_mel = log_mel
        self.max_samples = max_samples
        self.precomputed = precomputed
        self.needs_transcript = needs_transcript
        self.history = history
        self.labels = labels

    @property
    def members(self) -> frozenset[str]:
        """The question, as audio or encoded, earlier turns where they are heard, and units where they are labels."""
        earlier = TURN_MEMBERS if self.history is not None and self.history.spoken else ()
        units = () if self.labels is None else (UNITS,)
        return frozenset({AUDIO if self.precomputed is None else ENCODED, *earlier, *units})

    def decode(self, item: Item) -> SpeechRow:
        """Decode the audio, or take what it was encoded to.

        Raises:
            CorruptSampleError: no such member, one that cannot be decoded, or a text without which the sample would
                teach silence: any answer, and the transcript where it is needed (kind "empty"); or turns before the
                question that are none, or that the chat template refuses (kind "schema").
        """
        sample = item.sample
        speech, cut_s = self._audio(sample) if self.precomputed is None else self._features(sample)
        question, answer = (text_of(sample, name) for name in ("question_text", "answer_text"))
        if item.task == "asr":
            answer = question if question.strip() else answer  # also where the question has an answer
        _need(sample, "answer_text", answer, "the end token would be all that it teaches to say")
        if self.needs_transcript:
            _need(sample, "question_text", question, "CTC would learn that nothing is said in it")
            heard_s = len(speech) / (SAMPLE_RATE if isinstance(speech, np.ndarray) else ENCODED_PER_S)
            _said_in(sample, "question_text", question, heard_s + cut_s)
        address = (item.source, sample.number)
        units = None
        if self.labels is not None and item.task == "sqa":
            units = decoded(sample, UNITS, partial(_known_units, self.labels))
        prompt, dropped = self._dialogue(sample) if self.history is not None and item.task == "sqa" else (None, 0)
        return SpeechRow(
            id_of(sample), item.task, item.weight, speech, question, answer, cut_s, address, prompt, dropped, units
        )

    def join(self, rows: Sequence[SpeechRow], step: int) -> SpeechBatch:
        """Featurise, tokenise and pad; earlier turns that are heard are further clips behind the questions."""
        prompts = [row.prompt or self._plain(row.task) for row in rows]
        earlier = [clip for prompt in prompts for clip in prompt.clips]
        clips = [row.speech for row in rows if isinstance(row.speech, np.ndarray)]
        if clips:
            speech = SpeechFeatures(*self.log_mel(*pad_audio([*clips, *earlier])))
        else:
            features_BTd, frames_B = pad_features([row.speech for row in rows if isinstance(row.speech, Tensor)])
            speech = SpeechFeatures(torch.zeros(len(rows), self.log_mel.n_mels, 0), 2 * frames_B, features_BTd)
        before, before_mask, sizes = _pad_pieces([prompt.before for prompt in prompts])
        after, after_mask = pad_rows([prompt.after for prompt in prompts])
        begin = [] if self.prompt.begin is None else [self.prompt.begin]
        response, response_mask = pad_rows([[*begin, *self.tokenize(row.answer), self.prompt.end] for row in rows])
        spoken, spoken_mask = pad_rows([[] if row.cut_s else self.tokenize(row.question) for row in rows])
        labels, labels_mask = self._labels_of(rows)
        return SpeechBatch(
            ids=[row.id for row in rows],
            step=step,
            weight_B=torch.tensor([row.weight for row in rows], dtype=torch.float32),
            mel_BMT=speech.mel_BMT,
            frames_B=speech.frames_B,
            features_BTd=speech.features_BTd,
            before_BP=before,
            before_mask_BP=before_mask,
            before_sizes=sizes,
            history_BK=_clip_numbers([len(prompt.clips) for prompt in prompts]) if earlier else None,
            after_BQ=after,
            after_mask_BQ=after_mask,
            response_BR=response,
            response_mask_BR=response_mask,
            transcript_BC=spoken,
            transcript_lengths_B=spoken_mask.sum(1),
            addresses=[row.address for row in rows],
            labels_BM=labels,
            labels_mask_BM=labels_mask,
        )

    def blank(self, step: int) -> SpeechBatch:
        """A moment of silence without question or answer."""
        if self.precomputed is None:
            speech: np.ndarray | Tensor = np.zeros(SAMPLE_RATE // 10, dtype=np.float32)
        else:
            speech = torch.zeros(_BLANK_FRAMES, self.precomputed)
        return replace(self.join([SpeechRow("", "sqa", 0.0, speech, "", "")], step), ids=[], addresses=[])

    def __call__(self, items: Sequence[Item], step: int) -> SpeechBatch:
        """Decode and join."""
        return self.join([self.decode(item) for item in items], step)

    def _labels_of(self, rows: Sequence[SpeechRow]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Unit-language words of each answer and their mask, none for rows without units."""
        if self.labels is None:
            return None, None
        none = np.zeros(0, dtype=np.uint16)
        words = self.labels.encode_batch([none if row.units is None else row.units for row in rows])
        return pad_rows([row.tolist() for row in words])

    def _plain(self, task: str) -> RowPrompt:
        return RowPrompt([self.prompt.before], self.prompt.after_asr if task == "asr" else self.prompt.after)

    def _dialogue(self, sample: Sample) -> tuple[RowPrompt | None, int]:
        """The prompt with the turns before the question, None where there are none; and how many have no room."""
        assert self.history is not None
        turns, spoken = turns_of(sample), self.history.spoken

        def cost(turn: Turn) -> int:
            if spoken and turn.audio is not None:
                return spoken_tokens(sample, turn, self.max_samples)
            return len(self.tokenize(turn.text))

        kept = newest(turns, self.history.tokens, cost)
        heard = [hear(sample, turn) if spoken and turn.audio is not None else turn for turn in kept]
        try:
            return self._with_turns(heard), len(turns) - len(kept)
        except EchoXError as error:
            raise CorruptSampleError(
                f"sample {sample.key}: {error.what}", kind="schema", fix="build the shard again"
            ) from error

    def _with_turns(self, turns: Sequence[Turn]) -> RowPrompt | None:
        """The prompt after these turns; those with a clip are heard."""
        assert self.history is not None
        if not turns:
            return None
        before, after = self.history.render(turns)
        clips = [turn.clip[: self.max_samples] for turn in turns if turn.clip is not None]
        tokenize = self.history.tokenize
        return RowPrompt([tokenize(piece) for piece in before], tokenize(after), clips)

    def _asked_after(self, turns: Sequence[Turn]) -> RowPrompt | None:
        """The same for turns in memory, with those left out that have no room."""
        if self.history is None:
            return None
        spoken = self.history.spoken
        turns = [turn if spoken else replace(turn, clip=None) for turn in turns]

        def cost(turn: Turn) -> int:
            if turn.clip is not None:
                return vectors(min(len(turn.clip), self.max_samples) / SAMPLE_RATE)
            return len(self.tokenize(turn.text))

        return self._with_turns(newest(turns, self.history.tokens, cost))

    def _audio(self, sample: Sample) -> tuple[np.ndarray, float]:
        return self._cut(decoded(sample, AUDIO, read_audio))

    def _cut(self, clip: np.ndarray) -> tuple[np.ndarray, float]:
        """What is heard of a clip, and the seconds that are not."""
        return clip[: self.max_samples], max(0, len(clip) - self.max_samples) / SAMPLE_RATE

    def _features(self, sample: Sample) -> tuple[Tensor, float]:
        features_Td = decoded(sample, ENCODED, unpack)
        shape = tuple(features_Td.shape)
        if shape[1:] != (self.precomputed,):
            raise CorruptSampleError(
                f"sample {sample.key}: {ENCODED} has shape {shape}, not [frames, {self.precomputed}]",
                kind="schema",
                fix="run `echox shards encode` again",
            )
        return features_Td, max(0.0, float(sample.meta.get("question_s") or 0) - self.max_samples / SAMPLE_RATE)

    def from_audio(
        self,
        audio: Sequence[np.ndarray],
        tasks: Sequence[str],
        transcripts: Sequence[str],
        answers: Sequence[str],
        *,
        ids: Sequence[str],
        weights: Sequence[float],
        step: int = -1,
        turns: Sequence[Sequence[Turn]] | None = None,
    ) -> SpeechBatch:
        """The same for audio in memory; serving passes empty transcripts and answers.

        `turns`: before each question; of those with a clip the sound is heard where the history is spoken.
        """
        prompts = [
            self._asked_after(before) if task == "sqa" else None
            for task, before in zip(tasks, turns or [()] * len(tasks), strict=True)
        ]
        rows = [
            SpeechRow(name, task, weight, clip, question, answer, cut_s, prompt=prompt)
            for (clip, cut_s), task, question, answer, name, weight, prompt in zip(
                map(self._cut, audio), tasks, transcripts, answers, ids, weights, prompts, strict=True
            )
        ]
        return self.join(rows, step)


@dataclass(frozen=True)
class UnitRow:
    """A sentence and the units that say it."""

    id: str
    weight: float
    text: list[int]
    units: np.ndarray


class UnitWords(Protocol):
    """What a unit language does here."""

    def check(self, units: np.ndarray) -> None:
        """Raise `DataError` for units it does not know."""
        ...

    def encode_batch(self, sequences: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Word ids of each sequence."""
        ...


class UnitCollate:
    """Items of tts sources to a `UnitBatch`.

    Args:
        tokenize: text to LLM token ids, without special tokens.
        language: of the units.
    """

    def __init__(self, tokenize: Callable[[str], list[int]], language: UnitWords) -> None:
        self.tokenize = tokenize
        self.language = language

    @property
    def members(self) -> frozenset[str]:
        """The units."""
        return frozenset({UNITS})

    def decode(self, item: Item) -> UnitRow:
        """Read the units, and tokenise.

        Raises:
            CorruptSampleError: no units, or not a whole number of them, or unknown ones, or no text.
        """
        units = decoded(item.sample, UNITS, partial(_known_units, self.language))
        text = text_of(item.sample, "answer_text")
        _need(item.sample, "answer_text", text, "its units would stand for no words")
        _said_in(item.sample, "answer_text", text, len(units) / FEWEST_UNITS_PER_S)
        return UnitRow(id_of(item.sample), item.weight, self.tokenize(text), units)

    def join(self, rows: Sequence[UnitRow], step: int) -> UnitBatch:
        """Encode the units of all rows into words at once, and pad."""
        text, text_mask = pad_rows([row.text for row in rows])
        words, words_mask = pad_rows([row.tolist() for row in self.language.encode_batch([row.units for row in rows])])
        return UnitBatch(
            ids=[row.id for row in rows],
            step=step,
            weight_B=torch.tensor([row.weight for row in rows], dtype=torch.float32),
            text_BT=text,
            text_mask_BT=text_mask,
            words_BM=words,
            words_mask_BM=words_mask,
        )

    def blank(self, step: int) -> UnitBatch:
        """Nothing to say."""
        return replace(self.join([UnitRow("", 0.0, [], np.zeros(0, dtype=np.uint16))], step), ids=[])

    def __call__(self, items: Sequence[Item], step: int) -> UnitBatch:
        """Decode and join."""
        return self.join([self.decode(item) for item in items], step)


def _known_units(language: UnitWords, data: bytes) -> np.ndarray:
    units = np.frombuffer(data, dtype="<u2")
    language.check(units)
    return units


def decoded(sample: Sample, member: str, decode: Callable[[bytes], ValueT]) -> ValueT:
    """A member through its decoder.

    Raises:
        CorruptSampleError: there is no such member (kind "member"), or the decoder fails (kind "decode").
    """
    data = sample[member]
    try:
        return decode(data)
    except (DataError, ValueError, EOFError) as error:
        reason = error.what if isinstance(error, DataError) else str(error)
        raise CorruptSampleError(
            f"sample {sample.key}: {member} cannot be decoded: {reason}", kind="decode", fix="build the shard again"
        ) from error


def text_of(sample: Sample, name: str) -> str:
    """A text of the metadata, "" where there is none.

    Raises:
        CorruptSampleError: it is something else (kind "schema").
    """
    value = sample.meta.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorruptSampleError(
            f"sample {sample.key}: {name} is a {type(value).__name__}, not text",
            kind="schema",
            fix="build the shard again",
        )
    return value


def _need(sample: Sample, name: str, text: str, otherwise: str) -> None:
    if text.strip():
        return
    raise CorruptSampleError(
        f"sample {sample.key}: {name} is empty; {otherwise}",
        kind="empty",
        fix="build the shard again without it, or with its text",
    )


def _said_in(sample: Sample, name: str, text: str, seconds: float) -> None:
    if len(text) <= sayable(seconds):
        return
    raise CorruptSampleError(
        f"sample {sample.key}: {name} has {len(text):,} characters, more than can be said in {seconds:.1f} s",
        kind="schema",
        fix="build the shard again without it, or with the text of its audio",
    )


def id_of(sample: Sample) -> str:
    """The sample's id: its metadata's, or its name."""
    return str(sample.meta.get("id") or sample.key)
