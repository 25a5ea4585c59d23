"""`echox units` and `echox unit-language`: fit and apply units and unit language, on folders of shards or audio."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox import files
from echox.errors import DataError, printable
from echox.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from echox.units.identity import UnitPart

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64")
MEMBER = "answer.flac"
MOST_IDS = 1 << 31
"""Of units and words that a line may name."""
UNIT_SET = "unit_set"
"""Key of a JSON line that says which units it holds."""


def add_parser(subparsers: Any) -> None:
    """Register `echox units` and `echox unit-language`."""
    _add_units(subparsers)
    _add_unit_language(subparsers)


def _command(subparsers: Any, name: str, help_text: str, example: str) -> Any:
    return subparsers.add_parser(
        name, help=help_text, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_units(subparsers: Any) -> None:
    example = "echox units fit recordings/ units/ --model openai/whisper-base --layer 3 --clusters 500"
    actions = _command(subparsers, "units", "speech to discrete units", example).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    fit = _command(actions, "fit", "fit k-means on frame features", example)
    fit.add_argument("source", type=Path, help="folder of shards or of audio files")
    fit.add_argument("folder", type=Path, help="where kmeans.npz goes")
    fit.add_argument("--features", choices=["whisper", "hubert", "log_mel"], default="whisper", help="kind of frames")
    fit.add_argument("--model", default="openai/whisper-base", help="model folder or name below $ECHOX_CACHE/models")
    fit.add_argument("--layer", type=int, default=3, help="transformer block, from 1 (default: %(default)s)")
    fit.add_argument("--clusters", type=int, default=500, help="number of units (default: %(default)s)")
    fit.add_argument("--max-frames", type=int, default=400_000, help="most frames to fit on, 50 a second")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument(
        "--switch",
        type=_cost,
        default=0.0,
        help="what a change of unit costs, in mean squared distances of a frame: longer units, so that fewer are to be "
        "learned; the demo's 0.8 nearly halves them (default: %(default)g)",
    )
    _common(fit, run_units_fit)
    example = "echox units import mhubert_km1000.bin units/ --model voidful/mhubert-base --layer 11"
    published = _command(actions, "import", "take over published k-means centroids", example)
    published.add_argument("file", type=Path, help="centroids as .npy, .npz or a joblib dump, which is never executed")
    published.add_argument("folder", type=Path, help="where kmeans.npz goes")
    published.add_argument(
        "--features", choices=["whisper", "hubert", "log_mel"], default="hubert", help="kind of their frames"
    )
    published.add_argument(
        "--model", required=True, help="model of the frames: folder or name below $ECHOX_CACHE/models"
    )
    published.add_argument("--layer", type=int, required=True, help="its transformer block, from 1")
    published.add_argument(
        "--name", default="", help="what other datasets call the model (default: the last part of --model)"
    )
    _common(published, run_units_import)
    extract = _command(
        actions, "extract", "write the units of every recording as JSON lines", "echox units extract units/ recordings/"
    )
    extract.add_argument("units", type=Path, help="folder of kmeans.npz")
    extract.add_argument("source", type=Path, help="folder of shards or of audio files")
    extract.add_argument("--out", type=Path, help="file to write; default: standard output")
    _common(extract, run_units_extract)


def _add_unit_language(subparsers: Any) -> None:
    example = "echox unit-language fit units.jsonl unit_language.json --clusters 500 --words 2000"
    actions = _command(subparsers, "unit-language", "words of units", example).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    fit = _command(actions, "fit", "find the words and their probabilities", example)
    fit.add_argument(
        "units", type=Path, nargs="+", help="JSON lines of `echox units extract`, or folders of shards; of one unit set"
    )
    fit.add_argument("language", type=Path, help="JSON file to write")
    fit.add_argument("--clusters", type=int, required=True, help="number of units")
    fit.add_argument("--words", type=int, default=7500, help="vocabulary, single units included (default: %(default)s)")
    fit.add_argument("--order", type=int, choices=[1, 2], default=2, help="n of the n-gram (default: %(default)s)")
    fit.add_argument("--max-word", type=int, default=4, help="most units a word (default: %(default)s)")
    _common(fit, run_language_fit)
    for name, verb, run in (("encode", "units to words", run_encode), ("decode", "words to units", run_decode)):
        command = _command(
            actions, name, f"{verb}, JSON lines in and out", f"echox unit-language {name} unit_language.json in.jsonl"
        )
        command.add_argument("language", type=Path, help="unit language file")
        command.add_argument("input", type=Path, help="JSON lines, `-` for standard input")
        command.add_argument("--out", type=Path, help="file to write; default: standard output")
        _common(command, run)


def _common(parser: Any, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def _cost(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1000")
    return value


def run_units_fit(args: argparse.Namespace) -> int:
    """`echox units fit`."""
    from echox.units.extract import fit_extractor
    from echox.units.features import FeatureConfig

    config = FeatureConfig(kind=args.features, model=args.model, layer=args.layer)
    audio = [clip for _, clip in read_recordings(args.source)]
    extractor = fit_extractor(
        audio,
        config,
        args.clusters,
        seed=args.seed,
        max_frames=args.max_frames,
        switch=args.switch,
        progress=Progress(),
    )
    unit_set = extractor.save(args.folder)
    seconds = sum(map(len, audio)) / 16_000
    _result(
        args,
        {
            "folder": str(args.folder),
            "clusters": extractor.n_units,
            "clips": len(audio),
            "audio_s": round(seconds, 1),
            "unit_set": unit_set.digest,
        },
    )
    return 0


def run_units_import(args: argparse.Namespace) -> int:
    """`echox units import`."""
    from echox.units.extract import save_units
    from echox.units.features import FeatureConfig, frame_width
    from echox.units.published import read_published

    config = FeatureConfig(kind=args.features, model=args.model, layer=args.layer)
    kmeans, width = read_published(args.file), frame_width(config)
    if kmeans.width != width:
        raise DataError(
            f"The centroids have {kmeans.width} features, and the frames of {args.model} have {width}",
            where=str(args.file),
            fix="Name the model whose frames were clustered.",
        )
    unit_set = save_units(args.folder, config, kmeans, name=args.name)
    _result(args, {"folder": str(args.folder), "clusters": kmeans.clusters, "unit_set": str(unit_set)})
    return 0


def run_units_extract(args: argparse.Namespace) -> int:
    """`echox units extract`."""
    from echox.units.extract import UnitExtractor, unit_set_of

    extractor, unit_set = UnitExtractor.load(args.units), asdict(unit_set_of(args.units))
    names, audio = zip(*read_recordings(args.source), strict=True)
    found = extractor.extract(audio, Progress())
    rows = [
        {"id": name, "units": units.tolist(), "durations": durations.tolist(), UNIT_SET: unit_set}
        for name, (units, durations) in zip(names, found, strict=True)
    ]
    _write_lines(args, rows)
    seconds = sum(map(len, audio)) / 16_000
    rate = sum(len(row["units"]) for row in rows) / seconds
    _result(args, {"clips": len(rows), "audio_s": round(seconds, 1), "units_per_s": round(rate, 2)})
    return 0


def run_language_fit(args: argparse.Namespace) -> int:
    """`echox unit-language fit`."""
    from echox.units.identity import check_same_unit_set
    from echox.units.language import UnitLanguage

    sequences: list[NDArray[np.int64]] = []
    parts: list[UnitPart] = []
    for source in args.units:
        found, of = read_units(source)
        sequences, parts = [*sequences, *found], [*parts, *of]
    unit_set = check_same_unit_set(parts, fix="Fit on units of one k-means: extract the others again.")
    if unit_set is not None and unit_set.clusters != args.clusters:
        raise DataError(
            f"--clusters {args.clusters} is not the number of units: they are of {unit_set}",
            where=parts[0].place,
            fix=f"Say --clusters {unit_set.clusters}.",
        )
    language = UnitLanguage.fit(
        sequences, args.clusters, args.order, args.max_word, args.words, unit_set=unit_set, progress=Progress()
    )
    language.save(args.language)
    start = time.perf_counter()
    words = sum(map(len, language.encode_batch(sequences)))
    spent = time.perf_counter() - start
    units = sum(map(len, sequences))
    _result(
        args,
        {
            "language": str(args.language),
            "words": language.size,
            "units_per_word": round(units / max(1, words), 3),
            "units_per_s": round(units / spent),
        },
    )
    return 0


def run_encode(args: argparse.Namespace) -> int:
    """`echox unit-language encode`."""
    from echox.units.identity import UnitPart, check_same_unit_set
    from echox.units.language import UnitLanguage

    language = UnitLanguage.load(args.language)
    rows = read_lines(args.input, "units")
    check_same_unit_set(
        [UnitPart(f"the unit language {args.language}", language.unit_set), *lines_parts(args.input, rows)],
        fix="Use the unit language that was fitted on these units.",
    )
    encoded = language.encode_batch([row["units"] for row in rows])
    _write_lines(args, [{**row, "words": words.tolist()} for row, words in zip(rows, encoded, strict=True)])
    return 0


def run_decode(args: argparse.Namespace) -> int:
    """`echox unit-language decode`."""
    from echox.units.language import UnitLanguage

    language = UnitLanguage.load(args.language)
    rows = read_lines(args.input, "words")
    _write_lines(args, [{**row, "units": language.decode(row["words"])} for row in rows])
    return 0


def read_recordings(source: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and waveform of every recording below a folder: members of its shards, or audio files.

    One that cannot be decoded is left out, and named on standard error.

    Raises:
        DataError: no recording there.
    """
    from echox.audio.io import read_audio

    found = left_out = 0
    for name, audio in _recordings(source):
        try:
            clip = read_audio(audio)
        except DataError as error:
            left_out += 1
            print(printable(f"left out: {name}: {error.what}"), file=sys.stderr)
            continue
        found += 1
        yield name, clip
    if not found:
        raise DataError(
            f"Not one of {left_out} recordings can be used" if left_out else "No recordings found",
            where=str(source),
            fix=f"Name a folder of shards with {MEMBER}, or of {', '.join(AUDIO_SUFFIXES)} files.",
        )


