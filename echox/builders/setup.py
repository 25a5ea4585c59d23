"""Builds everything one rank trains with from a recipe: stage, loaders, and the identity of what is frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echox.audio.io import SAMPLE_RATE
from echox.builders.characters import token_characters
from echox.builders.data import open_sources, train_reader, transcripts, valid_readers
from echox.builders.dialogue import DialogueTemplate
from echox.builders.encoded import check_encoded, encoding_identity
from echox.builders.labels import keep_labels
from echox.builders.plain_text import PlainText
from echox.builders.prompt import PARTS, difference, prompt_of
from echox.builders.responses import build_decoder, find_answers
from echox.builders.stages import (
    build_echo_stage,
    build_s2t,
    build_s2t_stage,
    build_t2c,
    build_t2c_stage,
    build_t2c_text,
)
from echox.builders.unit_sets import check_units, run_files
from echox.builders.word_limit import settle
from echox.config.languages import full_stop
from echox.config.model_schema import T2cConfig
from echox.config.paths import is_url, resolve_data_file
from echox.config.schema import Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import MANIFEST, newest_manifest
from echox.engine.interfaces import StageSetup, TrainLoader
from echox.engine.object_store.reading import local_checkpoint
from echox.engine.precision import resolve_precision, torch_dtype
from echox.errors import CheckpointError, DataError, RecipeError
from echox.files import read_record
from echox.models.causal_lm import check_parts
from echox.models.compiled import compile_pointwise
from echox.models.t2c import T2CDecoder
from echox.release.exported import OWN_TABLE, TEACHER, earlier_tensors
from echox.release.pretrained import add_lora, load_causal_lm, load_tokenizer, load_whisper_encoder, model_folder
from echox.responses.attach import AnsweredBatches, AnsweredLoader, Lookup
from echox.responses.refresh import Refresher
from echox.stages.echo import EchoStage
from echox.stages.s2t import S2TStage
from echox.stages.t2c import T2CStage
from echox.stream.collate import Collate, PromptTokens, SpeechCollate, UnitCollate
from echox.stream.dialogue import History
from echox.stream.sampling.source import Source
from echox.units.language import UnitLanguage

log = logging.getLogger(__name__)

_RANDOM_WORDS = 7500
_CTC_TOKENS = "s2t.front_end.ctc_head.tokens"


def build_setup(recipe: Recipe, rank: int, world_size: int) -> StageSetup:
    """Build stage, loaders and the list of frozen models.

    Raises:
        MissingModelError, DataError, CheckpointError: a part the recipe names is absent or does not fit.
        RecipeError: the LLM has no such prompt, linear maps or layout, or cannot be called in parts.
    """
    torch.manual_seed(recipe.seed)
    text = TextTools.load(recipe)
    other_prompt = difference(recipe.model.llm.prompt, text.tokenizer, recipe.model.llm.path)
    if other_prompt and rank == 0:
        log.warning(other_prompt)
    train = open_sources(recipe, recipe.data.train, quiet=rank > 0)
    valid = open_sources(recipe, recipe.data.valid)
    _check_encoded(recipe, [*train, *valid])  # before any model is loaded
    check_inits(recipe)
    check_units(recipe, [*train, *valid], text.language, quiet=rank > 0)
    answers = find_answers(recipe, text.prompt, train, valid)
    collate = build_collate(recipe, text)
    recipe, words, limit = settle(recipe, train, collate)
    # Tokenising every transcript takes minutes on a large corpus, and only this vocabulary is made of them.
    from_corpus = recipe.stage == "s2t" and recipe.model.ctc.vocabulary == "corpus"
    spoken = (token for line in transcripts(train) for token in text.tokenize(line)) if from_corpus else None
    module = build_stage(recipe, text, transcripts=spoken)
    if isinstance(module, EchoStage):
        keep_labels(recipe, module, rank)
    reader = train_reader(recipe, train, collate, rank, world_size)
    train_loader: TrainLoader = reader
    valid_loaders: Mapping[str, Iterable[Any]] = valid_readers(recipe, valid, collate, rank, world_size)
    refresh = None
    if answers.tables:
        lookup = Lookup(answers.tables)
        refresh = build_refresh(recipe, text, train, collate, lookup, reader.passes)
        train_loader = AnsweredLoader(train_loader, lookup)
        valid_loaders = {name: AnsweredBatches(batches, lookup) for name, batches in valid_loaders.items()}
    return StageSetup(
        module=module,
        train_loader=train_loader,
        valid_loaders=valid_loaders,
        frozen_models=frozen_models(recipe),
        files=run_files(recipe, text.language, words_per_token=words) | answers.files,
        refresh=refresh,
        notes={"word_limit": limit} if limit else {},
        compiled=compile_pointwise(module)._asdict() if recipe.engine.compile else {},
    )


@dataclass(frozen=True)
class TextTools:
    """Tokenizer and template tokens of a recipe.

    Attributes:
        tokenizer: the LLM's.
        prompt: template around a spoken turn.
        stop: id of the full stop of the recipe's language, or of its last byte: the streaming trigger.
        prefix, header: T2C template tokens; empty where the recipe has no T2C.
        language: unit language, where the recipe has a T2C.
        dialogue: renders the turns before a spoken one.
        plain: keeps control tokens out of the data's texts.
    """

    tokenizer: Any
    prompt: PromptTokens
    stop: int
    prefix: list[int]
    header: list[int]
    language: UnitLanguage | None
    dialogue: DialogueTemplate
    plain: PlainText

    @classmethod
    def load(cls, recipe: Recipe) -> TextTools:
        """Load the tokenizer and tokenise the templates.

        Raises:
            MissingModelError: there is no tokenizer.
            RecipeError: the recipe leaves the prompt to a chat template that there is not, or its end is no token.
        """
        llm, t2c, random_init = recipe.model.llm, recipe.model.t2c, recipe.model.random_init
        tokenizer = load_tokenizer(llm.path, random_init=random_init)
        ids = partial(_ids, tokenizer)
        template = prompt_of(llm.prompt, tokenizer, llm.path, random_init=random_init)
        before, after, end = (str(getattr(template, part)) for part in PARTS)
        single = {"end": end, "begin": template.begin, "unseen": template.unseen}
        one = {part: ids(given) for part, given in single.items() if given is not None}
        for part, found in one.items():
            if len(found) != 1 and not random_init:
                own = {"end": "end-of-turn", "begin": "begin-of-text", "unseen": "control"}[part]
                raise RecipeError(
                    f"model.llm.prompt.{part}={single[part]!r} is {len(found)} tokens of {llm.path}; it must be one",
                    fix=f"use the LLM's own {own} token",
                )
        prompt = PromptTokens(
            before=ids(before),
            after=ids(after),
            after_asr=ids(recipe.data.asr_instruction + after),
            **{part: found[-1] for part, found in one.items()},
        )
        if prompt.unseen is not None and prompt.after[-1:] == [prompt.unseen]:
            raise RecipeError(
                f"model.llm.prompt.unseen={template.unseen!r} ends model.llm.prompt.after, and the answer begins there",
                fix="end the prompt with another token",
            )
        language = None
        if t2c is not None:
            try:
                language = UnitLanguage.load(resolve_data_file(t2c.unit_language))
            except DataError:
                if not random_init:
                    raise
        return cls(
            tokenizer,
            prompt,
            ids(full_stop(recipe.language))[-1],
            ids(t2c.prefix) if t2c else [],
            ids(t2c.unit_header) if t2c else [],
            language,
            DialogueTemplate(template, tokenizer, llm.path),
            PlainText(tokenizer),
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text of the data, which holds no special token whatever it spells out."""
        return _ids(self.tokenizer, self.plain(text))

    def tokenize_template(self, text: str) -> list[int]:
        """Token ids of a rendered template, with the special tokens that it spells out."""
        return _ids(self.tokenizer, text)

    def characters(self, t2c: T2cConfig) -> list[int] | None:
        """Characters of each token of the vocabulary, where a T2C places its text by them."""
        if t2c.units_per_character is None:
            return None
        return token_characters(self.tokenizer)

    @property
    def words(self) -> int:
        """Size of the unit language."""
        return self.language.size if self.language else _RANDOM_WORDS

    @property
    def word_units(self) -> list[int]:
        """Units of each word of the unit language; none where there is no language."""
        return [len(word) for word in self.language.words] if self.language else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def build_stage(
    recipe: Recipe, text: TextTools, *, transcripts: Iterable[int] | None = None
) -> S2TStage | T2CStage | EchoStage:
    """The stage's module with pretrained parts and the weights of earlier stages in place.

    Args:
        recipe: what to build.
        text: its tokenizer and templates.
        transcripts: LLM tokens of the training transcripts, the CTC classes of `vocabulary: corpus`.
    """
    model = recipe.model
    dtype = torch_dtype(resolve_precision(recipe.engine.precision))
    causal_lm = load_causal_lm(model.llm.path, dtype, random_init=model.random_init)
    if recipe.engine.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    table = causal_lm.get_input_embeddings()

    def decoder() -> T2CDecoder:
        assert model.t2c is not None
        return build_t2c(
            model.t2c,
            words=text.words,
            text_table=table,
            layout=model.layout,
            word_units=text.word_units,
            llm=causal_lm.config,
        )

    if recipe.stage == "t2c":
        assert model.t2c is not None
        return build_t2c_stage(
            decoder(),
            table,
            text.prefix,
            text.header,
            build_t2c_text(model.t2c, table, text.characters(model.t2c), causal_lm.get_output_embeddings().weight),
        )

    assert model.speech_encoder is not None
    encoder = load_whisper_encoder(model.speech_encoder.path, dtype, random_init=model.random_init)
    earlier = earlier_tensors(recipe.init.s2t, "s2t", recipe.stage)
    tokens = earlier.get(_CTC_TOKENS) if earlier else None
    if tokens is None:
        tokens = ctc_tokens(len(table.weight), transcripts if model.ctc.vocabulary == "corpus" else None)
    wrapped = add_lora(causal_lm, model.llm.lora)
    s2t = build_s2t(model, wrapped, causal_lm, encoder, tokens, unseen=text.prompt.unseen)
    check_parts(causal_lm, model.layout)
    if recipe.stage == "s2t":
        stage: S2TStage | EchoStage = build_s2t_stage(model, s2t)
    else:
        assert model.t2c is not None
        decoders = [decoder(), decoder()]
        decoders[1].load_state_dict(decoders[0].state_dict())
        stage = build_echo_stage(
            model.echo,
            s2t=s2t,
            teacher=decoders[0],
            echo=decoders[1],
            prefix=text.prefix,
            header=text.header,
            stop_token=text.stop,
            end_token=text.prompt.end,
            t2c_text=build_t2c_text(
                model.t2c, table, text.characters(model.t2c), causal_lm.get_output_embeddings().weight
            ),
        )
        t2c = earlier_tensors(recipe.init.t2c, "t2c", recipe.stage)
        own_table = {name: t2c.pop(name) for name in (OWN_TABLE,) if name in t2c}
        if model.t2c.text_table == "own" and not own_table and not model.random_init:
            raise CheckpointError(
                "model.t2c.text_table=own, but init.t2c names no folder with a text table of its own",
                where=str(recipe.init.t2c),
                fix="name the folder that `echox import` wrote, or leave the key out",
            )
        if t2c:
            load_tensors(stage, own_table)
            for target in (TEACHER, "echo."):
                load_tensors(stage, {target + name.removeprefix("t2c."): value for name, value in t2c.items()})
    if earlier:
        load_tensors(stage, earlier)
    return stage


