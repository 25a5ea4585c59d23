from __future__ import annotations

from pathlib import Path

import pytest

from echox.config.load import load_recipe
from launch import paths

COPY = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123/")


def test_relative_places_start_at_the_given_folder(tmp_path: Path) -> None:
    recipe = load_recipe("demo/echo", ["tracking.uri=sqlite:///tracking.db", "init.t2c=/elsewhere/t2c"])
    moved = paths.make_absolute(recipe, tmp_path)
    assert moved.storage == str(tmp_path / recipe.storage)
    assert moved.init.s2t == str(tmp_path / str(recipe.init.s2t))
    assert moved.init.t2c == "/elsewhere/t2c"
    assert moved.tracking.uri == f"sqlite:///{tmp_path}/tracking.db"
    assert paths.make_absolute(moved, Path("/other")) == moved


def test_servers_and_absent_values_stay(tmp_path: Path) -> None:
    moved = paths.make_absolute(load_recipe("demo/s2t", ["tracking.uri=http://host:5000"]), tmp_path)
    assert moved.tracking.uri == "http://host:5000"
    assert moved.init.s2t is None


def test_home_is_never_rays_temporary_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(paths.HOME, raising=False)
    assert paths.in_ray_copy(COPY) and not paths.in_ray_copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert paths.home() == tmp_path
    monkeypatch.setattr(Path, "cwd", lambda: COPY)
    assert paths.home() == Path.home() / "echox"
    monkeypatch.setenv(paths.HOME, str(tmp_path / "shared"))
    assert paths.home() == tmp_path / "shared"
