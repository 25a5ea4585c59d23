"""Keeps the units that the frozen teacher made of each segment for all runs of a storage: `model.echo.labels: cached`.

With `labels: drafted` they are what the teacher will probably say of another text that begins alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echox.config.paths import storage_folder
from echox.config.schema import Recipe
from echox.errors import EchoXError
from echox.files import append_line, open_regular
from echox.stages.echo import EchoStage
from echox.stages.labels import Label

FOLDER = "labels"
"""In the storage of runs: `labels/<identity of the teacher>/<run>/rank-00000.jsonl`, one segment a line."""
_ALIKE = (16, 8, 4)
"""Text tokens that two segments have in common at their beginning, for the label of one to be a draft of the other's;
the longest are asked first."""


class LabelFile:
    """Labels of one rank in memory and in its own file; it begins with what every run wrote for the same teacher.

    No two processes write to one file, so that runs may go on beside each other. A line that a crash cut short, or that
    another run is writing, is passed over, and its segment decoded again.

    Args:
        folder: of the teacher's labels, made when the first one is kept.
        run: name of the run.
        rank: of this process.
    """

    def __init__(self, folder: Path, run: str, rank: int) -> None:
        self._path = folder / run / f"rank-{rank:05d}.jsonl"
        self._known: dict[bytes, tuple[bytes, bool]] = {}
        self._newest: dict[bytes, bytes] = {}
        for path in sorted(folder.glob("*/rank-*.jsonl")):
            for line in _lines(path):
                self._take(line)

    def __len__(self) -> int:
        """Segments that are known."""
        return len(self._known)

    def get(self, tokens: tuple[int, ...]) -> Label | None:
        """The label of a segment; None where it was never decoded."""
        found = self._known.get(_packed(tokens))
        return None if found is None else Label(np.frombuffer(found[0], dtype="<u4").tolist(), found[1])

    def alike(self, tokens: tuple[int, ...]) -> Label | None:
        """The label of the segment itself, or the newest of one that has its first tokens; None, or one with an end."""
        own = self.get(tokens)
        if own is not None:
            return own if own.ended else None
        beginnings = (_packed(tokens[:length]) for length in _ALIKE if len(tokens) >= length)
        words = next((self._newest[each] for each in beginnings if each in self._newest), None)
        return None if words is None else Label(np.frombuffer(words, dtype="<u4").tolist(), True)

    def add(self, labels: Mapping[tuple[int, ...], Label]) -> None:
        """Keep labels, here and in the file.

        Raises:
            EchoXError: the file cannot be written.
        """
        new = {tokens: label for tokens, label in labels.items() if self.get(tokens) != label}
        if not new:
            return
        for tokens, label in new.items():
            self._keep(tokens, label.words, label.ended)
        lines = [json.dumps([list(tokens), label.words, label.ended]) for tokens, label in new.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, "\n".join(lines))
        except OSError as error:
            raise EchoXError(
                f"the teacher's labels cannot be kept: {error.strerror or error}",
                where=str(self._path),
                fix="make room, or set model.echo.labels to teacher",
            ) from error

    def _take(self, line: bytes) -> None:
        try:
            tokens, words, ended = json.loads(line)
            self._keep(tokens, words, bool(ended))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return

    def _keep(self, tokens: Sequence[int], words: Sequence[int], ended: bool) -> None:
        packed = _packed(words)
        self._known[_packed(tokens)] = (packed, ended)
        for length in _ALIKE:
            if ended and len(tokens) >= length:
                self._newest[_packed(tokens[:length])] = packed


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file of any size; none of one that may not be read, or is no file: others keep theirs here."""
    try:
        with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            yield from file
    except OSError:
        return


def _packed(numbers: Any) -> bytes:
    return np.asarray(numbers, dtype="<u4").tobytes()


def keep_labels(recipe: Recipe, stage: EchoStage, rank: int) -> None:
    """Give a stage the labels that runs of its storage have kept of its teacher, where the recipe wants them used."""
    if recipe.model.echo.labels in ("cached", "drafted"):
        folder = storage_folder(recipe.storage) / FOLDER / teacher_identity(stage)
        stage.label_store = LabelFile(folder, recipe.name, rank)


def teacher_identity(stage: EchoStage) -> str:
    """Short hash of all that the teacher's labels depend on beside the tokens of a segment.

    These are its weights and options, the template, the limit of words, and the embeddings of the template's tokens,
    which stand for the text table.
    """
    teacher = stage.teacher.decoder
    digest = hashlib.sha256()
    with torch.no_grad():
        template = torch.cat([stage.prefix_P, stage.header_Q])
        tensors = {**teacher.state_dict(), "template": template, "embedded": stage.embed_text(template)}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.numpy().tobytes())
    options = {name: value for name, value in vars(teacher).items() if isinstance(value, int | float | str)}
    del options["training"]
    digest.update(repr((len(stage.prefix_P), stage.words_per_token, sorted(options.items()))).encode())
    return digest.hexdigest()[:12]
