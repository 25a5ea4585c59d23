"""Checkpoint folders without an engine: sealing, verification, choice, publishing, retention."""

from __future__ import annotations

import errno
import json
import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from echox.engine.checkpoint import cli
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import (
    WEIGHTS,
    checkpoints_folder,
    choose,
    describe_file,
    discard,
    list_checkpoints,
    publish,
    step_name,
    sweep,
    verify,
    write_manifest,
)
from echox.errors import CheckpointError, TransientReadError
from echox.stream.storage import retry


def make(run: Path, step: int) -> Path:
    """A published checkpoint with two files."""
    temporary = checkpoints_folder(run) / f".attempt-1-{step_name(step)}"
    (temporary / "deepspeed").mkdir(parents=True)
    (temporary / WEIGHTS).write_bytes(b"weights %d" % step)
    (temporary / "deepspeed" / "shard.pt").write_bytes(b"shard %d" % step)
    files = {name: describe_file(temporary / name) for name in (WEIGHTS, "deepspeed/shard.pt")}
    contents = {"step": step, "metrics": {"loss/total": 0.5}, "created": "2026-01-01T00:00:00Z", "world_size": 2}
    write_manifest(temporary, contents, files)
    final = checkpoints_folder(run) / step_name(step)
    publish(temporary, final)
    return final


def test_a_published_checkpoint_verifies(tmp_path: Path) -> None:
    assert verify(make(tmp_path, 3))["step"] == 3


@pytest.mark.parametrize("file", [WEIGHTS, "deepspeed/shard.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_every_damage_to_every_file_is_seen(tmp_path: Path, file: str, damage: str) -> None:
    good, bad = make(tmp_path, 3), make(tmp_path, 4)
    path = bad / file
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    elif damage == "cut":
        path.write_bytes(content[:-2])
    else:
        path.unlink()
    with pytest.raises(CheckpointError):
        verify(bad)
    choice = choose(list_checkpoints(tmp_path))
    assert choice.checkpoint.path == good
    assert [folder for folder, _ in choice.rejected] == [bad]
    assert file in choice.rejected[0][1]


def test_a_changed_manifest_is_seen_even_where_json_stays_valid(tmp_path: Path) -> None:
    path = make(tmp_path, 3) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointError, match="its own hash"):
        verify(path.parent)


@pytest.mark.parametrize("file", [WEIGHTS, "manifest.json"])
def test_a_stale_handle_is_no_damage(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 3)
    newest, refused = make(tmp_path, 4), [2]

    def over_nfs(opens: Any) -> Any:
        def refuses(path: Path, *args: Any, **more: Any) -> Any:
            if path == newest / file and refused[0]:
                refused[0] -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return opens(path, *args, **more)

        return refuses

    monkeypatch.setattr(Path, "open", over_nfs(Path.open))
    monkeypatch.setattr(os, "open", over_nfs(os.open))
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    choice = choose(list_checkpoints(tmp_path))
    assert choice.checkpoint is not None and choice.checkpoint.path == newest and choice.rejected == ()
    assert refused == [0]
    refused[0] = 10**9
    with pytest.raises(TransientReadError, match="Stale file handle"):
        choose(list_checkpoints(tmp_path))


def test_a_publication_that_nfs_renames_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def over_nfs(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "rename", over_nfs)
    for step in (3, 3, 4):
        make(tmp_path, step)
    discard(checkpoints_folder(tmp_path) / step_name(4))
    assert [verify(path)["step"] for path in list_checkpoints(tmp_path)] == [3]


def test_only_damaged_checkpoints_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert choose(list_checkpoints(tmp_path)).checkpoint is None
    (make(tmp_path, 3) / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        choose(list_checkpoints(tmp_path))


def test_find_weights_takes_a_run_or_a_checkpoint_and_skips_damage(tmp_path: Path) -> None:
    older, newer = make(tmp_path, 3), make(tmp_path, 4)
    assert find_weights(tmp_path) == newer / WEIGHTS
    assert find_weights(older) == older / WEIGHTS
    (newer / "deepspeed" / "shard.pt").unlink()
    assert find_weights(tmp_path) == newer / WEIGHTS, "an optimizer shard does not matter to who wants weights"
    (newer / WEIGHTS).write_bytes(b"weights 5")
    assert find_weights(tmp_path) == older / WEIGHTS
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        find_weights(tmp_path / "elsewhere")


def test_publish_replaces_and_discard_and_sweep_leave_nothing(tmp_path: Path) -> None:
    (make(tmp_path, 3) / WEIGHTS).write_bytes(b"damaged")
    verify(make(tmp_path, 3))
    leftover = checkpoints_folder(tmp_path) / ".attempt-2-step-00000009"
    leftover.mkdir()
    discard(make(tmp_path, 4))
    sweep(tmp_path)
    assert [path.name for path in checkpoints_folder(tmp_path).iterdir()] == ["step-00000003"]


def test_command_line_lists_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    cli.add_parser(parser.add_subparsers())

    def call(*words: str) -> tuple[int, str]:
        args = parser.parse_args(["checkpoint", *words])
        return args.run(args), capsys.readouterr().out

    make(tmp_path, 3)
    (make(tmp_path, 4) / WEIGHTS).unlink()
    code, out = call("list", str(tmp_path), "--json")
    assert (code, [row["step"] for row in json.loads(out)]) == (0, [4, 3])
    code, out = call("verify", str(tmp_path))
    assert code == CheckpointError.exit_code
    assert "step-00000003  ok" in out
    assert f"{WEIGHTS} is missing" in out
    assert call("verify", str(checkpoints_folder(tmp_path) / "step-00000003")) == (0, "step-00000003  ok\n")