def _recordings(source: Path) -> Iterator[tuple[str, bytes | Path]]:
    from echox.stream.format.catalogue import DATASET_NAME
    from echox.stream.storage.store import read_folder

    if (source / DATASET_NAME).is_file():
        for sample in read_folder(source, {MEMBER}):
            if MEMBER in sample.members:
                yield sample.key, sample[MEMBER]
        return
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.suffix.lower() in AUDIO_SUFFIXES:
            yield str(path.relative_to(source) if source.is_dir() else path), path


def read_units(source: Path) -> tuple[list[NDArray[np.int64]], list[UnitPart]]:
    """Unit sequences of a shard folder's `answer.units`, or of JSON lines, and which unit sets they are of.

    Raises:
        DataError: none there, or unreadable ones.
    """
    import numpy as np

    from echox.stream.format.scan import UNITS
    from echox.stream.storage.store import read_folder
    from echox.units.identity import UnitPart, read_unit_set

    if source.is_dir():
        samples = [sample for sample in read_folder(source, {UNITS}) if UNITS in sample.members]
        found = [np.frombuffer(sample[UNITS], dtype="<u2").astype(np.int64) for sample in samples]
        parts = [UnitPart(str(source), read_unit_set(source))]
    else:
        rows = read_lines(source, "units")
        found = [np.asarray(row["units"], dtype=np.int64) for row in rows]
        parts = lines_parts(source, rows)
    if not found:
        raise DataError("No unit sequences found", where=str(source), fix="Make them with `echox units extract`.")
    return found, parts


