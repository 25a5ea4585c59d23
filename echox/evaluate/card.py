"""Writes the model card of a run in Hugging Face's format: what it is, was trained on, scores, and may be used for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.languages import ENGLISH, LANGUAGES
from echox.evaluate.columns import COLUMNS, QUALITY_COLUMNS, Column, cell, in_language, percent
from echox.evaluate.normalization import error_rate_name
from echox.evaluate.quality import MODEL as DNSMOS
from echox.evaluate.quality import PARTS, VOICES
from echox.evaluate.report import STAGES, streaming_rows
from echox.evaluate.run_facts import StageFacts, at, base_models, dataset_facts, stage_facts
from echox.files import write_atomically
from echox.release.assets import ASSETS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "MODEL_CARD.md"
DEMO_CORPORA = ("demo", "small")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LICENCES = {
    **{asset.folder.removeprefix("models/"): asset.licence for asset in ASSETS.values()},
    "openai/whisper-large-v3": "Apache-2.0",
    "meta-llama/Llama-3.2-3B-Instruct": "Llama 3.2 Community License",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama 3.1 Community License",
}
"""Of models that recipes of this project name; others are for the reader to look up."""
_OF_CARD = ("s2s_strict_acc", "s2t_strict_acc", "cascade_acc", "copy_acc", "retention_paired", "wer")
_TYPES = {"s2s_strict_acc": "accuracy", "s2t_strict_acc": "accuracy", "retention_paired": "retention", "wer": "wer"}
"""Of those, the ones of the model itself, with their kind in the header."""
_INTERVAL_OF = "S2S strict"
_OF_DEMO = (
    "Questions are about countries, in English, and spoken by a synthesiser; one voice answers. The demo shows that "
    "the method works, not what it reaches.",
)
_LIMITS = (
    "A share is of few questions; its interval is over them, and says nothing of what another training would give.",
    "Scores under another judge are not comparable: what a recogniser hears depends on it.",
    "DNSMOS was trained on noisy calls. It compares voices under one vocoder, and is no listening test.",
    "Not measured: other languages, noise, several speakers, dialogues, and whether answers are safe or true "
    "beyond the sets above.",
    "The text model's own mistakes and biases are those of its authors' model card; speech adds words said wrong.",
)


def write_card(path: Path, runs: Mapping[str, Path], result: Mapping[str, Any], commands: Mapping[str, str]) -> Path:
    """Write the card.

    Args:
        path: the Markdown file.
        runs: run folder of each stage that there is.
        result: see `write_report`.
        commands: what makes each stage, `text_llm_acc` and `phases`; that of the scores is in the result.
    """
    from huggingface_hub import ModelCard

    facts = {stage: stage_facts(folder) for stage, folder in runs.items()}
    name = runs["echo"].name if "echo" in runs else path.absolute().parent.name
    parts = [
        f"# {_plain(name)}",
        "A speech-to-speech model: it hears a question and answers aloud. Trained by the method of EchoX "
        "([arXiv 2509.09174](https://arxiv.org/abs/2509.09174)) on top of a text language model, which is frozen but "
        "for LoRA: speech is made from its hidden states.",
        _model(facts),
        _data(facts),
        _scores(result),
        _latency(result),
        _commands(result, commands),
        _limits(result),
        _licences(facts, result),
    ]
    header = _header(name, facts, result)
    text = f"---\n{header}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(path, str(ModelCard(text)))
    return path


def _header(name: str, facts: Mapping[str, StageFacts], result: Mapping[str, Any]) -> str:
    """The YAML of the card."""
    from huggingface_hub import ModelCardData

    bases = [ref for ref in base_models(facts) if _HUB_NAME.fullmatch(ref)]
    results = [each for name, row in result.get("sets", {}).items() for each in _of_set(name, row, result)]
    data = ModelCardData(
        model_name=name,
        language=_language(facts),
        license="other",
        license_name="see-licences-of-the-parts",
        pipeline_tag="audio-to-audio",
        tags=["echox", "speech-to-speech"],
        base_model=bases or None,
        eval_results=results or None,
    )
    return data.to_yaml().rstrip()


def _language(facts: Mapping[str, StageFacts]) -> str:
    """Of the last stage's recipe, by its code; a folder from elsewhere may name none."""
    named = [fact.recipe.get("language") for fact in facts.values()]
    return next((str(code) for code in reversed(named) if code in LANGUAGES), ENGLISH)


