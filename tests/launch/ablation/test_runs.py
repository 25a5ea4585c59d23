"""The runs of an ablation: trained in order, reused when done, continued when not, replaced when of another recipe."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from echox.config.load import load_recipe, resolved
from echox.errors import LaunchError
from launch import paths
from launch.ablation import runs as module
from launch.ablation.arms import ARMS, Arm
from launch.ablation.runs import Ablation, run_echox, workers

ARM = {arm.name: arm for arm in ARMS}


def save(name: str, overrides: Sequence[str], step: int | None = None, age_s: float = 0.0) -> Path:
    """A checkpoint of a recipe; None: of its last step."""
    recipe = paths.make_absolute(load_recipe(name, overrides), Path.cwd())
    step = recipe.optim.steps if step is None else step
    path = Path(recipe.storage) / recipe.name / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": step, "recipe": resolved(recipe)}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


class Trainer:
    """Stands for `run_echox`: a training leaves a checkpoint of its last step, unless it is stopped before."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stop_at: int | None = None

    def __call__(self, words: Sequence[str], processes: int) -> None:
        command, name, *overrides = words
        assert overrides[-1] == f"scaling.workers={processes}"
        self.calls.append(f"{command} {load_recipe(name, overrides).name}")
        if command == "train":
            save(name, overrides, self.stop_at)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainer:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    made = Trainer()
    monkeypatch.setattr(module, "run_echox", made)
    return made


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def ablation(tmp_path: Path, said: list[str]) -> Ablation:
    return Ablation(scale="demo", storage=tmp_path / "runs", corpus=tmp_path / "corpus", say=said.append)


def test_what_the_arms_share_is_trained_once(ablation: Ablation, trainer: Trainer, tmp_path: Path) -> None:
    assert ablation.run(ARM["echo"], 17) == tmp_path / "runs" / "ablation" / "echo-s17"
    assert trainer.calls == ["train demo-s2t", "train demo-t2c", "respond echo-s17", "train echo-s17"]
    trainer.calls.clear()
    ablation.run(ARM["reference"], 17)
    assert trainer.calls == ["train reference-s17"], "the reference needs no answers of the model"
    trainer.calls.clear()
    ablation.run(ARM["raw-embeddings"], 18)
    assert trainer.calls == ["train raw-embeddings-t2c-s18", "respond raw-embeddings-s18", "train raw-embeddings-s18"]


def test_a_done_run_is_not_trained_again_and_a_half_one_goes_on(
    ablation: Ablation, trainer: Trainer, said: list[str]
) -> None:
    for stage in ("s2t", "t2c"):
        save(f"demo/{stage}", ablation.shared(stage), age_s=60)
    save("demo/echo", ablation.echo(ARM["no-segments"], 17), step=50)
    ablation.run(ARM["no-segments"], 17)
    assert trainer.calls == ["respond no-segments-s17", "train no-segments-s17"]
    assert "no-segments-s17: continues at step 50 of 260" in said
    trainer.calls.clear()
    ablation.run(ARM["no-segments"], 17)
    assert trainer.calls == [] and said[-1] == "no-segments-s17: done, reused"
    ablation.run(ARM["no-segments"], 18)
    assert trainer.calls == ["respond no-segments-s18", "train no-segments-s18"], "another seed is another run"


def test_the_demo_s_own_runs_are_used(ablation: Ablation, trainer: Trainer) -> None:
    from rich.console import Console

    from launch.demo.pipeline import Demo

    demo = Demo(storage=ablation.storage, console=Console(quiet=True))
    for stage in ("s2t", "t2c"):
        save(f"demo/{stage}", demo._overrides(stage), age_s=60)
    ablation.run(ARM["echo"], 17)
    assert trainer.calls == ["respond echo-s17", "train echo-s17"]


def test_the_demo_s_own_stage_iii_is_the_base_where_it_is_done(
    ablation: Ablation, trainer: Trainer, tmp_path: Path
) -> None:
    from rich.console import Console

    from launch.demo.pipeline import Demo

    demo = Demo(storage=ablation.storage, console=Console(quiet=True))
    for age_s, stage in ((60, "s2t"), (60, "t2c"), (30, "echo")):
        save(f"demo/{stage}", demo._overrides(stage), age_s=age_s)
    assert ablation.run(ARM["echo"], 17) == tmp_path / "runs" / "demo-echo" and trainer.calls == []
    assert ablation.run(ARM["echo"], 18) == tmp_path / "runs" / "ablation" / "echo-s18", "another seed"
    assert ablation.run(ARM["reference"], 17) == tmp_path / "runs" / "ablation" / "reference-s17", "another arm"
    kept = save("demo/echo", [*demo._overrides("echo"), "optim.lr.echo=0.5"], age_s=20)
    assert ablation.run(ARM["echo"], 17) == tmp_path / "runs" / "ablation" / "echo-s17", "another recipe"
    assert kept.is_file(), "a run that the user made is not moved"


