"""Keeps generated answers on disk: parts while they are made, and one memory-mapped table of tokens in the end.

A training step looks up a handful of samples by their number, on every rank and in any order. A table of all token ids
with the start of each answer serves that with two reads of a few bytes from a file that the processes of a node share;
shards would have to be read in their order, or indexed first. What people read is beside it as JSON lines.

| file of `<dataset>/responses/<identity>/` | content |
|---|---|
| `responses.json` | identity, counts and hashes; written last, so that what has it is complete |
| `tokens.npy` | token ids of all usable answers, end to end in order of sample number: int32 |
| `starts.npy` | where the answer of each sample begins there, and the end of the last one: int64 |
| `answers.jsonl` | a line a sample: number, id, text |
| `rejected.jsonl` | the samples whose answer is not used: number, id, reason, text |
| `parts/` | answers while they are made, each file written at once; gone when the table is complete |
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.config.paths import resolve_data
from echox.errors import DataError
from echox.files import fsync, sha256_file, write_atomically
from echox.responses.identity import Identity, differences, short
from echox.stream.storage.remote import is_remote

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.stream.sampling.source import Source

FOLDER = "responses"
"""Folder of answers beside a dataset's shards."""
RECORD = "responses.json"
TOKENS, STARTS, ANSWERS, REJECTED = "tokens.npy", "starts.npy", "answers.jsonl", "rejected.jsonl"
PARTS = "parts"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says to one question.

    Attributes:
        number: of the sample in its dataset.
        id: of the sample.
        tokens: ids before the end token.
        text: the same, decoded.
        rejected: why the answer is not used, a word; empty where it is.
    """

    number: int
    id: str
    tokens: list[int]
    text: str
    rejected: str = ""


@dataclass(frozen=True)
class ResponseTable:
    """The complete answers to one dataset.

    Attributes:
        folder: where they lie.
        record: `responses.json`.
    """

    folder: Path
    record: Mapping[str, Any]

    @classmethod
    def find(cls, folder: Path) -> ResponseTable | None:
        """The table of a folder, or None where there is none or an unfinished one."""
        file = folder / RECORD
        return cls(folder, json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    @property
    def samples(self) -> int:
        """Samples of the dataset."""
        return int(self.record["samples"])

    @property
    def rejected(self) -> dict[str, int]:
        """How many answers are not used, by reason."""
        return dict(self.record["rejected"])

    def tokens(self, number: int) -> NDArray[np.int32]:
        """Token ids of the answer to sample `number`, without end; none where it was rejected."""
        first, last = self._starts[number : number + 2].tolist()
        row: NDArray[np.int32] = self._tokens[first:last]
        return row

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return self._mapped(STARTS)

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        return self._mapped(TOKENS)

    def _mapped(self, name: str) -> NDArray[Any]:
        try:
            found: NDArray[Any] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"generated answers cannot be read: {error}",
                where=str(self.folder / name),
                fix=f"delete {self.folder} and run `echox respond` again",
            ) from error
        return found


def beside(source: Source) -> Path | None:
    """Folder of all answers to a dataset beside its shards; None where it is remote."""
    return None if is_remote(source.path) else resolve_data(source.path) / FOLDER


def elsewhere(source: Source, storage: Path) -> Path:
    """The same under the storage of runs, for datasets whose folder cannot be written."""
    return storage / FOLDER / source.catalogue.fingerprint[:12]


def places(source: Source, storage: Path) -> list[Path]:
    """Where answers to a dataset may lie, the first choice first."""
    near = beside(source)
    return [*([] if near is None else [near]), elsewhere(source, storage)]


def find_table(source: Source, identity: Identity, storage: Path) -> ResponseTable:
    """The complete answers of this identity.

    Raises:
        DataError: there are none, or only others; names both and the fix.
    """
    name = short(identity)
    others: list[str] = []
    for place in places(source, storage):
        table = ResponseTable.find(place / name)
        if table is not None:
            return table
        for file in sorted(place.glob(f"*/{RECORD}")):
            found = json.loads(file.read_text(encoding="utf-8"))["identity"]
            others.append(f"{file.parent.name} (other {differences(found, identity)})")
    begun = any((place / name / PARTS).is_dir() for place in places(source, storage))
    state = "are not complete" if begun else f"are absent; there are {', '.join(others) if others else 'no others'}"
    raise DataError(
        f"model.echo.pseudo_text=generated: the S2T model's answers to {source.path} of identity {name} {state}",
        where=str(places(source, storage)[0]),
        fix="run `echox respond` with this recipe, or set model.echo.pseudo_text to another source",
    )


def choose_folder(source: Source, identity: Identity, storage: Path) -> Path:
    """A folder in which these answers can be written, made; one that has some of them comes first.

    Raises:
        DataError: neither the dataset's folder nor the storage of runs can be written.
    """
    name = short(identity)
    candidates = sorted((place / name for place in places(source, storage)), key=lambda folder: not folder.is_dir())
    for folder in candidates:
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
            write_atomically(folder / PARTS / "identity.json", json.dumps(identity, indent=1, sort_keys=True))
        except OSError as error:
            problem = error
            continue
        return folder
    raise DataError(
        f"answers to {source.path} can be written nowhere: {problem}",
        where=", ".join(str(folder) for folder in candidates),
        fix="make room, or give storage= a folder that every process may write to",
    )


def write_part(folder: Path, answers: list[Answer]) -> None:
    """Add answers to those that are being made, all or none; their numbers are in no other part."""
    name = f"part-{answers[0].number:09d}.jsonl"
    write_atomically(folder / PARTS / name, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))


def read_parts(folder: Path) -> Iterator[Answer]:
    """The answers made so far, in no order."""
    for file in sorted((folder / PARTS).glob("part-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield Answer(**json.loads(line))


def complete(folder: Path, identity: Identity, samples: int) -> ResponseTable:
    """Turn the parts into the table.

    Raises:
        DataError: a sample has no answer or two.
    """
    table = write_table(folder, read_parts(folder), identity, samples)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return table


def write_table(folder: Path, answers: Iterable[Answer], identity: Identity, samples: int) -> ResponseTable:
    """Write a complete table; the record comes last.

    Raises:
        DataError: a sample has no answer or two.
    """
    ordered = sorted(answers, key=lambda answer: answer.number)
    if [answer.number for answer in ordered] != list(range(samples)):
        raise DataError(
            f"{len({answer.number for answer in ordered})} of {samples} samples have answers, {len(ordered)} in all",
            where=str(folder),
            fix=f"delete {folder} and run `echox respond` again",
        )
    usable = [[] if answer.rejected else answer.tokens for answer in ordered]
    starts = np.cumsum([0, *map(len, usable)], dtype=np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / TOKENS, np.array([token for row in usable for token in row], dtype=np.int32))
    _save(folder / STARTS, starts)
    names = ("number", "id", "text")
    _lines(folder / ANSWERS, ({name: getattr(answer, name) for name in names} for answer in ordered))
    rejected = [answer for answer in ordered if answer.rejected]
    _lines(
        folder / REJECTED,
        ({"number": a.number, "id": a.id, "reason": a.rejected, "text": a.text} for a in rejected),
    )
    record = {
        "identity": identity,
        "samples": samples,
        "tokens": int(starts[-1]),
        "rejected": dict(sorted(Counter(answer.rejected for answer in rejected).items())),
        "sha256": {name: sha256_file(folder / name) for name in (TOKENS, STARTS)},
    }
    for name in (TOKENS, STARTS, ANSWERS, REJECTED):
        fsync(folder / name)
    write_atomically(folder / RECORD, json.dumps(record, indent=1, sort_keys=True))
    return ResponseTable(folder, record)


def _save(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
