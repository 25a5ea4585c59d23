"""Corpora, datasets and run folders of someone who wishes us ill, made small and cheap."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from echox.stream.format.catalogue import PREAMBLE, SHARD, write_segments
from tests.shards.layouts import clip, encoded
from tests.stream.datasets import make_dataset

DEEP = 100_000
"""Levels of JSON that the standard library's decoder does not take."""
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
Make = Callable[[Path, "World"], None]


class World:
    """What lies around the hostile folder: files that nothing may read into its output, and a mark of what was run.

    Attributes:
        outside: folder of a secret text, a recording and a tar, none of which the input owns.
        mark: is there once something in the input was executed.
        secret: what no output may hold.
    """

    secret = "tell-nobody-4711"

    def __init__(self, root: Path) -> None:
        self.root, self.outside, self.mark = root, root / "outside", root / "mark"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.txt").write_text(f"{self.secret}\n")
        (self.outside / "secret.json").write_text(json.dumps({"text": self.secret, "step": 1, "loss/total": 1.0}))
        (self.outside / "events.jsonl").write_text(
            json.dumps({"time": 1.0, "event": "failed", "rank": 0, "step": 1, "attempt": 1, "error": self.secret})
            + "\n"
        )
        (self.outside / "speech.wav").write_bytes(encoded(clip(3)))
        make_dataset(self.outside / "set", 2, per_shard=2)

    @property
    def command(self) -> str:
        """A shell command that leaves the mark."""
        return f"touch {self.mark}"

    def pickled(self) -> bytes:
        """A pickle that leaves the mark when it is loaded."""
        return pickle.dumps(_Runs(self.command))


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


def deep(opening: str = "[") -> str:
    """JSON nested far too deeply."""
    return opening * DEEP


def flac_that_claims(samples: int) -> bytes:
    """A FLAC of a third of a second whose header tells of so many samples."""
    content = bytearray(encoded(clip(1), kind="FLAC"))
    place = content.index(b"fLaC") + 4 + 4 + 10
    packed = int.from_bytes(content[place : place + 8], "big")
    content[place : place + 8] = ((packed >> 36 << 36) | samples).to_bytes(8, "big")
    return bytes(content)


def wav_that_claims(size: int) -> bytes:
    """A WAV of a third of a second whose header tells of so many bytes."""
    content = bytearray(encoded(clip(1)))
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", size)
    content[4:8] = struct.pack("<I", size)
    return bytes(content)


def silence_bomb(minutes: int = 40) -> bytes:
    """A small FLAC of long silence."""
    return encoded(np.zeros(16_000 * 60 * minutes, dtype=np.int16), kind="FLAC")


SOUNDS: dict[str, Callable[[], bytes]] = {
    "good.wav": lambda: encoded(clip(1)),
    "claims.flac": lambda: flac_that_claims((1 << 36) - 1),
    "claims.wav": lambda: wav_that_claims(0xFFFF_FFF0),
    "bomb.flac": silence_bomb,
    "cut.flac": lambda: encoded(clip(1), kind="FLAC")[:200],
    "no-sound.wav": lambda: b"RIFF" + bytes(40),
    "empty.wav": lambda: b"",
    "pickle.wav": lambda: b"\x80\x04N.",
    "rate.wav": lambda: encoded(clip(1), rate=2_000_000_000),
    "channels.wav": lambda: encoded(np.zeros((10, 1024), np.int16)),
}