def ctc_tokens(vocabulary: int, transcripts: Iterable[int] | None) -> Tensor:
    """LLM token of each CTC class: the placeholder (id V) as blank, then every token or those of the corpus."""
    seen = range(vocabulary) if transcripts is None else sorted(set(transcripts))
    return torch.tensor([vocabulary, *seen], dtype=torch.long)


def load_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy named tensors into a module.

    Raises:
        CheckpointError: a name the module lacks, or another shape: the weights belong to another recipe.
    """
    known = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in tensors.items():
        if name not in known or known[name].shape != value.shape:
            found = tuple(known[name].shape) if name in known else "nothing"
            raise CheckpointError(
                f"weights of an earlier stage do not fit: {name} is {tuple(value.shape)}, the recipe builds {found}",
                fix="use the same model section in all three recipes",
            )
        with torch.no_grad():
            known[name].copy_(value)


def build_collate(recipe: Recipe, text: TextTools) -> Collate[Any, Any]:
    """Samples to batches for the recipe's stage."""
    if recipe.stage == "t2c":
        if text.language is None:
            raise RecipeError(
                "stage t2c needs a fitted unit language", fix="fit one, or correct model.t2c.unit_language"
            )
        return UnitCollate(text.tokenize, text.language)
    return build_speech_collate(recipe, text)


