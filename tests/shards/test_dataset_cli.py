"""`echox shards index`, `check` and `stats` through the program."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.cli import main
from echox.stream.format.catalogue import CATALOGUE_NAME, Catalogue
from echox.stream.format.writer import write_shards
from echox.stream.storage.store import ShardStore, read_folder
from tests.stream.http_server import serve
from tests.stream.tars import flip, header_of, write_tar


def sample(number: int, **changes: Any) -> dict[str, Any]:
    seconds = 0.25 * (1 + number % 3)
    wave = np.sin(np.arange(int(16000 * seconds)) / (5 + number)).astype(np.float32) * 0.3
    meta = {
        "id": f"s{number}",
        "question_text": f"question {number}",
        "answer_text": "yes",
        "question_s": seconds,
        "source": "even" if number % 2 == 0 else "odd",
    }
    members = {"question.flac": encode_flac(wave), "answer.units": np.arange(4 + number, dtype="<u2").tobytes()}
    return {"__key__": f"s{number:02d}", **members, "json": meta, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", (sample(n) for n in range(10)), per_shard=4)
    return tmp_path / "set"


def checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    code = main(["shards", "check", str(folder), "--workers", "1", "--json"])
    return code, json.loads(capsys.readouterr().out)["defects"]


def test_index_makes_a_dataset_of_any_folder_of_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(read_folder(folder))
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    assert main(["shards", "index", str(folder), "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert (listing["samples"], listing["shards"], listing["location"]) == (10, 3, str(folder))
    assert list(read_folder(folder)) == before
    assert main(["shards", "index", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "10 samples in 3 shards" in printed.out and "3/3" in printed.err


def test_index_names_shard_byte_and_reason_and_exits_4(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "shard-000001.tar"
    at = header_of(shard, "s05.json")
    flip(shard, at + 5)
    assert main(["shards", "index", str(folder), "--workers", "2"]) == 4
    assert f"shard-000001.tar, byte {at}: the checksum of a tar header is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["catalogue", "idx"])
def test_index_on_a_full_disk_is_one_sentence_and_leaves_nothing_half(
    folder: Path, step: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if str(target).endswith(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert main(["shards", "index", str(folder), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert f"The index cannot be written: No space left on device [{folder}]" in said and "Traceback" not in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_index_of_shards_behind_a_url(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(read_folder(folder))
    (folder / CATALOGUE_NAME).unlink()
    with serve(folder) as server:
        urls = f"{server.url}/shard-{{000000..000002}}.tar"
        assert main(["shards", "index", urls]) == 4
        assert "add --out FOLDER" in capsys.readouterr().err
        out = tmp_path / "out"
        assert main(["shards", "index", urls, "--out", str(out)]) == 0
        catalogue = Catalogue.open(out)
        assert catalogue.location == server.url and catalogue.samples == 10
        assert sorted(path.name for path in out.iterdir()) == [CATALOGUE_NAME, "dataset.json"]
        from echox.stream.storage.cache import NodeCache

        store = ShardStore(catalogue, cache=NodeCache(tmp_path / "staged", 10**9))
        assert [store.read(number) for number in range(10)] == before
        store.close()
        assert main(["shards", "index", server.url, "--out", str(out)]) == 4
        assert "cannot be listed" in capsys.readouterr().err


def test_a_sound_dataset_has_no_defects(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "check", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 10 samples, 0 defects\n"


def test_check_finds_what_indexing_cannot_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = sample(2)
    meta = good["json"]
    broken = [
        sample(0, **{"question.flac": b"fLaC no audio"}),
        sample(1, **{"answer.units": b"\1\0\1\0"}),
        sample(2, json={**meta, "question_s": 9.0}),
        sample(3, json={**meta, "id": "", "question_s": 0.25}),
        sample(4, **{"answer.units": b"\1\0\2"}),
        sample(5),
        sample(6, json={"id": "s6", "question_s": 0.25, "question_text": " "}),
        sample(7, json={**meta, "id": "s7", "question_s": 0.5, "answer_text": None, "task": "sqa"}),
        sample(8, json={**meta, "id": "s8", "answer_text": None, "task": "asr"}),
    ]
    write_shards(tmp_path / "set", broken, per_shard=4)
    code, defects = checked(tmp_path / "set", capsys)
    assert code == 4
    assert [(d["sample"], d["reason"].split(":")[0]) for d in defects] == [
        ("s00", "member question.flac"),
        ("s01", "member answer.units repeats a unit at once; consecutive duplicates belong removed"),
        ("s02", "member question.flac lasts 0.75 s where its json member says 9.00 s"),
        ("s03", "its json member has no id"),
        ("s04", "member answer.units has 3 bytes, which are no 16-bit numbers"),
        ("s06", "its json member has no question_text and no answer_text"),
        ("s07", "its json member has no answer_text, which task sqa needs"),
    ]
    assert "Cannot decode" in defects[0]["reason"]


def test_check_compares_with_the_index_and_goes_on_after_each_defect(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = sorted(folder.glob("*.tar"))
    at = header_of(first, "s01.question.flac")
    flip(first, at + 512 + 200)
    flip(second, header_of(second, "s06.json") + 512)
    flip(third.with_name(third.name + ".idx"), 1)
    write_tar(folder / "stray.tar", [])
    code, defects = checked(folder, capsys)
    assert code == 4
    found = {(d["shard"], d["sample"], d["reason"].split(";")[0]): d["byte"] for d in defects}
    start = min(header_of(first, f"s01.{extension}") for extension in ("question.flac", "answer.units", "json"))
    assert found[first.name, "s01", "member question.flac has changed since it was indexed"] == start
    assert any(shard == second.name and sample == "s06" for shard, sample, _ in found)
    assert (third.name, "", f"{third.name}.idx does not fit the shard") in found
    assert ("stray.tar", "", "the shard is not in the catalogue") in found
    assert ("stray.tar", "", "stray.tar.idx is missing") in found


def test_check_without_an_index_and_with_a_broken_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "shard-000000.tar"
    at = header_of(shard, "s02.json")
    flip(shard, at)
    (folder / CATALOGUE_NAME).unlink()
    assert main(["shards", "check", str(folder), "--workers", "2"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("there is no dataset.catalogue in the folder of shards; run `echox shards index")
    assert lines[1] == f"shard-000000.tar, byte {at}: the checksum of a tar header is wrong"
    assert lines[-1] == f"{folder}: 6 samples, 2 defects"


def test_stats_count_what_is_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = [sample(n) for n in range(4)] + [
        sample(1, __key__="again"),
        sample(9, __key__="says", json=sample(2)["json"]),
    ]
    write_shards(tmp_path / "d", again, per_shard=5)
    plot = tmp_path / "plots" / "lengths.png"
    assert main(["shards", "stats", str(tmp_path / "d"), "--json", "--plot", str(plot)]) == 0
    stats = json.loads(capsys.readouterr().out)
    seconds = [0.25, 0.5, 0.75, 0.25, 0.5, 0.75]
    assert stats["samples"] == 6 and stats["shards"] == 2
    assert stats["hours"] == pytest.approx(sum(seconds) / 3600, abs=1e-4)
    assert stats["bytes"] == sum(path.stat().st_size for path in (tmp_path / "d").glob("*.tar"))
    length = stats["lengths"]["question_s"]
    assert (length["samples"], length["min"], length["median"], length["max"]) == (6, 0.25, 0.5, 0.75)
    assert stats["lengths"]["units"]["total"] == 4 + 5 + 6 + 7 + 5 + 13
    assert "answer_s" not in stats["lengths"]
    assert {name: row["samples"] for name, row in stats["sources"].items()} == {"even": 3, "odd": 3}
    assert stats["same_content"] == {"samples": 1, "examples": [["s01", "again"]]}
    assert stats["same_text"]["samples"] == 2 and ["s02", "says"] in stats["same_text"]["examples"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["shards", "stats", str(tmp_path / "d")]) == 0
    table = capsys.readouterr().out
    assert "again repeats s01" in table and "question_s" in table


def test_stats_count_tokens_of_a_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    assert main(["shards", "stats", str(folder), "--json", "--tokenizer", str(model)]) == 0
    lengths = json.loads(capsys.readouterr().out)["lengths"]
    assert lengths["question_tokens"]["total"] == 20 and lengths["answer_tokens"]["total"] == 10


def test_what_is_no_dataset_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("index", "check", "stats"):
        assert main(["shards", action, str(tmp_path)]) == 4
        assert "Fix:" in capsys.readouterr().err
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    assert main(["shards", "index", str(tmp_path)]) == 4
    assert "compressed" in capsys.readouterr().err


def test_names_from_outside_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a\x1b[2Jb\u202e"
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "a.tar", [(f"{odd}.json", b"[]")])
    assert main(["shards", "index", str(tmp_path / "set"), "--workers", "1"]) == 4
    said = capsys.readouterr()
    assert "\x1b" not in said.err + said.out and "\u202e" not in said.err
    assert main(["shards", "check", str(tmp_path / "set"), "--workers", "1"]) == 4
    said = capsys.readouterr()
    assert "\x1b" not in said.err + said.out and r"a\x1b[2Jb\u202e" in said.out