def odd_files(folder: Path, world: World) -> None:
    """Files that are no files, and names that are no names."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "fifo.wav")
    (folder / "link.wav").symlink_to(world.outside / "speech.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "device.wav").symlink_to("/dev/zero")
    (folder / "folder.wav").mkdir()
    (folder / f"{ESCAPE}.wav").write_bytes(b"no sound")
    with open(os.fsencode(folder) + b"/latin-\xe9.wav", "wb") as file:
        file.write(b"no sound")


def recordings(folder: Path, world: World) -> None:
    """`manifest.jsonl` and the sounds it names, most of which it should not."""
    odd_files(folder, world)
    for name, make in SOUNDS.items():
        (folder / name).write_bytes(make())
    named = [
        *SOUNDS,
        *("fifo.wav", "link.wav", "loop.wav", "device.wav", "folder.wav", f"{ESCAPE}.wav", "x" * 5000, "a\0b"),
        *("../outside/speech.wav", str(world.outside / "speech.wav"), "/dev/zero", "/dev/stdin", "good.wav/x", "."),
        *("pipe:" + world.command, f"|{world.command}", f"$({world.command})", "http://127.0.0.1:9/a.wav"),
    ]
    lines = [json.dumps({"audio": name, "text": f"spoken {ESCAPE} {place}"}) for place, name in enumerate(named)]
    odd: list[Any] = [7, None, [], {"audio": ["a"], "text": {}}, {"audio": "good.wav", "text": 1e999, "id": ESCAPE}]
    lines += [json.dumps(row) for row in odd]
    lines += [
        '{"audio": "good.wav", "text": ' + deep(),
        '{"audio": "good.wav", "id": "n", "text": "x", "turns": ' + deep('[{"a":'),
        '{"audio": "good.wav", "id": ' + "9" * 5000 + ', "text": "x"}',
        '{"audio": "good.wav", "id": "../../outside/x", "text": "x"}',
        '{"audio": "good.wav", "id": "' + "y" * 70_000 + '", "text": "x"}',
        '{"audio": "good.wav", "id": "s", "text": "\\ud800 lone"}',
    ]
    text = "\n".join(lines).encode() + b'\n{"audio": "good.wav", "id": "l", "text": "\xe9"}\n\xff\xfe\x00\n'
    (folder / "manifest.jsonl").write_bytes(text)


def tar_member(name: str | bytes, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One member with header fields as they are given."""
    info = tarfile.TarInfo(name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"))
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def raw_tar(members: Iterable[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of headers as they are, true or not."""
    parts = []
    for info, content in members:
        parts.append(info.tobuf(tar_format, "utf-8", "surrogateescape"))
        parts.append(content + bytes(-len(content) % 512))
    return b"".join(parts) + bytes(1024)


def hostile_members(world: World, content: bytes, suffix: str) -> dict[str, bytes]:
    """Tars by what is wrong with them; each has a good member first."""
    good = tar_member(f"good.{suffix}", content)
    outside = str(world.outside / "secret.txt")
    named = {
        "traversal": tar_member(f"../outside/planted.{suffix}", content),
        "absolute": tar_member(f"{world.outside}/planted.{suffix}", content),
        "link": tar_member(f"link.{suffix}", type=tarfile.SYMTYPE, linkname=outside),
        "hard-link": tar_member(f"hard.{suffix}", type=tarfile.LNKTYPE, linkname=outside),
        "device": tar_member(f"device.{suffix}", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "fifo": tar_member(f"fifo.{suffix}", type=tarfile.FIFOTYPE),
        "huge": tar_member(f"huge.{suffix}", content, size=1 << 60),
        "negative": tar_member(f"negative.{suffix}", content, size=-512),
        "escapes": tar_member(f"{ESCAPE}.{suffix}", content),
        "nul": tar_member(f"a\0b.{suffix}", content),
        "latin": tar_member(b"\xe9\xff." + suffix.encode(), content),
        "long": tar_member("d/" * 3000 + f"x.{suffix}", content),
        "sparse": tar_member(f"sparse.{suffix}", content, type=tarfile.GNUTYPE_SPARSE),
    }
    found = {name: raw_tar([good, member]) for name, member in named.items()}
    pax = tarfile.TarInfo(f"pax.{suffix}")
    pax.size, pax.pax_headers = len(content), {"size": str(1 << 61), "GNU.sparse.size": "9" * 30, "comment": ESCAPE}
    found["pax"] = raw_tar([good, (pax, content)], tarfile.PAX_FORMAT)
    found["cut"] = raw_tar([good])[:700]
    found["noise"] = bytes(range(256)) * 40
    found["pickle"] = world.pickled()
    return found


def gzip_bomb(head: bytes, block: bytes, times: int) -> bytes:
    """Two gzip members that decompress to `head` and then `block` so many times."""
    return gzip.compress(head) + gzip.compress(block, 1) * times


def dialogue_archives(folder: Path, world: World) -> None:
    """Archives of spoken dialogues in the layout of the EchoX authors, each wrong in its own way."""
    folder.mkdir(parents=True)

    def example(sound: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": "who", "audio": sound}, {"from": "gpt", "value": "me", "audio": sound}]
        return {"conversations": turns}

    names = [
        "good.wav",
        "../../outside/speech.wav",
        str(world.outside / "speech.wav"),
        "link.wav",
        "fifo.wav",
        "/dev/zero",
    ]
    listing = json.dumps([example(name) for name in names]).encode()
    for kind, content in hostile_members(world, encoded(clip(1)), "wav").items():
        tar = raw_tar([tar_member("data.json", listing)])[:-1024] + content
        (folder / f"{kind}.tar.gz").write_bytes(gzip.compress(tar, 1))
    for kind, text in {
        "deep": deep(), "object": "{}", "number": "7", "scalars": '[1, null, "x", [[]], {"conversations": [1]}]',
        "wrong": '[{"conversations": [{"from": {}, "value": [], "audio": 5, "wer": "nan"}]}]', "latin": "[\"\xe9\"]",
    }.items():  # fmt: skip
        content = text.encode("latin-1")
        (folder / f"list-{kind}.tar.gz").write_bytes(gzip.compress(raw_tar([tar_member("data.json", content)]), 1))
    head = tar_member("data.json", size=3 << 30)[0].tobuf(tarfile.GNU_FORMAT)
    (folder / "bomb-list.tar.gz").write_bytes(gzip_bomb(head + b"[", b" " * (16 << 20), 160))
    unpacked = folder / "unpacked"
    odd_files(unpacked, world)
    (unpacked / "good.wav").write_bytes(encoded(clip(1)))
    (unpacked / "data.json").write_bytes(listing)
    os.mkfifo(folder / "pipe.tar.gz")


def shards_of_others(folder: Path, world: World) -> None:
    """A folder of tars without a catalogue."""
    folder.mkdir(parents=True)
    for kind, content in hostile_members(world, b'{"id": "x"}', "json").items():
        (folder / f"{kind}.tar").write_bytes(content)
    (folder / "deep.tar").write_bytes(raw_tar([tar_member("deep.json", deep().encode())]))
    (folder / "odd.tar").write_bytes(
        raw_tar(
            [
                tar_member("odd.json", b'{"question_s": 1e999, "id": [], "question_text": {}, "turns": 7, "task": []}'),
                tar_member("sound.question.flac", flac_that_claims((1 << 36) - 1)),
                tar_member("sound.answer.units", b"\xff" * 7),
                tar_member("sound.json", b"\x80\x04N."),
            ]
        )
    )


def dataset(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """An indexed dataset of good form, with `dataset.json` changed."""
    make_dataset(folder, 4, per_shard=2)
    if change is not None:
        listing = json.loads((folder / "dataset.json").read_text())
        change(listing)
        (folder / "dataset.json").write_text(json.dumps(listing))
    return folder


def resealed(folder: Path, header: Callable[[dict[str, Any]], None], **segments: Callable[[bytes], bytes]) -> Path:
    """A dataset whose catalogue was changed and then sealed again, as only someone who means it does."""
    dataset(folder)
    path = folder / "dataset.catalogue"
    content = path.read_bytes()
    length = PREAMBLE.unpack(content[: PREAMBLE.size])[2]
    known = json.loads(content[PREAMBLE.size : PREAMBLE.size + length])
    files = {}
    for name, part in known.pop("segments").items():
        data = content[part["offset"] : part["offset"] + part["bytes"]]
        files[name] = folder / f"{name}.segment"
        files[name].write_bytes(segments[name](data) if name in segments else data)
    header(known)
    digest = write_segments(path, known, files)
    for file in files.values():
        file.unlink()
    listing = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**listing, "catalogue": digest}))
    return folder


def header_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A dataset with another header of its catalogue, sealed; `change` may return any JSON in its place."""
    from xxhash import xxh3_64_hexdigest

    dataset(folder)
    path = folder / "dataset.catalogue"
    content = path.read_bytes()
    magic, version, length, _ = PREAMBLE.unpack(content[: PREAMBLE.size])
    header = json.loads(content[PREAMBLE.size : PREAMBLE.size + length])
    first = min(part["offset"] for part in header["segments"].values())
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header if changed is None else changed)).encode()
    sealed = PREAMBLE.pack(magic, version, len(text), xxh3_64_hexdigest(text).encode()) + text
    # The segments stay where they were, or only the shift would be found.
    path.write_bytes(sealed.ljust(first, b"\0") + content[first:])
    digest = xxh3_64_hexdigest(text)
    listing = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**listing, "catalogue": digest}))
    return folder


