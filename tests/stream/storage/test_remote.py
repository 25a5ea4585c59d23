"""Remote datasets against a real web server that fails, a real S3 server, and shell commands."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from echox.errors import CorruptSampleError, DataError, TransientReadError
from echox.stream.format.writer import write_shards
from echox.stream.storage import staging
from echox.stream.storage.cache import NodeCache
from echox.stream.storage.remote import ALLOW_PIPE, locate, open_remote
from echox.stream.storage.remote_index import index_remote
from echox.stream.storage.retry import Retry
from echox.stream.storage.store import Sample, ShardStore, open_catalogue, read_folder
from tests.stream import http_server
from tests.stream.http_server import Fault, Server, serve
from tests.stream.tars import flip, header_of

QUICK = Retry(attempts=4, first_wait_s=0.001)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    choose = random.Random(1)
    samples = [
        {"__key__": f"s{n:02d}", "question.flac": choose.randbytes(3000), "json": {"id": n, "question_s": 1.0}}
        for n in range(12)
    ]
    write_shards(tmp_path / "set", samples, per_shard=3)
    return tmp_path / "set"


@pytest.fixture
def server(dataset: Path) -> Iterator[Server]:
    with serve(dataset) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeCache:
    # Small parts, so that a shard comes in several.
    monkeypatch.setattr(staging, "PART", 4096)
    return NodeCache(tmp_path / "staged", 10**9)


def store_of(location: str, cache: NodeCache, retry: Retry = QUICK) -> ShardStore:
    return ShardStore(open_catalogue(location, cache=cache, retry=retry), cache=cache, retry=retry)


def all_samples(store: ShardStore) -> list[Sample]:
    try:
        return [store.read(sample) for sample in range(store.catalogue.samples)]
    finally:
        store.close()


def test_samples_over_http_are_those_of_the_folder(dataset: Path, server: Server, cache: NodeCache) -> None:
    assert all_samples(store_of(server.url, cache)) == list(read_folder(dataset))
    parts = [asked for name, asked in server.requests if name == "shard-000000.tar"]
    size = (dataset / "shard-000000.tar").stat().st_size
    assert sorted(parts) == sorted(f"bytes={at}-{min(at + 4096, size) - 1}" for at in range(0, size, 4096))
    # A second process of the node finds all of it there, but asks whether the dataset is still the same.
    server.requests.clear()
    assert len(all_samples(store_of(server.url, cache))) == 12
    assert [name for name, _ in server.requests] == ["dataset.json"]


@pytest.mark.parametrize(
    "fault",
    [
        http_server.unavailable,
        http_server.short,
        http_server.short_and_honest,
        http_server.whole_for_part,
        http_server.wrong_range,
        http_server.flipped,
    ],
)
def test_a_fault_that_passes_is_not_noticed(dataset: Path, server: Server, cache: NodeCache, fault: Fault) -> None:
    server.faults = [("shard-000001", fault, 2)]
    assert all_samples(store_of(server.url, cache)) == list(read_folder(dataset))
    assert server.faults[0][2] == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (http_server.unavailable, "503"),
        (http_server.short, "bytes came where|IncompleteRead|broken"),
        (http_server.short_and_honest, "4095 bytes came where 4096 were asked for"),
        (http_server.whole_for_part, "the server answered 200 with the whole file where 206 and a part were due"),
        (http_server.wrong_range, "the server sent bytes 1-"),
    ],
)
def test_a_fault_that_stays_fails_the_run(server: Server, cache: NodeCache, fault: Fault, reason: str) -> None:
    store = store_of(server.url, cache)
    server.faults = [("shard-000001", fault, 10**6)]
    store.read(0)
    with pytest.raises(TransientReadError, match=f"failed 4 times, last: .*({reason})") as caught:
        store.read(3)
    assert caught.value.where == f"{server.url}/shard-000001.tar"
    # Nothing half fetched stays behind, and the shard can be had once the server is well.
    assert not list(cache.folder.glob("*.part"))
    server.faults = []
    assert store.read(3).key == "s03"
    store.close()


def test_a_byte_flipped_at_its_source_costs_its_sample_alone(
    dataset: Path, server: Server, cache: NodeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = dataset / "shard-000001.tar"
    flip(shard, header_of(shard, "s04.question.flac") + 600)
    store = store_of(server.url, cache)
    assert store.read(3).key == "s03"
    assert "is not what was indexed" in capsys.readouterr().err
    with pytest.raises(CorruptSampleError, match="member question.flac of sample s04") as caught:
        store.read(4)
    assert caught.value.kind == "checksum"
    store.close()
    # Mended at its source, it is fetched again.
    flip(shard, header_of(shard, "s04.question.flac") + 600)
    assert len(all_samples(store_of(server.url, cache))) == 12


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_a_shard_of_another_length_is_refused(dataset: Path, server: Server, cache: NodeCache, change: str) -> None:
    store = store_of(server.url, cache)
    shard = dataset / "shard-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(512) if change == "longer" else content[:-512])
    with pytest.raises(DataError, match=r"has \d+ bytes where the catalogue records"):
        store.read(6)
    store.close()


def test_absent_shards_and_datasets_are_refused_at_once(dataset: Path, server: Server, cache: NodeCache) -> None:
    store = store_of(server.url, cache)
    (dataset / "shard-000003.tar").unlink()
    with pytest.raises(DataError, match="404"):
        store.read(11)
    store.close()
    with pytest.raises(DataError, match="404") as caught:
        open_catalogue(f"{server.url}/elsewhere", cache=cache, retry=QUICK)
    assert "dataset.json" in caught.value.where


def test_a_catalogue_that_arrives_damaged_is_fetched_again(server: Server, cache: NodeCache) -> None:
    server.faults = [("dataset.catalogue", http_server.flipped, 1), ("dataset.json", http_server.unavailable, 1)]
    open_catalogue(server.url, cache=cache, retry=QUICK).verify()
    assert [name for name, _ in server.requests].count("dataset.catalogue") == 2
    # One that was damaged in the cache since, too.
    copy = next((cache.folder / "catalogues").glob("*.catalogue"))
    flip(copy, copy.stat().st_size - 70)
    open_catalogue(server.url, cache=cache, retry=QUICK).verify()
    assert [name for name, _ in server.requests].count("dataset.catalogue") == 3


def test_a_window_is_fetched_before_it_is_read(dataset: Path, server: Server, cache: NodeCache) -> None:
    store = store_of(server.url, cache)
    store.stage([1, 2])
    for shard in (1, 2):
        store._shards.open(shard)
    server.requests.clear()
    assert [store.read(sample).number for sample in range(3, 9)] == list(range(3, 9))
    assert server.requests == []
    store.close()


def test_a_cache_of_two_windows_is_enough(dataset: Path, server: Server, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in dataset.glob("*.tar"))
    store = store_of(server.url, NodeCache(tmp_path / "small", 2 * size))
    for shard in range(4):
        store.stage([shard])
        assert store.read(3 * shard).number == 3 * shard
    store.close()


def test_a_local_catalogue_may_speak_of_shards_elsewhere(dataset: Path, server: Server, cache: NodeCache) -> None:
    known = list(read_folder(dataset))
    listing = dataset / "dataset.json"
    described = listing.read_text().replace('"version": 2', f'"version": 2, "shards_at": "{server.url}"')
    here = dataset.with_name("here")
    here.mkdir()
    (here / "dataset.json").write_text(described)
    (here / "dataset.catalogue").write_bytes((dataset / "dataset.catalogue").read_bytes())
    assert all_samples(store_of(str(here), cache)) == known


@pytest.mark.parametrize(
    "place",
    [
        "pipe:touch {mark}; cat {set}/{{}}",
        "{set}",
        "file://{set}",
        "simplecache::file://{set}",
        "https://host/x::file://{set}",
        "sftp://host/{set}",
        "https://host/x|touch {mark}",
        ["https://host"],
        7,
    ],
)
def test_a_dataset_sends_its_readers_to_no_command_and_no_folder(
    dataset: Path, cache: NodeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object
) -> None:
    monkeypatch.setenv(ALLOW_PIPE, "1")  # what a user allows, a dataset may not use
    mark = tmp_path / "mark"
    where = place.format(mark=mark, set=dataset) if isinstance(place, str) else place
    listing = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**listing, "shards_at": where}))
    with pytest.raises(DataError, match="a dataset may name its shards by a URL"):
        open_catalogue(str(dataset), cache=cache)
    assert not mark.exists()


def test_a_pipe_runs_only_where_it_is_allowed(
    dataset: Path, cache: NodeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    location = f"pipe:touch {mark}; cat {dataset}/{{}}"
    for value in (None, "", "0", "yes"):
        monkeypatch.delenv(ALLOW_PIPE, raising=False)
        if value is not None:
            monkeypatch.setenv(ALLOW_PIPE, value)
        with pytest.raises(DataError, match="set ECHOX_ALLOW_PIPE=1 if you trust it"):
            open_catalogue(location, cache=cache)
    assert not mark.exists()
    monkeypatch.setenv(ALLOW_PIPE, "1")
    assert all_samples(store_of(location, cache)) == list(read_folder(dataset)) and mark.exists()


def test_no_catalogue_is_made_that_names_a_command(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_PIPE, "1")
    with pytest.raises(DataError, match="may not say that its shards are at such a location"):
        index_remote(f"pipe:cat {{}} {dataset}/shard-000000.tar", tmp_path / "out")


def test_a_pipe_is_the_sequential_fallback(dataset: Path, cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_PIPE, "1")
    known = list(read_folder(dataset))
    assert all_samples(store_of(f"pipe:cat {dataset}/{{}}", cache)) == known
    with pytest.raises(DataError, match="needs {}"):
        open_remote("pipe:cat x")
    with pytest.raises(TransientReadError, match="exit code 1"):
        open_catalogue(f"pipe:cat {dataset}/no/{{}}", cache=cache, retry=QUICK)


def test_a_pipe_that_breaks_is_run_again(
    dataset: Path, cache: NodeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_PIPE, "1")
    known = list(read_folder(dataset))
    # Every file's first reading ends early: once with an error, once without.
    script = tmp_path / "flaky"
    script.write_text(
        f"[ -e {tmp_path}/$1.seen ] && exec cat {dataset}/$1\ntouch {tmp_path}/$1.seen\nhead -c 900 {dataset}/$1\n"
    )
    assert all_samples(store_of(f"pipe:sh {script} {{}}", cache)) == known


def test_a_recipe_names_a_url_or_a_folder(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(dataset.parent))
    (dataset.parent / "data").mkdir()
    dataset.rename(dataset.parent / "data" / "mine")
    assert locate("s3://bucket/mine") == "s3://bucket/mine"
    assert locate("mine") == dataset.parent / "data" / "mine"
    with pytest.raises(DataError, match="was not found"):
        locate("theirs")


def test_urls_of_unknown_kinds_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_remote("nosuch://bucket/folder")
    with pytest.raises(DataError, match="gs:// needs the package gcsfs"):
        open_remote("gs://bucket/folder")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield "bucket"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_samples_of_an_object_store_are_those_of_the_folder(dataset: Path, s3: str, cache: NodeCache) -> None:
    import fsspec

    fs = fsspec.filesystem("s3")
    fs.mkdir(s3)
    for path in dataset.iterdir():
        fs.put_file(str(path), f"{s3}/sets/one/{path.name}")
    location = f"s3://{s3}/sets/one"
    assert all_samples(store_of(location, cache)) == list(read_folder(dataset))
    out = cache.folder.parent / "out"
    assert index_remote(location, out)["shards_at"] == location
    assert all_samples(store_of(str(out), cache)) == list(read_folder(dataset))
    with pytest.raises(DataError, match="there is no such file"):
        open_catalogue(f"s3://{s3}/sets/two", cache=cache, retry=QUICK)
    cache = NodeCache(cache.folder / "new", 10**9)
    store = store_of(location, cache)
    fs.pipe_file(f"{s3}/sets/one/shard-000000.tar", b"short")
    with pytest.raises(DataError, match="has 5 bytes where the catalogue records"):
        store.read(0)
    store.close()


def test_processes_of_a_node_share_one_fetch(dataset: Path, server: Server, cache: NodeCache) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from echox.stream.storage.cache import NodeCache\n"
        "from echox.stream.storage.store import ShardStore, open_catalogue\n"
        "cache = NodeCache(Path(sys.argv[2]), 10**9)\n"
        "store = ShardStore(open_catalogue(sys.argv[1], cache=cache), cache=cache)\n"
        "print(sum(len(store.read(n).members['question.flac']) for n in range(12)))\n"
        "store.close()\n"
    )
    command = [sys.executable, "-c", code, server.url, str(cache.folder)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ, text=True) for _ in range(3)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["36000\n"] * 3
    fetched = [name for name, asked in server.requests if asked.startswith("bytes=0-")]
    assert sorted(fetched) == [f"shard-00000{n}.tar" for n in range(4)]
    assert [name for name, _ in server.requests].count("dataset.catalogue") == 1