def _of_set(name: str, row: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The model's own scores on a set, without those that others are measured by."""
    from huggingface_hub import EvalResult

    task = "audio-to-audio" if row.get("s2t_acc") is not None else "automatic-speech-recognition"
    own = (row.get("quality") or {}).get("echo") or {}
    interval = row.get("interval_95")
    found = [
        (_type(column), column.label, row[column.key], {"n": row.get("n"), "judge": result.get("judge")})
        for column in in_language(COLUMNS, _told(result))
        if column.key in _TYPES and row.get(column.key) is not None
    ]
    found += [("dnsmos", f"DNSMOS {part}", own[part], {"n": own["n"]}) for part in PARTS if own]
    for kind, label, value, how in found:
        known = {key: given for key, given in how.items() if given is not None}
        if label == _INTERVAL_OF and interval:
            known["interval_95"] = [round(end, 4) for end in interval]
        yield EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            metric_type=kind,
            metric_name=label,
            metric_value=round(float(value), 4),
            metric_args=known,
        )


def _told(result: Mapping[str, Any]) -> str:
    """The language that the judge was told."""
    return str(result.get("language") or ENGLISH)


def _type(column: Column) -> str:
    return column.label.lower() if column.key == "wer" else _TYPES[column.key]


def _shown(result: Mapping[str, Any]) -> Iterator[Column]:
    return (column for column in in_language(COLUMNS, _told(result)) if column.key in _OF_CARD)


def _model(facts: Mapping[str, StageFacts]) -> str:
    rows = []
    for stage, fact in facts.items():
        title = STAGES[stage][0] if stage in STAGES else stage
        size = f"{fact.trained / 1e6:.2f} M" if fact.trained else "–"
        steps = "–" if fact.step is None else f"{fact.step:,}"
        rows.append((title, steps, size, fact.precision or "–", str(at(fact.recipe, "seed", default="–"))))
    recipe: Mapping[str, Any] = next((fact.recipe for fact in reversed(list(facts.values())) if fact.recipe), {})
    parts = [
        ("language", _language(facts)),
        ("text model", at(recipe, "model", "llm", "path")),
        ("speech encoder", at(recipe, "model", "speech_encoder", "path")),
        ("LoRA rank", at(recipe, "model", "llm", "lora", "r")),
        ("T2C and Echo decoder, layers × width", _size_of_t2c(recipe)),
        ("text that the teacher speaks", at(recipe, "model", "echo", "pseudo_text")),
    ]
    known = [(name, str(value)) for name, value in parts if value]
    if not rows and not known:
        return ""
    stages = _table(("stage", "steps", "trained", "precision", "seed"), rows) if rows else ""
    of_parts = _table(("part", ""), known) if known else ""
    return "\n\n".join(filter(None, ("## Model and stages", of_parts, stages)))


def _size_of_t2c(recipe: Mapping[str, Any]) -> str:
    layers, width = (at(recipe, "model", "t2c", key) for key in ("layers", "width"))
    return f"{layers} × {width}" if layers and width else ""


def _data(facts: Mapping[str, StageFacts]) -> str:
    rows = []
    for stage, fact in facts.items():
        for source in at(fact.recipe, "data", "train", default=[]) or []:
            if not isinstance(source, Mapping) or not isinstance(source.get("path"), str):
                continue
            path, task = source["path"], str(source.get("task", ""))
            samples, hours, fingerprint = dataset_facts(path)
            # The name that the reader of the run's metrics gives it, see `echox.stream`.
            read = [value for name, value in fact.seconds.items() if name == f"{path.replace('/', '-')}-{task}"]
            heard = f"{read[0] / 3600:.2f}" if read else "–"
            rows.append((stage, path, task, samples, hours, heard, fingerprint))
    if not rows:
        return ""
    head = ("stage", "set", "task", "samples", "hours", "hours read", "fingerprint")
    return f"## Data\n\n{_table(head, rows)}\n\nHours are of the audio in the set; those read count repetitions."