def _filled(value: int) -> Callable[[bytes], bytes]:
    return lambda data: bytes([value]) * len(data)


def renamed(folder: Path, names: list[str]) -> Path:
    """A dataset whose catalogue, sealed again, gives its shards other names."""

    def starts(data: bytes) -> bytes:
        shards = np.frombuffer(data, dtype=SHARD).copy()
        shards["name"] = np.cumsum([0, *(len(name) for name in names[:-1])])
        return shards.tobytes()

    return resealed(folder, lambda header: None, shards=starts, shard_names=lambda data: "".join(names).encode())


def hostile_datasets(folder: Path, world: World) -> dict[str, Path]:
    """Datasets by what is wrong with them."""
    folder.mkdir(parents=True)
    places = {
        "pipe": f"pipe:{world.command}; cat {world.outside}/set/{{}}",
        "file-url": f"file://{world.outside}/set",
        "local-url": f"local://{world.outside}/set",
        "absolute": f"{world.outside}/set",
        "relative": "../../outside/set",
        "chained": f"simplecache::file://{world.outside}/set",
        "dead": "http://127.0.0.1:9/set",
        "dead-pipe": f"https://x|{world.command}",
        "number": 7,
        "escapes": f"https://{ESCAPE}/x",
    }
    found = {
        f"at-{name}": dataset(folder / f"at-{name}", lambda listing, place=place: listing.update(shards_at=place))  # type: ignore[misc]
        for name, place in places.items()
    }
    for name, text in {
        "deep": deep(), "list": "[]", "nul": "\0" * 9, "number": "7", "wrong": '{"catalogue": 7, "shards": {}}',
        "long": '{"catalogue": "' + "x" * (1 << 20) + '", "shards": []}', "latin": '{"\xe9": 1}',
    }.items():  # fmt: skip
        (dataset(folder / f"listing-{name}") / "dataset.json").write_bytes(text.encode("latin-1"))
        found[f"listing-{name}"] = folder / f"listing-{name}"
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "deep": lambda header: deep(),
        "list": lambda header: [],
        "empty": lambda header: {},
        "samples": lambda header: header.update(samples=1 << 40),
        "negative": lambda header: header.update(samples=-5),
        "text": lambda header: header.update(samples="many"),
        "layouts": lambda header: header.update(layouts=[7]),
        "layouts-text": lambda header: header.update(layouts=[[{"a": 1}]]),
        "optional": lambda header: header.update(optional=7),
        "sources": lambda header: header.update(sources={}),
        "fingerprint": lambda header: header.update(fingerprint=[ESCAPE]),
        "no-segment": lambda header: header["segments"].pop("records") and None,
        "offset": lambda header: header["segments"]["records"].update(offset=-64),
        "bytes": lambda header: header["segments"]["records"].update(bytes=7),
        "segment": lambda header: header["segments"].update(records=7),
    }
    for name, change in changes.items():
        found[f"header-{name}"] = header_of(folder / f"header-{name}", change)
    for name, segments in {
        "records": {"records": _filled(0xFF)},
        "members": {"members": _filled(0xFF)},
        "keys": {"keys": _filled(0xFF)},
        "tasks": {"tasks": _filled(0xFF)},
        "shards": {"shards": _filled(0xFF)},
        "names-latin": {"shard_names": _filled(0xE9)},
        "names-nul": {"shard_names": _filled(0)},
    }.items():
        found[f"sealed-{name}"] = resealed(folder / f"sealed-{name}", lambda header: None, **segments)
    elsewhere = [f"../../outside/set/{path.name}" for path in sorted((world.outside / "set").glob("*.tar"))]
    absolute = [str(path) for path in sorted((world.outside / "set").glob("*.tar"))]
    found["sealed-names-relative"] = renamed(folder / "sealed-names-relative", [*elsewhere, "shard-000001.tar"])
    found["sealed-names-absolute"] = renamed(folder / "sealed-names-absolute", [*absolute, "shard-000001.tar"])
    linked = dataset(folder / "linked")
    shard = next(linked.glob("*.tar"))
    moved = world.outside / f"taken-{shard.name}"
    shutil.move(shard, moved)
    shard.symlink_to(moved)
    fifo = dataset(folder / "fifo")
    (fifo / "dataset.catalogue").unlink()
    os.mkfifo(fifo / "dataset.catalogue")
    listing = dataset(folder / "fifo-listing")
    (listing / "dataset.json").unlink()
    os.mkfifo(listing / "dataset.json")
    return {**found, "linked": linked, "fifo": fifo, "fifo-listing": listing}


