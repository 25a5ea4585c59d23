"""Builds the demo corpus step by step; a step whose inputs have not changed is reported and skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.audio.io import encode_flac, read_audio
from echox.errors import EchoXError
from echox.files import sha256_file
from echox.release.assets import ASSETS, fetch, is_present
from echox.stream.format.catalogue import DATASET_NAME
from echox.stream.format.indexing import index_folder, is_indexed
from echox.stream.format.writer import write_shards
from shards.builder.records import INPUTS_NAME, PER_SHARD, digest, read_json, write_json
from shards.demo.facts import COUNTRIES, RELATIONS, Country, Relation, accepted
from shards.demo.phrasing import TRAIN_QUESTIONS, question
from shards.demo.plan import CorpusPlan, Fact, Item, Scale, plan_corpus, slug
from shards.demo.prompts import Prompt, read_prompts, split_prompts
from shards.demo.speech import HELDOUT_VOICES, TRAIN_RENDERINGS, Speaker, seconds
from shards.demo.units import UnitSettings, add_units, settings_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[str], None]

HELDOUT_PROMPTS = 60
ASKED_IN_WRITING = ("sqa-heldout-phrasing", "sqa-heldout-knowledge")
"""Test sets whose questions the text model is asked too: what it knows is the ceiling of what speech can keep."""
_PROBES = 2
"""Phrasings of a question that the text model must both answer right for the fact to count as known."""


class Asker:
    """The text model's answers, kept in a file so that a question is asked once.

    Args:
        store: JSON of answers by question, valid for one model.
        folder: the model; loaded only when something new is asked.
        progress: called with one line a batch.
    """

    def __init__(self, store: Path, folder: Path, progress: Progress) -> None:
        self.store, self.folder, self.progress = store, folder, progress
        identity = sha256_file(folder / "model.safetensors")
        saved = read_json(store)
        self.saved: dict[str, Any] = (
            saved if saved and saved["model"] == identity else {"model": identity, "answers": {}}
        )
        self._model: Any = None

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Answers in the order of the questions."""
        answers: dict[str, str] = self.saved["answers"]
        new = sorted({text for text in questions if text not in answers})
        if new:
            if self._model is None:
                from shards.demo.knowledge import TextModel

                self._model = TextModel(self.folder)
            started = time.perf_counter()

            def tell(done: int, total: int) -> None:
                rate = done / (time.perf_counter() - started)
                self.progress(f"text model: {done}/{total} questions, {rate:.1f}/s, {(total - done) / rate:.0f} s left")

            answers.update(zip(new, self._model.ask(new, tell), strict=True))
            write_json(self.store, self.saved)
        return [answers[text] for text in questions]

    def right(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[bool]:
        """Whether each (question, accepted answers) is answered right."""
        from echox.evaluate.text import answer_match

        answers = self.ask([text for text, _ in asked])
        return [answer_match(answer, list(golds)) for answer, (_, golds) in zip(answers, asked, strict=True)]


def known_facts(asker: Asker, countries: Sequence[Country] = COUNTRIES) -> list[Fact]:
    """Facts that the text model states in each of two phrasings; the second is asked only where the first was right."""
    facts: list[tuple[Country, Relation]] = [(country, relation) for relation in RELATIONS for country in countries]
    for probe in range(_PROBES):
        asked = [
            (question(TRAIN_QUESTIONS[relation][probe], country), accepted(country, relation))
            for country, relation in facts
        ]
        facts = [fact for fact, right in zip(facts, asker.right(asked), strict=True) if right]
    return [(country.name, relation) for country, relation in facts]


def item_samples(item: Item, waveforms: Sequence[NDArray[Any]], source: str) -> Iterator[dict[str, Any]]:
    """Samples of the data contract, one a voice."""
    for key, voice, samples in zip(item.keys(), item.utterance.voices, waveforms, strict=True):
        length = seconds(samples)
        meta: dict[str, Any] = {
            "id": key,
            "question_text": item.question_text,
            "answer_text": item.answer_text,
            "task": item.task,
            "question_s": None if item.task == "tts" else length,
            "answer_s": length if item.task == "tts" else None,
            "source": source,
            "voice": voice.name,
        }
        if item.answers:
            meta["answers"] = list(item.answers)
        if item.entity is not None:
            meta["entity"] = [item.entity, item.entity.removeprefix("the ")]
            meta["relation"] = item.relation
        member = "answer.flac" if item.task == "tts" else "question.flac"
        yield {"__key__": key, member: encode_flac(samples), "json": meta}


def prompt_samples(prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Samples of real recordings, resampled to 16 kHz."""
    for prompt in prompts:
        samples = read_audio(prompt.path)
        key = f"real-{slug(prompt.name)}"
        meta = {
            "id": key,
            "question_text": prompt.text,
            "answer_text": prompt.text,
            "task": "asr",
            "question_s": seconds(samples),
            "answer_s": None,
            "source": "asterisk-core-sounds-en",
            "voice": "allison",
        }
        yield {"__key__": key, "question.flac": encode_flac(samples), "json": meta}


def _built(folder: Path, inputs: Any) -> dict[str, Any] | None:
    """`dataset.json` of a set that is complete and of these inputs."""
    described = read_json(folder / DATASET_NAME)
    complete = described is not None and all(
        (folder / shard["name"]).is_file() and (folder / shard["name"]).stat().st_size == shard["bytes"]
        for shard in described["shards"]
    )
    return described if complete and read_json(folder / INPUTS_NAME) == digest(inputs) else None


def _build_set(
    folder: Path, inputs: Any, samples: Callable[[], Iterator[dict[str, Any]]], progress: Progress
) -> dict[str, Any]:
    """Write one set unless a complete one of the same inputs is there; returns its `dataset.json`."""
    described = _built(folder, inputs)
    if described is not None:
        if not is_indexed(folder):
            described = index_folder(folder)
        progress(f"{folder.name}: already built, {described['samples']} samples")
        return dict(described)
    started = time.perf_counter()
    described = write_shards(folder, samples(), PER_SHARD)
    write_json(folder / INPUTS_NAME, digest(inputs))
    progress(
        f"{folder.name}: {described['samples']} samples, {described['hours'] * 60:.1f} minutes of audio "
        f"in {time.perf_counter() - started:.0f} s"
    )
    return described


def _identity(prompts: Sequence[Prompt]) -> list[tuple[str, str, float]]:
    return [(prompt.name, prompt.text, prompt.seconds) for prompt in prompts]


class _SpokenSet:
    """One synthesised set, real recordings after it. Unless it is built, its sentences are begun when this is made."""

    def __init__(
        self, folder: Path, items: Sequence[Item], real: Sequence[Prompt], speaker: Speaker, voice: str, say: Progress
    ) -> None:
        self._folder, self._items, self._real, self._say = folder, items, real, say
        self._inputs = [voice, [asdict(item) for item in items], _identity(real)]
        self._spoken: Iterator[list[NDArray[Any]]] = iter(())
        self._started = time.perf_counter()
        if _built(folder, self._inputs) is None:
            self._spoken = speaker.speak([item.utterance for item in items], self._tell)

    def write(self) -> dict[str, Any]:
        """Write it as its sentences come; returns its `dataset.json`."""
        self._started = time.perf_counter()
        return _build_set(self._folder, self._inputs, self._samples, self._say)

    def _samples(self) -> Iterator[dict[str, Any]]:
        for item, waveforms in zip(self._items, self._spoken, strict=True):
            yield from item_samples(item, waveforms, "piper/en_US-joe-medium")
        yield from prompt_samples(self._real)

    def _tell(self, done: int, total: int) -> None:
        rate = done / (time.perf_counter() - self._started)
        self._say(f"{self._folder.name}: {done}/{total} sentences, {rate:.1f}/s, {(total - done) / rate:.0f} s left")


def real_prompts(cache: Path, progress: Progress) -> list[Prompt]:
    """The real recordings, fetched when they are absent; none, with a line saying why, when they cannot be had."""
    if not is_present("prompts", cache):
        try:
            fetch(["prompts"], progress, cache)
        except EchoXError as error:
            progress(f"real recordings: left out, the demo goes on without them: {error}")
            return []
    return read_prompts(cache / ASSETS["prompts"].folder)


def _accuracy(asker: Asker, items: Sequence[Item]) -> float:
    right = asker.right([(str(item.question_text), item.answers) for item in items])
    return round(sum(right) / len(right), 4) if right else 0.0


def build(
    cache: Path,
    progress: Progress | None = None,
    limit: int | None = None,
    threads: int | None = None,
    units: UnitSettings | None = None,
    scale: Scale = "demo",
) -> dict[str, Any]:
    """Build the demo corpus: questions the text model can answer, their spoken answers, real recordings, units.

    Args:
        cache: root of the cache; the corpus goes below `data/`, into a folder named like the scale.
        progress: called with one line a step or batch; None is silent.
        limit: samples a set at most, for a cut-down corpus.
        threads: sentences spoken at a time; None takes the processors this process may use.
        units: settings of the units; None takes the defaults, fewer units for a cut-down corpus.
        scale: how much the answer voice says.

    Returns:
        The content of `corpus.json`: known facts, held-out countries, the text model's accuracy on each held-out set,
        voices, counts, units, seconds taken.

    Raises:
        MissingModelError, NetworkError, AlteredModelError: one of the models cannot be had.
    """
    say: Progress = progress or (lambda line: None)
    root = cache / "data" / scale
    root.mkdir(parents=True, exist_ok=True)
    took: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        took[name] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()

    absent = [name for name in ("smollm2", "voice", "whisper-base") if not is_present(name, cache)]
    fetch(absent, say, cache)
    asker = Asker(root / "knowledge.json", cache / ASSETS["smollm2"].folder, say)
    facts = known_facts(asker, COUNTRIES if limit is None else COUNTRIES[:: max(1, len(COUNTRIES) // (2 * limit))])
    plan = plan_corpus(facts, limit, scale)
    heldout = {name: plan.sets[name] for name in ASKED_IN_WRITING}
    accuracy = {name: _accuracy(asker, items) for name, items in heldout.items()}
    say(f"facts: the text model knows {len(facts)} of {len(COUNTRIES) * len(RELATIONS)}")
    lap("knowledge")

    prompts = real_prompts(cache, say)
    real_train, real_heldout = split_prompts(prompts, HELDOUT_PROMPTS if limit is None else min(limit, HELDOUT_PROMPTS))
    if limit is not None:
        real_train = real_train[:limit]
    sets: dict[str, dict[str, Any]] = {}
    with Speaker(cache / ASSETS["voice"].folder, threads) as speaker:
        identity = sha256_file(speaker.model)
        # All before the first is written: no thread waits for the end of a set.
        spoken = {
            name: _SpokenSet(root / name, items, real_train if name == "asr-train" else [], speaker, identity, say)
            for name, items in plan.sets.items()
        }
        for name, each in spoken.items():
            sets[name] = each.write()
            lap(name)
    if real_heldout:
        folder = root / "asr-heldout-real"
        sets[folder.name] = _build_set(folder, _identity(real_heldout), lambda: prompt_samples(real_heldout), say)
        lap(folder.name)
    made = add_units(cache, say, units or settings_for(limit, scale), scale)
    lap("units")
    corpus = _corpus_record(plan, facts, accuracy, sets, len(real_train), took)
    corpus["units"] = {key: made[key] for key in ("settings", "units_per_s", "words_per_s", "vocabulary")}
    # A build that found everything done leaves the record, with the seconds of the build that did the work.
    record = root / "corpus.json"
    earlier = read_json(record)
    if earlier is None or {**earlier, "seconds": took} != corpus:
        write_json(record, corpus)
        return corpus
    return dict(earlier)


def _corpus_record(
    plan: CorpusPlan,
    facts: Sequence[Fact],
    accuracy: dict[str, float],
    sets: dict[str, dict[str, Any]],
    real_train: int,
    took: dict[str, float],
) -> dict[str, Any]:
    return {
        "version": 1,
        "facts": [f"{country}|{relation}" for country, relation in facts],
        "facts_known": {relation: sum(fact[1] == relation for fact in facts) for relation in RELATIONS},
        "facts_asked": len(COUNTRIES) * len(RELATIONS),
        "heldout_countries": list(plan.heldout_countries),
        "text_llm_acc": accuracy,
        "voices": {
            "answer": ["answer"],
            "train": [voice.name for group in TRAIN_RENDERINGS for voice in group],
            "heldout": [voice.name for voice in HELDOUT_VOICES],
        },
        "real_recordings": {"train": real_train, "heldout": sets.get("asr-heldout-real", {}).get("samples", 0)},
        "sets": {
            name: {
                "samples": described["samples"],
                "minutes": round(described["hours"] * 60, 2),
            }
            for name, described in sets.items()
        },
        "seconds": took,
    }