def build_speech_collate(recipe: Recipe, text: TextTools) -> SpeechCollate:
    """Audio to batches of the S2T model."""
    from echox.audio.features import LogMel
    from echox.release.pretrained import encoder_width, mel_bins

    speech = recipe.model.speech_encoder
    assert speech is not None
    log_mel = LogMel(
        mel_bins(speech.path, random_init=recipe.model.random_init),
        input_mode=speech.input,
        margin_s=speech.margin_s,
        stack=recipe.model.alignment.stack,
    )
    return SpeechCollate(
        text.tokenize,
        text.prompt,
        log_mel,
        int(speech.max_audio_s * SAMPLE_RATE),
        precomputed=encoder_width(speech.path) if speech.precomputed else None,
        needs_transcript=_trains_ctc(recipe),
        history=_history(recipe, text),
        labels=_annotated(recipe, text),
    )


def _trains_ctc(recipe: Recipe) -> bool:
    ctc = recipe.model.ctc
    if recipe.stage == "echo":
        return recipe.model.echo.ctc_weight > 0
    return recipe.stage == "s2t" and (ctc.weight > 0 or ctc.align_steps > 0)


def _annotated(recipe: Recipe, text: TextTools) -> UnitLanguage | None:
    """The language of the units that are the labels of Stage III."""
    if recipe.stage != "echo" or recipe.model.echo.labels != "annotated":
        return None
    if text.language is None:
        raise RecipeError(
            "model.echo.labels=annotated needs a fitted unit language",
            fix="fit one, or correct model.t2c.unit_language",
        )
    return text.language