YAMLS: dict[str, str] = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
    "tags": "name: !!python/object/apply:os.system ['touch mark']\n",
    "deep": "name: " + "[" * 5000 + "\n",
    "flow": "{" * 20_000,
    "nul": "name: \0\n",
    "list": "[1, 2]\n",
    "latin": "name: caf\xe9\n",
    "escape": f'"{ESCAPE!s}": 1\n'.replace("\x1b", "\\e").replace("\x07", "\\a"),
    "merge": "a: &a {b: 1}\n" + "<<: *a\n" * 2,
    "huge-number": "seed: " + "9" * 6000 + "\n",
    "names": "name: ../../outside/run\nstage: s2t\nscale: x\n",
}


def recipes(folder: Path, world: World) -> dict[str, Path]:
    """Recipes that are none."""
    folder.mkdir(parents=True)
    for name, text in YAMLS.items():
        (folder / f"{name}.yaml").write_bytes(text.encode("latin-1"))
    os.mkfifo(folder / "fifo.yaml")
    (folder / "device.yaml").symlink_to("/dev/zero")
    with (folder / "large.yaml").open("wb") as file:
        file.truncate(3 << 30)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def unit_files(folder: Path, world: World) -> None:
    """k-means files, unit languages, and lines of units and words."""
    folder.mkdir(parents=True)
    executes = np.empty(1, dtype=object)
    executes[0] = _Runs(world.command)
    np.savez(folder / "object.npz", centroids=executes, mean=executes, scale=executes, allow_pickle=True)
    np.save(folder / "object.npy", executes, allow_pickle=True)
    (folder / "dump.km").write_bytes(world.pickled())
    (folder / "protocol.pkl").write_bytes(pickle.dumps(_Runs(world.command), protocol=0))
    claims = io.BytesIO()
    np.lib.format.write_array_header_1_0(claims, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)})
    (folder / "claims.npy").write_bytes(claims.getvalue())
    np.savez(folder / "shapes.npz", centroids=np.zeros((2, 0)), mean=np.zeros((3, 3)), scale=np.array("x"))
    (folder / "cut.npz").write_bytes((folder / "shapes.npz").read_bytes()[:300])
    os.mkfifo(folder / "fifo.npz")
    language = {
        "version": 1,
        "n_units": 4,
        "words": [[0, 1]],
        "counts": [1] * 5,
        "bigrams": [],
        "order": 1,
        "max_word": 2,
    }
    odd: dict[str, Any] = {
        "units": {**language, "n_units": 1 << 50},
        "words": {**language, "words": [[9999, -1], "ab", 7]},
        "counts": {**language, "counts": [-1, 1 << 70, "x"]},
        "unit-set": {**language, "unit_set": [[]]},
        "order": {**language, "order": 1 << 40, "max_word": -3},
        "list": [1],
        "nan": {**language, "n_units": float("nan")},
        "inf": {**language, "n_units": float("inf")},
    }
    for name, content in odd.items():
        (folder / f"language-{name}.json").write_text(json.dumps(content))
    (folder / "language-deep.json").write_text('{"version": ' + deep())
    (folder / "language-latin.json").write_bytes(b'{"\xe9": 1}')
    os.mkfifo(folder / "language-fifo.json")
    for key in ("units", "words"):
        rows: dict[str, Any] = {
            "deep": f'{{"{key}": ' + deep(),
            "text": json.dumps({key: "abc"}),
            "huge": json.dumps({key: [1 << 70]}),
            "negative": json.dumps({key: [-1, 1]}),
            "large": json.dumps({key: [1 << 40]}),
            "nested": json.dumps({key: [[1]]}),
            "nan": json.dumps({key: [float("nan")]}),
            "list": "[]",
            "long-number": f'{{"{key}": [' + "9" * 6000 + "]}",
            "unit-set": json.dumps({key: [1], "unit_set": {"features": [], "clusters": "x"}}),
        }
        for name, text in rows.items():
            (folder / f"{key}-{name}.jsonl").write_text(text + "\n")
        (folder / f"{key}-latin.jsonl").write_bytes(b'{"\xe9": [1]}\n')
        os.mkfifo(folder / f"{key}-fifo.jsonl")
        (folder / f"{key}-device.jsonl").symlink_to("/dev/zero")


OUTSIDE_ID = "0" * 32
"""Run id that hostile runs claim."""


def _sealed(manifest: dict[str, Any]) -> str:
    body = {"version": 2, **manifest}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal})


def _event(**changes: Any) -> str:
    return json.dumps({"time": 1.0, "event": "failed", "rank": 0, "step": 1, "attempt": 1, "error": "x", **changes})


def _state(world: World, **changes: Any) -> str:
    """`mlflow.json` of a run whose process is gone."""
    owner = {"host": socket.gethostname(), "pid": 999_999, "start": 1, "space": os.readlink("/proc/self/ns/pid")}
    state: dict[str, Any] = {
        "name": "evil",
        "experiment": "x",
        "parent": "p",
        "artifacts": str(world.outside / "artifacts"),
        "tags": {"scale": "x", "stage": "s2t", "attempt": "1", "run_folder": str(world.outside)},
        "token": "t",
        "uri": f"sqlite:///{world.outside}/made.db",
        "run_id": OUTSIDE_ID,
        "parent_id": OUTSIDE_ID,
        "attempt": 1,
        "owner": owner,
        "started": 1.0,
        "status": "RUNNING",
        "ended": None,
        "closed": False,
    }
    return json.dumps({**state, **changes})