def _scores(result: Mapping[str, Any]) -> str:
    sets: Mapping[str, Mapping[str, Any]] = result.get("sets", {})
    if not sets:
        return ""
    shown = list(_shown(result))
    rows = [(name, str(row.get("n", "–")), *(cell(column.key, row) for column in shown)) for name, row in sets.items()]
    meanings = "\n".join(f"- {column.label}: {column.meaning}" for column in shown)
    judge = f"Judge: {_code(result.get('judge', ''))}, told that the language is {_code(_told(result))}. "
    judge = judge if result.get("judge") else ""
    about = "Each set was used for nothing but testing where its role is `test`."
    roles = [(name, str(row.get("role") or "–"), str(row.get("about") or "–")) for name, row in sets.items()]
    quality = [
        (name, VOICES[voice], *(cell(column.key, opinions) for column in QUALITY_COLUMNS))
        for name, row in sets.items()
        for voice, opinions in (row.get("quality") or {}).items()
    ]
    sound = (
        f"### How the speech sounds\n\nPredicted by {_code(DNSMOS)}, 1 to 5.\n\n"
        + _table(("set", "voice", *(column.label for column in QUALITY_COLUMNS)), quality)
        if quality
        else "Speech quality was not measured."
    )
    return "\n\n".join(
        (
            "## Scores",
            f"{judge}{about}",
            _table(("set", "n", *(column.label for column in shown)), rows),
            meanings,
            _table(("set", "role", "what is held out"), roles),
            sound,
            _teacher(result),
        )
    ).rstrip()


def _teacher(result: Mapping[str, Any]) -> str:
    """What bounds the words that can be heard at all."""
    names = {
        "t2c_heldout_wer": "the frozen T2C teacher on their text",
        "resynthesis_wer": "their true units, spoken again",
        "original_wer": "the original recordings",
    }
    rows = [(label, percent(result[name])) for name, label in names.items() if result.get(name) is not None]
    rate = error_rate_name(_told(result))
    wrong = {"WER": "words", "CER": "characters"}[rate]
    return f"Held-out sentences, {wrong} heard wrong:\n\n{_table(('spoken by', rate), rows)}" if rows else ""


def _latency(result: Mapping[str, Any]) -> str:
    rows = streaming_rows(result.get("streaming") or {})
    if not rows:
        return ""
    head = "## Latency\n\nStreamed answers, one at a time, on the machine of the evaluation."
    return f"{head}\n\n{_table(('streamed answers', ''), rows)}"


def _commands(result: Mapping[str, Any], commands: Mapping[str, str]) -> str:
    known = [*commands.values(), *([result["command"]] if result.get("command") else [])]
    lines = "\n".join(dict.fromkeys(" ".join(command.split()).replace("```", "") for command in known))
    return f"## Commands\n\n```bash\n{lines}\n```" if lines else ""


def _limits(result: Mapping[str, Any]) -> str:
    spoken = _OF_DEMO if result.get("corpus") in DEMO_CORPORA else ()
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in (*spoken, *_LIMITS))


def _licences(facts: Mapping[str, StageFacts], result: Mapping[str, Any]) -> str:
    judged = [result["judge"]] if result.get("judge") else []
    refs = dict.fromkeys([*base_models(facts), *judged, DNSMOS])
    rows = [(_short(ref), _LICENCES.get(ref, "see its source")) for ref in refs]
    return (
        "## Licences\n\nThe training code is Apache-2.0. Weights that are trained here derive from the models below, "
        f"whose licences go with them; data sets keep their own.\n\n{_table(('part', 'licence'), rows)}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(word) for word in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    return f"`{_short(text).replace('`', '')}`"


def _short(text: str, most: int = 200) -> str:
    return " ".join(str(text).split())[:most]


def _plain(text: str) -> str:
    """A text from outside as one line without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _short(text))