def test_a_run_of_another_recipe_makes_room_if_it_is_an_arm_s_and_is_refused_if_the_arms_start_from_it(
    ablation: Ablation, trainer: Trainer
) -> None:
    ablation.run(ARM["echo"], 17)
    trainer.calls.clear()
    old = save("demo/echo", [*ablation.echo(ARM["reference"], 17), "optim.lr.echo=0.5"])
    ablation.run(ARM["reference"], 17)
    assert trainer.calls == ["train reference-s17"]
    assert len(list((ablation.folder / "replaced").glob("reference-s17-*"))) == 1
    assert json.loads(old.read_text())["recipe"]["optim"]["lr"]["echo"] != 0.5
    shared = save("demo/t2c", [*ablation.shared("t2c"), "optim.lr.t2c=0.5"])
    with pytest.raises(LaunchError, match="the arms start from run demo-t2c, but the recipe changed"):
        ablation.run(ARM["echo"], 17)
    assert shared.is_file(), "a run that the user made is not moved"


def test_a_training_that_was_stopped_is_not_scored(ablation: Ablation, trainer: Trainer) -> None:
    trainer.stop_at = 3
    with pytest.raises(LaunchError, match="run demo-s2t ended before its last step"):
        ablation.run(ARM["echo"], 17)


def test_the_annotated_arm_trains_on_the_copies_with_units(
    ablation: Ablation, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def sources(recipe: object, units: Path, folder: Path, say: object) -> list[str]:
        asked.extend([units, folder])
        return ["data.train.0.path=/copies/sqa-train"]

    monkeypatch.setattr(module, "annotated_sources", sources)
    run = ablation.run(ARM["annotated"], 17)
    assert asked == [ablation.corpus / "units", ablation.folder / "data"]
    (manifest,) = run.rglob("manifest.json")
    assert json.loads(manifest.read_text())["recipe"]["data"]["train"][0]["path"] == "/copies/sqa-train"
    assert trainer.calls[-1] == "train annotated-s17" and not any("respond" in call for call in trainer.calls)


@pytest.mark.parametrize(("gpus", "expected"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_a_training_has_the_processes_that_there_is_room_for(
    gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus)
    monkeypatch.setattr("torch.cuda", cuda)
    assert workers(load_recipe("demo/echo")) == expected
    if gpus == 2:
        assert workers(load_recipe("demo/echo", ["scaling.workers=3", "data.global_batch=24"])) == 1


PROGRAM = """\
#!/bin/sh
echo "$@" > {folder}/words
trap 'echo saved > {folder}/saved; exit 0' TERM
echo $$ > {folder}/pid
{body}
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is run in the place of Python; its body is in the environment."""
    file = tmp_path / "python"
    file.write_text(textwrap.dedent(PROGRAM).format(folder=tmp_path, body='eval "$BODY"'))
    file.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(file))
    yield tmp_path


def test_several_processes_are_started_by_torchrun(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BODY", "exit 0")
    run_echox(["train", "demo/echo", "seed=1"], 1)
    assert (program / "words").read_text().strip() == "-m echox train demo/echo seed=1"
    run_echox(["train", "demo/echo"], 2)
    assert (program / "words").read_text().strip() == (
        "-m torch.distributed.run --standalone --nproc-per-node=2 -m echox train demo/echo"
    )


def test_a_command_that_fails_is_named_with_its_code(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BODY", "exit 7")
    with pytest.raises(LaunchError, match="`echox train demo/echo` ended with exit code 7"):
        run_echox(["train", "demo/echo", "a=b"], 1)


def test_an_interrupt_lets_the_training_save_and_leaves_nothing_running(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BODY", "while :; do sleep 0.05; done")

    def interrupt(signum: int, frame: object) -> None:
        if not (program / "pid").exists():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            run_echox(["train", "demo/echo"], 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (program / "saved").read_text() == "saved\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((program / "pid").read_text()), 0)


def test_arms_without_runs_are_not_asked_for() -> None:
    untrained: list[Arm] = [arm for arm in ARMS if not arm.trained]
    assert [arm.name for arm in untrained] == ["cascade"] and not untrained[0].overrides