def hostile_runs(storage: Path, world: World) -> dict[str, Path]:
    """Run folders by what is wrong with them, each the state of a run beside one wrong record."""
    storage.mkdir(parents=True, exist_ok=True)
    artifact = {"kind": "artifact", "path": str(world.outside / "secret.txt"), "folder": None}
    records: dict[str, dict[str, str]] = {
        "state-deep": {"mlflow.json": '{"uri": ' + deep()},
        "state-list": {"mlflow.json": "[]"},
        "state-types": {
            "mlflow.json": '{"name": [], "uri": 7, "run_id": {}, "tags": [1], "owner": "x", "started": "y"}'
        },
        "state-pid": {"mlflow.json": _state(world, owner={"host": "h", "pid": "../../outside", "start": []})},
        "state-numbers": {"mlflow.json": _state(world, started=1e300, ended=-1e300, attempt=1 << 200, status=ESCAPE)},
        "state-makes": {"mlflow.json": _state(world)},
        "state-text": {"mlflow.json": _state(world, uri=f"sqlite:///{world.outside}/secret.txt")},
        "state-file": {"mlflow.json": _state(world, uri=f"file://{world.outside}/mlruns")},
        "state-plugin": {"mlflow.json": _state(world, uri="databricks://evil")},
        "state-server": {"mlflow.json": _state(world, uri="http://127.0.0.1:9")},
        "state-postgres": {"mlflow.json": _state(world, uri="postgresql://evil@127.0.0.1:9/db")},
        "state-escape": {"mlflow.json": _state(world, name=ESCAPE, uri=f"nowhere://{ESCAPE}")},
        "state-artifact": {
            "mlflow.json": _state(world, uri=f"sqlite:///{storage}/mlflow.db", run_id=None, parent_id=None),
            "mlflow-spool/00000000000000000001~rank0~1.jsonl": json.dumps(artifact) + "\n",
        },
        "progress-deep": {"progress.json": deep()},
        "progress-types": {
            "progress.json": '{"step": [], "steps": {}, "state": 7, "loss": "x", "eta_s": [1], "attempt": "1"}'
        },
        "progress-numbers": {
            "progress.json": '{"step": 1e999, "steps": NaN, "loss": 1e999, "eta_s": 1e300, "state": "training"}'
        },
        "progress-huge": {
            "progress.json": '{"step": ' + "9" * 4000 + ', "steps": 5, "state": "training", "eta_s": Infinity}'
        },
        "progress-escape": {"progress.json": json.dumps({"step": 1, "steps": 2, "state": ESCAPE, "attempt": 1})},
        "metrics-deep": {"metrics.jsonl": deep() + "\n"},
        "metrics-types": {
            "metrics.jsonl": '[]\n7\n{"step": "x"}\n{"step": 1, "loss/total": "y", "loss/a": [], "loss/b": null}\n'
            '{"step": 1e999, "loss/total": 1}\n{"loss/total": 2}\n{"step": 2, "loss/total": 1e999, "loss/c": NaN}\n'
        },
        "metrics-names": {"metrics.jsonl": json.dumps({"step": 1, f"loss/{ESCAPE}<script>": 1.0}) + "\n"},
        "recipe-deep": {"recipe.json": '{"a": ' + deep("[")},
        "recipe-list": {"recipe.json": "[[1]]"},
        "recipe-names": {"recipe.json": json.dumps({f"<script>{ESCAPE}": f"{ESCAPE}<script>"})},
        "resolved-aliases": {"recipe.resolved.yaml": YAMLS["aliases"]},
        "resolved-tags": {"recipe.resolved.yaml": YAMLS["tags"]},
        "attempt-empty": {"attempt": ""},
        "attempt-huge": {"attempt": "9" * 6000},
        "stop-deep": {"stop.json": deep()},
        "log-deep": {"log/rank-00000.jsonl": deep() + "\n"},
        "log-types": {
            "log/rank-00000.jsonl": "\n".join(
                [
                    *("[]", "7", '{"time": "x"}', _event(time=1e300), _event(time=-5), _event(event=[])),
                    *(_event(rank=[]), _event(step={}), _event(attempt="x"), _event(event=ESCAPE)),
                    _event(error={"a": [ESCAPE]}),
                    _event(event="start", start_s=7),
                    _event(event="job_start"),
                    _event(event="start", start_s={"a": "x"}),
                    _event(event="job_failed", failed_rank=[], decision={}),
                ]
            )
        },
        "log-line": {"log/rank-00000.jsonl": "x" * (20 << 20)},
    }  # fmt: skip
    for name, files in records.items():
        for file, text in {"mlflow.json": '{"name": "evil", "run_id": null}', **files}.items():
            path = storage / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    found = {name: storage / name for name in records}
    for name in ("mlflow.json", "progress.json", "metrics.jsonl", "recipe.json", "recipe.resolved.yaml", "attempt",
                 "stop.json", "log/rank-00000.jsonl", "mlflow-alive", "unit_language.json"):  # fmt: skip
        for kind in ("fifo", "link", "device", "folder"):
            run = found[f"{kind}-{Path(name).stem}"] = storage / f"{kind}-{Path(name).stem}"
            (run / name).parent.mkdir(parents=True)
            if name != "mlflow.json":
                (run / "mlflow.json").write_text('{"name": "evil", "run_id": null}')
            target = "events.jsonl" if name.endswith(".jsonl") else "secret.json"
            if kind == "fifo":
                os.mkfifo(run / name)
            elif kind == "folder":
                (run / name).mkdir()
            else:
                (run / name).symlink_to(world.outside / target if kind == "link" else "/dev/zero")
    for name in ("log", "mlflow-spool"):
        run = found[f"linked-{name}"] = storage / f"linked-{name}"
        run.mkdir()
        (run / "mlflow.json").write_text(
            _state(world, uri=f"sqlite:///{storage}/mlflow.db", run_id=None, parent_id=None)
        )
        (run / name).symlink_to(world.outside)
    (world.outside / "0~rank0~1.jsonl").write_text(json.dumps(artifact) + "\n")
    sparse = found["sparse"] = storage / "sparse"
    (sparse / "log").mkdir(parents=True)
    (sparse / "mlflow.json").write_text('{"name": "evil", "run_id": null}')
    for name in ("metrics.jsonl", "log/rank-00000.jsonl", "recipe.json", "progress.json"):
        with (sparse / name).open("wb") as file:
            file.truncate(3 << 30)
    for run in found.values():
        for file in (path for path in run.rglob("*") if path.is_file() and not path.is_symlink()):
            os.utime(file, (1e9, 1e9))  # silent for long: whoever lists it ends it
    return found