def _history(recipe: Recipe, text: TextTools) -> History | None:
    data = recipe.data
    if not data.history_tokens:
        return None
    return History(text.dialogue, text.tokenize_template, data.history_tokens, spoken=data.history == "speech")


def build_refresh(
    recipe: Recipe,
    text: TextTools,
    sources: list[Source],
    collate: Collate[Any, Any],
    lookup: Lookup,
    passes: Callable[[], float],
) -> Refresher | None:
    """What answers the training questions again every `model.echo.refresh_every` epochs; None where nothing does."""
    if recipe.model.echo.refresh_every == 0:
        return None
    assert isinstance(collate, SpeechCollate)
    return Refresher(
        lookup=lookup,
        sources=sources,
        collate=collate,
        decoder=build_decoder(recipe, text.prompt, text.tokenizer),
        batch=recipe.model.echo.respond.batch,
        every=recipe.model.echo.refresh_every,
        passes=passes,
    )


def frozen_models(recipe: Recipe) -> dict[str, Path]:
    """Folder of every pretrained model whose weights stay as they are."""
    refs = {"llm": recipe.model.llm.path}
    if recipe.stage != "t2c" and recipe.model.speech_encoder:
        refs["speech_encoder"] = recipe.model.speech_encoder.path
    folders = {name: model_folder(ref, random_init=recipe.model.random_init) for name, ref in refs.items()}
    if recipe.stage == "echo":
        folders |= {f"init.{part}": find_weights(ref).parent for part, ref in _inits(recipe)}
    return {name: folder for name, folder in folders.items() if folder is not None}


def check_inits(recipe: Recipe) -> None:
    """Refuse to start from a run that goes on: each rank would take what is newest when it looks.

    Raises:
        CheckpointError: a run that `init` names has not come to its last step.
    """
    for part, ref in _inits(recipe):
        manifest = _newest(ref)
        if manifest is None:
            continue  # a checkpoint that was named itself; or none at all, which loading says in full
        contents = read_record(manifest.parent, manifest.name)
        try:
            steps = int(contents.get("recipe", {}).get("optim", {}).get("steps", 0))
            step = int(contents.get("step", steps))
        except (AttributeError, TypeError, ValueError):
            continue  # no manifest, which loading says in full
        if step < steps:
            raise CheckpointError(
                f"init.{part} names a run that has come to step {step:,} of {steps:,}",
                where=ref,
                fix=f"let it finish, or name its checkpoint to start from that: init.{part}={manifest.parent}",
            )


def _newest(ref: str) -> Path | None:
    """Manifest of the newest checkpoint of a run; None for a checkpoint that was named itself, or where none is."""
    if is_url(ref):
        chosen = local_checkpoint(ref)
        return None if chosen is None else chosen.path / MANIFEST
    return None if (Path(ref) / MANIFEST).is_file() else newest_manifest(Path(ref))


def _inits(recipe: Recipe) -> list[tuple[str, str]]:
    given = {"s2t": recipe.init.s2t, "t2c": recipe.init.t2c}
    return [(part, ref) for part, ref in given.items() if ref]


def _check_encoded(recipe: Recipe, sources: Iterable[Source]) -> None:
    speech = recipe.model.speech_encoder
    if recipe.stage == "t2c" or speech is None or not speech.precomputed:
        return
    identity = encoding_identity(recipe.model)
    for source in sources:
        check_encoded(Path(source.catalogue.location), identity)