def lines_parts(path: Path, rows: list[dict[str, Any]]) -> list[UnitPart]:
    """The unit sets that JSON lines say they are of, each with the first line that says so."""
    from echox.units.identity import UnitPart, UnitSetIdentity

    parts: dict[str, UnitPart] = {}
    for number, row in enumerate(rows, 1):
        said = row.get(UNIT_SET)
        place = f"row {number} of {path}"
        parts.setdefault(
            json.dumps(said, sort_keys=True),
            UnitPart(place, None if said is None else UnitSetIdentity.parse(said, place)),
        )
    return list(parts.values())


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """JSON objects, one a line, each with a list of integers under `key`.

    Raises:
        DataError: a line that is something else, with its number.
    """
    try:
        lines = list(sys.stdin.buffer if str(path) == "-" else files.read_lines(path))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the lines: {error}", where=str(path), fix="Name a file of JSON lines.") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = files.parse_json(line)
            if not all(isinstance(item, int) and 0 <= item < MOST_IDS for item in row[key]):
                raise ValueError(f"{key} holds something other than integers from 0 to {MOST_IDS - 1}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Line {number} is not an object with a list of integers under {key!r}: {error}",
                where=str(path),
                fix="Use the output of `echox units extract`.",
            ) from error
        rows.append(row)
    return rows


def _write_lines(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    else:
        sys.stdout.write(text)


def _result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The outcome: on standard output, or on standard error where that holds the lines asked for."""
    stream = sys.stderr if "out" in args and args.out is None else sys.stdout
    line = ", ".join(f"{key} {value}" for key, value in result.items())
    print(json.dumps(result) if args.json else line, file=stream)