def hostile_checkpoints(storage: Path, world: World) -> dict[str, Path]:
    """Runs with one checkpoint, sealed by whoever changed it."""
    digest = hashlib.sha256(b"x").hexdigest()
    files = {"trainable.safetensors": {"bytes": 1, "sha256": digest}}
    whole: dict[str, Any] = {
        "step": 1, "updates": 1, "created": "now", "world_size": 1, "metrics": {}, "files": files,
        "recipe": {}, "run": "x", "stage": "echo",
    }  # fmt: skip
    manifests: dict[str, str] = {
        "pickle": _sealed({**whole, "files": {**files, "rng-00000.pt": {"bytes": 1, "sha256": digest}}}),
        "outside": _sealed({**whole, "files": {"../../../../outside/secret.txt": {"bytes": 17, "sha256": digest}}}),
        "absolute": _sealed({**whole, "files": {"/etc/passwd": {"bytes": 17, "sha256": digest}}}),
        "files-list": _sealed({**whole, "files": [1]}),
        "files-text": _sealed({**whole, "files": {"a": "b"}}),
        "no-files": _sealed({"step": 1}),
        "metrics": _sealed({**whole, "metrics": [], "created": ESCAPE}),
        "loss": _sealed({**whole, "metrics": {"loss/total": "x"}}),
        "recipe": _sealed({**whole, "recipe": [1]}),
        "deep": deep(),
        "unsealed": json.dumps(whole),
        "nul": "\0",
    }
    found = {}
    for name, text in manifests.items():
        checkpoint = storage / f"saved-{name}" / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(text)
        (checkpoint / "trainable.safetensors").write_bytes(b"x")
        (checkpoint / "rng-00000.pt").write_bytes(world.pickled())
        (checkpoint / "rng-00000.json").write_bytes(world.pickled())
        (checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(world.pickled())
        found[name] = storage / f"saved-{name}"
    return found


def sealed_run(folder: Path) -> Path:
    """A run whose one checkpoint is sealed as it should be, and of a recipe that is none."""
    digest = hashlib.sha256(b"x").hexdigest()
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainable.safetensors").write_bytes(b"x")
    files = {"trainable.safetensors": {"bytes": 1, "sha256": digest}}
    (checkpoint / "manifest.json").write_text(_sealed({
        "step": 1, "updates": 1, "created": "now", "world_size": 1, "metrics": {}, "files": files, "recipe": {},
        "run": "x", "stage": "echo",
    }))  # fmt: skip
    return folder


def releases(folder: Path, world: World) -> list[Path]:
    """Folders that `echox import` may be given: each is a release but for one thing, or nothing like one."""
    good: dict[str, Any] = {
        "model_type": "EchoX", "vocab_size": 128_257, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "adapter_size": 8, "unit_vocab_size": 2,
        "unit_output": "finetune_kd", "unit_model": "large",
    }  # fmt: skip
    huge = {**good, "num_hidden_layers": 1 << 23, "vocab_size": 1 << 23}
    header = json.dumps({"x": {"dtype": "F16", "shape": [1 << 40], "data_offsets": [0, 1 << 41]}}).encode()
    weights: dict[str, bytes] = {
        "pickle": world.pickled(),
        "claims": (1 << 60).to_bytes(8, "little") + b"{}",
        "long": len(header).to_bytes(8, "little") + header,
        "empty": b"",
    }
    configs = {"deep": deep(), "list": "[]", "text": ESCAPE, "huge": json.dumps(huge),
               "auto": json.dumps({**good, "auto_map": {"AutoConfig": "evil.py--Evil"}})}  # fmt: skip
    made: list[Path] = []

    def put(name: str) -> Path:
        place = folder / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(good))
        (place / "tokenizer.json").write_text("{}")
        (place / "model.safetensors").write_bytes(b"")
        (place / "evil.py").write_text("import os; os.system('touch ran')")
        made.append(place)
        return place

    for name, content in weights.items():
        (put(f"weights-{name}") / "model.safetensors").write_bytes(content)
    for name, text in configs.items():
        (put(f"config-{name}") / "config.json").write_text(text)
    for name, text in {"deep": deep(), "list": "[]", "escape": ESCAPE}.items():
        (put(f"tokenizer-{name}") / "tokenizer.json").write_text(text)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        for kind, target in (("secret", world.outside / "secret.txt"), ("device", Path("/dev/zero"))):
            path = put(f"{kind}-{name}") / name
            path.unlink()
            path.symlink_to(target)
        path = put(f"fifo-{name}") / name
        path.unlink()
        os.mkfifo(path)
    for number, name in enumerate(("../../outside/secret.txt", "/etc/passwd", "", ESCAPE, "a" * 5000)):
        index = put(f"index-{number}") / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    return made


