"""Runs a trained speech-to-speech model: question audio to text and units, in batches or while they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from echox.audio.io import SAMPLE_RATE
from echox.builders.setup import TextTools, build_speech_collate, build_stage, load_tensors
from echox.builders.unit_sets import check_language, with_own_language
from echox.builders.word_limit import with_own_limit
from echox.config.schema import InitConfig, Recipe
from echox.device import best_device
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import read_manifest
from echox.engine.checkpoint.recorded import is_exported, recipe_of
from echox.errors import CheckpointError, DataError
from echox.models.echo import Segments, segment_rows
from echox.models.ragged import lengths_to_mask
from echox.models.s2t import Generated, most_probable
from echox.models.t2c import T2CDecoder
from echox.release.exported import check_frozen, read_tensors
from echox.speak.answers import Answer
from echox.speak.engine import Engine
from echox.speak.events import Event, Failed
from echox.speak.incremental_text import IncrementalText
from echox.speak.sampling import GREEDY, SeededSampling
from echox.speak.segments import SegmentSpeech
from echox.stages.echo import EchoStage
from echox.stages.s2t import S2TStage
from echox.stream.batch import SpeechBatch
from echox.stream.dialogue import Turn, parse_turns
from echox.units.identity import UnitPart

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.speak.vocoder import Vocoder


STREAMED_TOKENS = 512
"""Most text tokens of a streamed answer."""

Dialogues = Sequence[Sequence[Turn | Mapping[str, Any]]]
"""The turns before each question, oldest first."""


@dataclass(frozen=True)
class SpokenAnswer:
    """What the model says to one question.

    Attributes:
        text: its own text.
        units: speech units that the Echo decoder made of its hidden states, uint16.
        cascade: those that the frozen T2C teacher made of the same tokens in the same segments, where asked for.
        failed: segments that have no end within the words they may have, or no units, and why.
    """

    text: str
    units: NDArray[np.uint16]
    cascade: NDArray[np.uint16] | None = None
    failed: tuple[Failed, ...] = ()


class SpeechToSpeech:
    """An S2T or Echo run, loaded for inference.

    Args:
        recipe: of the run.
        stage: its module with trained weights, in eval mode.
        text: tokenizer, templates and unit language.
        max_new: most text tokens of an answer.
    """

    def __init__(self, recipe: Recipe, stage: S2TStage | EchoStage, text: TextTools, max_new: int = 64) -> None:
        self.recipe = recipe
        self.stage = stage.eval()
        self.max_new = max_new
        self._text = text
        self._collate = build_speech_collate(recipe, text)
        self._device = next(stage.parameters()).device

    @classmethod
    def load(cls, run_or_checkpoint: Path, device: str | None = None) -> SpeechToSpeech:
        """Load the newest good checkpoint of a run folder, the checkpoint given, or an exported folder.

        The unit language is the one that the run keeps; only for older runs, the one that the recipe names.

        Raises:
            CheckpointError: no checkpoint, one of a stage that hears no speech, or another unit language than it had.
            AlteredModelError: an exported folder meets another speech encoder than it was trained with.
        """
        weights = find_weights(run_or_checkpoint)
        recipe = recipe_of(weights.parent)
        if is_exported(weights.parent):
            check_frozen(recipe, read_manifest(weights.parent))
        if recipe.stage == "t2c":
            raise CheckpointError("a t2c run hears no speech", where=str(weights), fix="name an s2t or echo run")
        recipe = with_own_limit(with_own_language(recipe, weights.parent), weights.parent)
        text = TextTools.load(recipe)
        if recipe.stage == "echo" and recipe.model.t2c is not None and text.language is not None:
            check_language(text.language, recipe.model.t2c.unit_language, weights.parent)
        if recipe.stage == "s2t":
            # An S2T run is complete in itself: its own weights stand for those of an earlier stage.
            stage = build_stage(recipe.model_copy(update={"init": InitConfig(s2t=str(weights.parent))}), text)
        else:
            stage = build_stage(recipe, text)
            load_tensors(stage, read_tensors(weights))
        assert isinstance(stage, S2TStage | EchoStage)
        stage = stage.eval().to(device or best_device())
        weight = next(stage.s2t.causal_lm.parameters())
        if weight.device.type == "cpu" and weight.dtype == torch.float32:  # bf16 would round a part of the updates away
            stage.s2t.merge()
        return cls(recipe, stage, text)

    def _batch(self, clips: Sequence[NDArray[np.float32]], task: str, turns: Dialogues | None = None) -> SpeechBatch:
        count = len(clips)
        batch = self._collate.from_audio(
            clips,
            [task] * count,
            [""] * count,
            [""] * count,
            ids=[""] * count,
            weights=[1.0] * count,
            turns=None if turns is None else _parsed(turns),
        )
        return batch.to(self._device)

    @property
    def units(self) -> UnitPart:
        """Which units it speaks in."""
        language = self._text.language
        return UnitPart(f"run {self.recipe.name}", None if language is None else language.unit_set)

    @property
    def max_audio_s(self) -> float:
        """What is heard of a clip, seconds; the rest is cut off."""
        return self._collate.max_samples / SAMPLE_RATE

    @property
    def reads_history(self) -> bool:
        """Whether turns before a question enter its prompt, as the run was trained (`data.history_tokens`)."""
        return self._collate.history is not None

    def generate(
        self,
        clips: Sequence[NDArray[np.float32]],
        task: str = "sqa",
        turns: Dialogues | None = None,
        sampling: SeededSampling = GREEDY,
    ) -> Generated:
        """Text and its hidden states for 16 kHz mono clips.

        Args:
            clips: the questions.
            task: `sqa`, or `asr`, which has no turns before it.
            turns: the dialogue before each question: `Turn`s, or objects with `role` and `text`. Those with a clip are
                heard where the run was trained so (`data.history: speech`), the others read.
            sampling: how the next token is picked; the same random numbers for each clip.

        Raises:
            DataError: they are no turns.
        """
        stage = self.stage
        at_tokens = isinstance(stage, EchoStage) and stage.config.state == "own"
        batch, choose = self._batch(clips, task, turns), sampling.choose(self.max_new)
        return stage.s2t.generate(batch, self._text.prompt.end, self.max_new, choose=choose, at_tokens=at_tokens)

    def write(
        self, clips: Sequence[NDArray[np.float32]], task: str = "sqa", turns: Dialogues | None = None
    ) -> list[str]:
        """Text answers (`sqa`) or transcripts (`asr`), see `generate`."""
        return self._decode(self.generate(clips, task, turns))

    def transcribe(self, clip: NDArray[np.float32], max_new: int = STREAMED_TOKENS) -> Iterator[str]:
        """The transcript of a 16 kHz mono clip, as it is after each of its tokens."""
        batch = self._batch([clip], "asr")
        with torch.no_grad():
            speech = self.stage.s2t.encode_speech(batch)
            decode = self.stage.s2t.begin_text(speech, batch, self._text.prompt.end)
        tokens: list[int] = []
        while decode.places < max_new and not bool(decode.ended_B):  # host sync
            token = int(decode.write(most_probable).token_B)
            tokens += [] if token == self._text.prompt.end else [token]
            yield self._plain(tokens).strip()

    @torch.no_grad()
    def answer(
        self,
        clips: Sequence[NDArray[np.float32]],
        turns: Dialogues | None = None,
        *,
        cascade: bool = False,
        sampling: SeededSampling = GREEDY,
    ) -> list[SpokenAnswer]:
        """Text and units: the Echo decoder reads the hidden states of the text, segment by segment.

        Args:
            clips: the questions.
            turns: see `generate`.
            cascade: let the frozen T2C teacher speak the same text as well.
            sampling: see `generate`.

        Raises:
            CheckpointError: the run is an S2T run, which does not speak.
            DataError: `turns` are none.
        """
        stage = self._speaking()
        own = self.generate(clips, turns=turns, sampling=sampling)
        rows = segment_rows(stage.segments(own.hidden_BRh, own.mask_BR), own.mask_BR)
        units, failed = self._units(stage.echo, stage.adapt(own.hidden_BRh), own.tokens_BR, rows)
        taught: Sequence[NDArray[np.uint16] | None] = [None] * len(clips)
        if cascade:
            taught, _ = self._units(stage.teacher.decoder, stage.embed_text(own.tokens_BR), own.tokens_BR, rows)
        return [SpokenAnswer(*each) for each in zip(self._decode(own), units, taught, failed, strict=True)]

    def engine(self) -> Engine:
        """What steps the answers that `begin` begins.

        Raises:
            CheckpointError: the run is an S2T run, which does not speak.
        """
        stage, language = self._speaking(), self._text.language
        assert language is not None
        return Engine(stage, language, self._text.prompt.end)

    @torch.no_grad()
    def begin(
        self,
        engine: Engine,
        question: NDArray[np.float32],
        history: Sequence[Turn | Mapping[str, Any]] = (),
        *,
        vocoder: Vocoder | None = None,
        sampling: SeededSampling = GREEDY,
        max_new: int = STREAMED_TOKENS,
        cancelled: Callable[[], bool] | None = None,
    ) -> Answer:
        """Hear a question and let an engine answer it, see `stream`; one that is cancelled meanwhile has ended.

        Raises:
            DataError: `history` is no list of turns.
        """
        stage = self._speaking()
        batch = self._batch([question], "sqa", [history] if history else None)
        answer = Answer(IncrementalText(self._plain), stage.cutter(), vocoder, cancelled)
        batch = stage.s2t.hear(batch)
        if answer.goes_on():
            decode = stage.s2t.begin_text(stage.s2t.encode_speech(batch), batch, self._text.prompt.end)
            engine.begin(answer, decode, sampling.choose(max_new), max_new)
        return answer

    def stream(
        self,
        question: NDArray[np.float32],
        history: Sequence[Turn | Mapping[str, Any]] = (),
        *,
        vocoder: Vocoder | None = None,
        sampling: SeededSampling = GREEDY,
        max_new: int = STREAMED_TOKENS,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """Text, units and audio of one answer as they come: those of `answer`, and of the vocoder on all units.

        Closing the iterator ends the answer and frees all that was kept for it.

        Args:
            question: 16 kHz mono.
            history: the turns before it, see `generate`.
            vocoder: makes `Audio` of the units; None for units alone.
            sampling: how the next token is picked.
            max_new: most text tokens.
            cancelled: asked before every step, the first one after the speech encoder; once true, `Done` comes next.

        Raises:
            CheckpointError: the run is an S2T run, which does not speak.
            DataError: `history` is no list of turns.
        """
        engine = self.engine()
        answer = self.begin(
            engine, question, history, vocoder=vocoder, sampling=sampling, max_new=max_new, cancelled=cancelled
        )
        try:
            yield from answer.take()
            while not answer.finished:
                engine.turn()
                yield from answer.take()
        finally:
            engine.drop(answer)

    @torch.no_grad()
    def say(self, texts: Sequence[str]) -> list[NDArray[np.uint16]]:
        """Units that the frozen T2C teacher makes of texts, each as one segment, as in its training.

        Raises:
            CheckpointError: the run is an S2T run, which does not speak.
        """
        stage = self._speaking()
        ids = [self._collate.tokenize(text) for text in texts]
        # A text without a token takes a column that its mask leaves out.
        tokens_BR = pad_sequence([torch.tensor(row or [0]) for row in ids], batch_first=True).to(self._device)
        lengths_B = torch.tensor([len(row) for row in ids], device=self._device)
        rows = segment_rows(torch.zeros_like(tokens_BR), lengths_to_mask(lengths_B, tokens_BR.shape[1]))
        return self._units(stage.teacher.decoder, stage.embed_text(tokens_BR), tokens_BR, rows)[0]

    def _speaking(self) -> EchoStage:
        if not isinstance(self.stage, EchoStage) or self._text.language is None:
            raise CheckpointError("an s2t run does not speak", fix="name a run of the echo stage")
        return self.stage

    def _units(
        self, decoder: T2CDecoder, text_BRh: Tensor, tokens_BR: Tensor, rows: Segments
    ) -> tuple[list[NDArray[np.uint16]], list[tuple[Failed, ...]]]:
        """Units of each text, decoded segment by segment from its embeddings or from what stands for them.

        And the segments of each that failed.
        """
        language = self._text.language
        assert language is not None
        owners = rows.owner_N.tolist()
        pieces: list[list[NDArray[np.uint16]]] = [[] for _ in owners]
        failed: list[list[Failed]] = [[] for _ in tokens_BR]
        first = [owners.index(owner) for owner in owners]
        speech: SegmentSpeech[int] = SegmentSpeech(self._speaking(), decoder, language)
        if bool(rows.mask_NT.any()):  # where no text has a token, one row without a token stands for them all
            speech.open(range(len(owners)), text_BRh, tokens_BR, rows)
        while len(speech):
            for row, units, _, failure in speech.run():
                pieces[row].append(units)
                if failure:
                    failed[owners[row]].append(Failed(row - first[row], failure))
        whole = [[np.zeros(0, np.uint16)] for _ in tokens_BR]
        for owner, piece in zip(owners, pieces, strict=True):
            whole[owner] += piece
        in_order = [tuple(sorted(each, key=lambda one: one.segment)) for each in failed]
        return [np.concatenate(each) for each in whole], in_order

    def _decode(self, own: Generated) -> list[str]:
        rows = [tokens[mask].tolist() for tokens, mask in zip(own.tokens_BR, own.mask_BR, strict=True)]
        return [self._plain(row).strip() for row in rows]

    def _plain(self, tokens: Sequence[int]) -> str:
        text: str = self._text.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _parsed(dialogues: Dialogues) -> list[list[Turn]]:
    try:
        return [parse_turns(turns) for turns in dialogues]
    except ValueError as error:
        raise DataError(f"the turns before a question cannot be read: {error}", fix="correct them") from error
