"""Finds a speaker of a vocoder folder by name or number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echox.config.mistakes import nearest
from echox.errors import DataError, MissingModelError
from echox.files import read_json
from echox.vocoder.shape import SPEAKER_IDS

_NAMED = 12
"""Speakers that a sentence names."""
_NUMBER = re.compile(r"[0-9]{1,9}")


def read_vocoder_config(folder: str | Path) -> Mapping[str, Any]:
    """`config.json` of a vocoder folder of either kind.

    Raises:
        MissingModelError: there is none.
    """
    try:
        return dict(read_json(Path(folder) / "config.json"))
    except (OSError, ValueError, TypeError) as error:
        raise MissingModelError(
            "There is no vocoder in the folder",
            where=str(folder),
            fix="Name a vocoder folder, or build the demo corpus.",
        ) from error


def speaker_row(folder: str | Path, speaker: str | None) -> int:
    """Row of a speaker in the table of a vocoder.

    Args:
        folder: the vocoder.
        speaker: a name of its `config.json`, or the number of a row, from 0; None for the first.

    Raises:
        MissingModelError: there is no vocoder, or its names have no rows.
        DataError: it has no such speaker.
    """
    if speaker is None:
        return 0
    config = read_vocoder_config(folder)
    rows = config.get("vocoder_num_spkrs") if config.get("spkr_embed_dim") else 0
    names = config.get(SPEAKER_IDS) or {}
    if type(rows) is not int or not isinstance(names, dict) or not all(_is_row(row, rows) for row in names.values()):
        raise MissingModelError(
            "The names of the vocoder's speakers lead to no rows", where=str(folder), fix="Restore its config.json."
        )
    row = names.get(speaker, int(speaker) if _NUMBER.fullmatch(speaker) else -1)
    if _is_row(row, rows):
        return int(row)
    if not rows:
        raise DataError(
            "The vocoder has one voice, so no speaker can be chosen", where=str(folder), fix="leave --speaker out"
        )
    shown = [repr(name)[:40] for name in sorted(names)[:_NAMED]] or [f"0 to {rows - 1}"]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    guess = nearest(speaker, names)
    raise DataError(
        f"The vocoder has no speaker {speaker!r:.60}; its {rows} speakers are {', '.join(shown)}{more}",
        where=str(folder),
        fix=f"did you mean {guess!r}?" if guess else f"name one of them, or a number from 0 to {rows - 1}",
    )


def _is_row(row: object, rows: int) -> bool:
    return type(row) is int and 0 <= row < rows