def benchmarks(folder: Path, world: World) -> list[Path]:
    """Places that `echox evaluate --benchmark` would read questions from."""
    import pyarrow as pa
    import pyarrow.parquet

    head = "Questions\tAnswer\tWav Filename\n"
    sounds = {"good.wav": encoded(clip(1)), "claims.flac": flac_that_claims(1 << 35), "text.wav": ESCAPE.encode()}
    names = [*sounds, "../../outside/speech.wav", str(world.outside / "speech.wav"), "link.wav", "fifo.wav",
             "/dev/zero", "device.wav", "loop.wav", f"{ESCAPE}.wav", "", ".", "a" * 5000, "$(touch x).wav"]  # fmt: skip
    lists: dict[str, str | bytes] = {
        **{f"tsv-{n}": f"{head}q\tx\t{name}\n" for n, name in enumerate(names) if name != "good.wav"},
        **{f"lines-{n}": json.dumps({"audio": name, "answers": ["x"]}) + "\n" for n, name in enumerate(names[3:6])},
        "deep": deep('{"a":'),
        "answers": json.dumps({"audio": "good.wav", "answers": [[]] * 100_000}),
        "many": json.dumps({"audio": "good.wav", "answers": ["x"] * 100_000}),
        "long": json.dumps({"audio": "good.wav", "answers": "x" * (9 << 20)}),
        "number": '{"audio": "good.wav", "answers": "x", "id": ' + "9" * 6000 + "}",
        "escape": f"{ESCAPE}\tAnswer\tWav Filename\n",
        "nul": "\0" * 5000,
        "magic": b"PAR1" + bytes(400) + b"PAR1",
        "pickle": world.pickled(),
        "recipe": json.dumps({"audio": "good.wav", "answers": ["x"]}),  # the list is good, the run is not
    }
    places = []
    for name, content in lists.items():
        place = folder / name
        place.mkdir(parents=True)
        for sound, data in sounds.items():
            (place / sound).write_bytes(data)
        (place / "link.wav").symlink_to(world.outside / "speech.wav")
        (place / "loop.wav").symlink_to("loop.wav")
        (place / "device.wav").symlink_to("/dev/zero")
        os.mkfifo(place / "fifo.wav")
        (place / "list").write_bytes(content if isinstance(content, bytes) else content.encode())
        places.append(place / "list")
    cells: dict[str, Any] = {
        "no-bytes": [{"path": str(world.outside / "speech.wav"), "bytes": None}],
        "path": [str(world.outside / "speech.wav")],
        "claims": [{"path": "../../x", "bytes": sounds["claims.flac"]}],
    }
    for name, audio in cells.items():
        pa.parquet.write_table(pa.table({"answer": ["x"], "audio": audio}), folder / f"{name}.parquet")
        places.append(folder / f"{name}.parquet")
    (folder / "linked").mkdir()
    (folder / "linked" / "test.parquet").symlink_to(world.outside / "secret.txt")
    (folder / "linked-list").mkdir()
    (folder / "linked-list" / "a.jsonl").symlink_to(world.outside / "secret.json")
    return [*places, folder / "linked", folder / "linked-list"]


def hostile_evaluations(folder: Path, world: World) -> dict[str, Path]:
    """Folders with an `evaluation` that `echox report` would show."""
    sample = {"question_text": "q", "answer_text": "a", "reference_text": "r", "ok": True}
    variants: dict[str, tuple[str, str, str]] = {
        "passwd": ('{"sets": {}}', json.dumps([{**sample, "question_wav": "/etc/passwd"}]), "{}"),
        "outside": ('{"sets": {}}', json.dumps([{**sample, "answer_wav": "../../outside/speech.wav"}]), "{}"),
        "link": ('{"sets": {}}', json.dumps([{**sample, "answer_wav": "link.wav"}]), "{}"),
        "deep": (deep(), "[]", "{}"),
        "deep-samples": ("{}", deep(), "{}"),
        "deep-result": ("{}", "[]", deep()),
        "sets": ('{"sets": [1]}', "[]", "{}"),
        "set": ('{"sets": {"x": 7}}', "[]", "{}"),
        "scores": ('{"sets": {"x": {"n": "many", "role": [], "s2s_strict": {}}}, "resynthesis_wer": "x"}', "[]", "{}"),
        "numbers": ('{"resynthesis_wer": "x", "original_wer": [], "peak_memory_gib": {}}', "[]", "{}"),
        "samples": ("{}", '{"a": 1}', "{}"),
        "sample": ("{}", "[7]", "{}"),
        "no-text": ("{}", '[{"ok": 1}]', "{}"),
        "texts": ("{}", json.dumps([{**sample, "judged_text": [1], "cascade_text": {}, "set": ["<script>"]}]), "{}"),
        "phases": ("{}", "[]", '{"phases": {"a": "b"}, "reused": 7}'),
        "result": ("{}", "[]", "[1]"),
        "quality": ('{"sets": {"x": {"quality": {"echo": {"n": 1, "ovrl": []}}}}}', "[]", "{}"),
        "voices": ('{"sets": {"x": {"quality": {"<b>": {}}}}}', "[]", "{}"),
        "command": ('{"command": ["rm"], "judge": 5, "corpus": {}}', "[]", '{"phases_command": []}'),
    }
    found = {}
    for name, (scores, samples, result) in variants.items():
        evaluation = folder / name / "evaluation"
        evaluation.mkdir(parents=True)
        (evaluation / "scores.json").write_text(scores)
        (evaluation / "samples.json").write_text(samples)
        (evaluation.parent / "result.json").write_text(result)
        (evaluation / "link.wav").symlink_to(world.outside / "speech.wav")
        found[name] = folder / name
    known = folder / "runs"
    (known / "evaluation").mkdir(parents=True)
    (known / "evaluation" / "scores.json").write_text('{"sets": {}, "judge": "`<script>`", "command": "```\\n# x"}')
    (known / "evaluation" / "samples.json").write_text("[]")
    recipes = {
        "s2t": '{"model": [1], "data": {"train": {"a": 1}}, "seed": {}}',
        "t2c": '{"data": {"train": [{"path": "/etc"}, {"path": "../../outside", "task": []}, {"path": 5}, 7]}}',
        "echo": json.dumps({"model": {"llm": {"path": "a/b\n---\nlicense: mit"}, "speech_encoder": {"path": ["x"]}}}),
    }
    for stage, recipe in recipes.items():
        checkpoint = known / f"x-{stage}" / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        (known / f"x-{stage}" / "recipe.json").write_text(recipe)
        (checkpoint / "manifest.json").write_text(deep() if stage == "t2c" else '{"trainable": [], "step": "x"}')
    found["runs"] = known
    piped = folder / "fifo"
    (piped / "evaluation").mkdir(parents=True)
    (piped / "evaluation" / "scores.json").write_text("{}")
    os.mkfifo(piped / "evaluation" / "samples.json")
    linked = folder / "linked"
    (linked / "evaluation").mkdir(parents=True)
    (linked / "evaluation" / "scores.json").write_text("{}")
    (linked / "evaluation" / "samples.json").write_text("[]")
    (linked / "result.json").symlink_to(world.outside / "secret.json")
    (linked / "x-s2t").symlink_to(world.outside)
    return {**found, "fifo": piped, "linked": linked}


