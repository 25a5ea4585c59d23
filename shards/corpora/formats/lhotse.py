"""Reads Lhotse's cuts (`cuts.jsonl.gz`): a supervision is an utterance, or an answer with the question before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.corpora.formats.rows import Line, Row, Unusable, expanded, json_rows

_USER, _ASSISTANT = {"user"}, {"assistant", "agent", "model"}
_ANSWER = {name: f"answer_{name}" for name in ("audio", "offset", "duration", "channel")}


def is_cut(row: Row) -> bool:
    """Whether a JSON object is a cut of Lhotse."""
    return "supervisions" in row and "recording" in row or str(row.get("type", "")).endswith("Cut")


def rows(path: Path) -> Iterator[Line]:
    """A row for each supervision of each cut, or for each answer of a dialogue."""
    return expanded(json_rows(path), _of_cut)


def _of_cut(cut: Row) -> Iterator[Row]:
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        raise Unusable(f"a {kind}, which is computed from others; save it with its audio first")
    spoken = sorted(cut["supervisions"], key=lambda each: float(each["start"]))
    if not spoken:
        raise Unusable("a cut without supervision")
    speakers = {str(each.get("speaker", "")).lower() for each in spoken}
    if speakers & _ASSISTANT and speakers <= _USER | _ASSISTANT:
        yield from _dialogue(cut, spoken)
        return
    for each in spoken:
        more = {name: each[name] for name in ("speaker", "language", "gender") if each.get(name)}
        yield {"id": each["id"], "text": each.get("text"), **_place(cut, cut["recording"], each), **more}


def _dialogue(cut: Row, spoken: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Each answer with the question before it; the assistant's own recording is `target_audio`, where there is one."""
    target = (cut.get("custom") or {}).get("target_audio")
    turns: list[dict[str, str]] = []
    asked: Mapping[str, Any] | None = None
    found = 0
    for each in spoken:
        if str(each["speaker"]).lower() in _USER:
            if asked is not None:
                turns.append({"role": "user", "text": asked.get("text") or ""})
            asked = each
            continue
        if asked is not None:
            row: dict[str, Any] = {"id": each["id"], "turns": list(turns), **_place(cut, cut["recording"], asked)}
            row |= {"text": asked.get("text"), "answer_text": each.get("text")}
            if target is not None:
                row |= {_ANSWER[name]: value for name, value in _place(cut, target, each).items()}
            found += 1
            yield row
            turns.append({"role": "user", "text": asked.get("text") or ""})
        turns.append({"role": "assistant", "text": each.get("text") or ""})
        asked = None
    if not found:
        raise Unusable("an assistant who answers nobody")


def _place(cut: Row, recording: Mapping[str, Any], spoken: Mapping[str, Any]) -> dict[str, Any]:
    """File, span and channel of a supervision in a recording; its start counts from that of the cut."""
    if recording.get("transforms"):
        raise Unusable("its recording is to be changed (transforms); save it with its audio first")
    channel = spoken.get("channel", cut.get("channel", 0))
    channel = channel[0] if isinstance(channel, list) else channel
    sources = recording["sources"]
    source = next((each for each in sources if channel in each.get("channels", ())), sources[0])
    if source["type"] != "file":
        raise Unusable(f"sound of the type {str(source['type'])[:20]!r} is not fetched; save it to a file first")
    channels = list(source.get("channels", ()))
    return {
        "audio": str(source["source"]),
        "offset": max(0.0, float(cut["start"]) + float(spoken["start"])),
        "duration": float(spoken["duration"]),
        **({"channel": channels.index(channel)} if len(channels) > 1 and channel in channels else {}),
    }