def vocoder_configs(good: dict[str, Any]) -> dict[str, str]:
    """`config.json` of vocoders by what is wrong with it."""
    hifi = {"model_type": "seamless_m4t"}
    return {
        "deep": deep(),
        "list": "[]",
        "kind": '{"kind": 7}',
        "huge": json.dumps({**good, "n_units": 1 << 50}),
        "large": json.dumps({**good, "n_units": 1 << 28}),
        "text": json.dumps({**good, "width": "x"}),
        "more": json.dumps({**good, "evil": 1}),
        "hifi-empty": "{}",
        "hifi-huge": json.dumps({**hifi, "unit_hifi_gan_vocab_size": 10**9}),
        "hifi-text": json.dumps({**hifi, "unit_hifi_gan_vocab_size": "x"}),
        "hifi-speakers": json.dumps({**hifi, "vocoder_num_spkrs": 10**9}),
        "hifi-names": json.dumps({**hifi, "vocoder_num_spkrs": 0, "speaker_id_map": [ESCAPE]}),
        "hifi-negative": json.dumps({**hifi, "unit_hifi_gan_vocab_size": -4}),
        "hifi-code": json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    }


def vocoder_checkpoints(folder: Path, world: World) -> list[Path]:
    """Files in the place of a fairseq checkpoint."""
    import torch

    folder.mkdir()
    torch.save({"generator": {"dict.weight": _Runs(world.command)}}, folder / "code")
    torch.save(_Runs(world.command), folder / "whole")
    (folder / "pickle").write_bytes(world.pickled())
    torch.save(
        {"generator": {"dict.weight": _Runs(world.command)}}, folder / "old", _use_new_zipfile_serialization=False
    )
    torch.save({"generator": {"dict.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}}, folder / "expanded")
    torch.save({"generator": {ESCAPE: torch.zeros(1), 7: [[]]}}, folder / "names")
    torch.save({"generator": []}, folder / "list")
    with zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("bomb/data.pkl", bytes(64 << 20))
    with zipfile.ZipFile(folder / "zip", "w") as odd:
        odd.writestr("../../outside/data.pkl", world.pickled())
    (folder / "empty").write_bytes(b"")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "secret").symlink_to(world.outside / "secret.txt")
    return sorted(folder.iterdir())


def fairseq_configs(good: dict[str, Any]) -> dict[str, str]:
    """`config.json` of fairseq's code HiFi-GAN by what is wrong with it."""
    return {
        "deep": deep(),
        "list": "[]",
        "huge": json.dumps({**good, "num_embeddings": 1 << 62}),
        "wide": json.dumps({**good, "upsample_initial_channel": 1 << 15}),
        "long": json.dumps({**good, "upsample_rates": [1] * 100_000}),
        "layers": json.dumps({**good, "upsample_rates": [1] * 16, "upsample_kernel_sizes": [1] * 16}),
        "text": json.dumps({**good, "embedding_dim": ESCAPE}),
        "nested": json.dumps({**good, "resblock_dilation_sizes": [[[]]]}),
        "speakers": json.dumps({**good, "multispkr": True, "num_speakers": 1 << 62}),
        "duration": json.dumps({**good, "dur_predictor_params": [ESCAPE]}),
        "infinite": json.dumps({**good, "dur_predictor_params": {"var_pred_dropout": float("inf")}}),
    }


def listings(world: World) -> dict[str, list[tuple[str, bytes]]]:
    """Lists of other corpora: corpus to a file's place and its content."""
    outside = f"{world.outside}/speech"
    texts = [
        f"../../../../outside/speech {ESCAPE}\n{outside} x\n\0 nul\n{'y' * 5000} long\n".encode(),
        b"\xff\xfe" * 100,
        b"z" * (3 << 20),
    ]
    turns = [{"from": "human", "value": "x", "audio": "../../outside/speech.wav"}, {"from": "gpt", "value": "y"}]
    lists = [deep().encode(), b"{}", b"[7, null, [[]]]", b"[", json.dumps([{"conversations": turns}]).encode()]
    lines = [
        f'{{"plain_text": {deep()}\n'.encode(),
        b'{"plain_text": 7}\n[]\n\xff\n{"plain_text": "<sosp><99999999999999999999><eosp>"}\n',
        json.dumps({"plain_text": f"[Human]: {ESCAPE}<sosp><1><eosp> <eoh> [SpeechGPT]: x <eoa>"}).encode(),
    ]
    return {
        "librispeech": [("LibriSpeech/train-clean-100/1/2/1-2.trans.txt", text) for text in texts],
        "mls": [("mls/train/transcripts.txt", text.replace(b" ", b"\t")) for text in texts],
        "audioqa": [("train.json", text) for text in lists],
        "speech-instruct": [("chain_of_modality_instruction.jsonl", text) for text in lines],
    }
