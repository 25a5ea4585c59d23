"""The demo's own decisions, with stand-ins for everything it calls."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from rich.console import Console

from echox.errors import DataError
from echox.evaluate.columns import COLUMNS
from launch.client import local_head
from launch.demo import __main__ as command
from launch.demo import pipeline as demo_module
from launch.demo.__main__ import main
from launch.demo.pipeline import Demo, final_losses, teacher_facts

SCORES = {
    "sets": {
        "sqa-heldout-phrasing": {
            "text_llm_acc": 1.0,
            "s2t_acc": 0.95,
            "s2s_acc": 0.8,
            "s2t_strict_acc": 0.933,
            "s2s_strict_acc": 0.75,
            "interval_95": [0.628, 0.842],
            "cascade_acc": 0.78,
            "copy_acc": 0.967,
            "retention": 0.84,
            "retention_paired": 0.79,
            "exact": 0.6,
            "wer": 0.25,
            "n": 60,
            "role": "validation",
            "strict_rule": "answer alone",
        }
    },
    "resynthesis_wer": 0.2,
    "original_wer": 0.1,
    "t2c_heldout_wer": 0.3,
    "t2c_heldout_exact": 0.4,
    "t2c_heldout_n": 40,
    "streaming": {"n": 10, "first_audio_ms": 812.0},
}

INTERRUPTED = """
    import contextlib, subprocess, sys, time, os
    from pathlib import Path
    import psutil
    from launch.client import local_head
    from launch.demo.__main__ import main
    from launch.demo.pipeline import Demo
    import launch.client.jobs

    def start_head(*, cpus):
        child = subprocess.Popen([sys.executable, "-c",
            "import subprocess, sys, time; "
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
            "print('up', flush=True); time.sleep(600)"],
            env={**os.environ, local_head.MARK: "demo-test"}, stdout=subprocess.PIPE, start_new_session=True)
        child.stdout.readline()
        me, process, folder = psutil.Process(), psutil.Process(child.pid), Path(sys.argv[1]) / "ray"
        folder.mkdir()
        return local_head.Head(pid=child.pid, created=process.create_time(), mark="demo-test", address="http://127.0.0.1:9",
                            token_file="token", folder=str(folder), starter=me.pid, starter_created=me.create_time())

    class Jobs:
        def __init__(self, address): self.address = address
        def submit(self, *args, **more):
            found = set()
            while len(found) < 2:  # of a process that has just begun, the environment cannot be read yet
                for process in psutil.process_iter():
                    with contextlib.suppress(psutil.Error):
                        if process.environ().get(local_head.MARK) == "demo-test":
                            found.add(process.pid)
            for pid in found:
                print("pid", pid, flush=True)
            return "demo-s2t-a1"
        def wait(self, *args, **more):
            print("following", flush=True)
            time.sleep(600)
        def stop(self, job, timeout_s):
            print("stopped", job, flush=True)

    local_head.start_head = start_head
    local_head.running_elsewhere = lambda: None
    local_head.remembered = lambda: None
    launch.client.jobs.Jobs = Jobs
    local_head.STOP_S = 1.0
    Demo._data = lambda self: None
    sys.exit(main(["--storage", sys.argv[1] + "/runs"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_what_was_started_and_only_that(tmp_path: Path, number: signal.Signals) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    running = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ECHOX_CACHE": str(tmp_path / "cache")},
    )
    pids: list[int] = []
    try:
        assert running.stdout is not None
        lines = []
        for line in running.stdout:
            lines.append(line.strip())
            if line.startswith("following"):
                break
        pids = [int(line.split()[1]) for line in lines if line.startswith("pid ")]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        running.send_signal(number)
        rest, _ = running.communicate(timeout=60)
        assert running.returncode == 130
        assert "stopped demo-s2t-a1" in rest and "interrupted" in rest and "Traceback" not in rest
        assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)
        assert bystander.poll() is None
        result = json.loads((tmp_path / "runs" / "result.json").read_text())
        assert result["failed"] == {"phase": "s2t", "error": "KeyboardInterrupt"}
        assert result["peak_memory_gib"] > 0
    finally:
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        running.kill()
        bystander.kill()
        bystander.wait()


class Stub(Demo):
    """A demo whose phases are given."""

    def _data(self) -> None:
        with self.phases.phase("corpus", "speech"):
            pass

    def _train(self) -> None:
        with self.phases.phase("s2t", "stage"):
            raise DataError("a shard is cut short", where="sqa-train", fix="build it again")


def test_a_failed_phase_is_a_sentence_a_code_and_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "Demo", Stub)
    assert main(["--storage", str(tmp_path)]) == DataError.exit_code
    assert "a shard is cut short" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failed"]["phase"] == "s2t" and "corpus" in result["phases"]


class Recorder:
    """Stands for the job API."""

    def __init__(self) -> None:
        self.submitted: list[str] = []

    def submit(self, recipe: str, overrides: list[str], *, stop_wait_s: int) -> str:
        self.submitted.append(recipe)
        return recipe


@pytest.mark.parametrize(
    ("stage", "cpus", "eta_s", "expected"),
    [
        ("s2t", 2, 61.0, []),
        ("s2t", 2, None, []),
        ("s2t", 8, 59.0, ["demo/t2c"]),  # they have nothing to do with each other
        ("t2c", 2, 59.0, ["demo/echo"]),  # there is no room for it yet
        ("t2c", 8, 59.0, []),  # it would begin before its teacher is trained
        ("echo", 2, 1.0, []),
    ],
)
def test_the_next_stage_gets_in_line_when_one_is_about_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, cpus: int, eta_s: float | None, expected: list[str]
) -> None:
    monkeypatch.setattr(demo_module, "_head_cpus", lambda: cpus)
    demo, jobs = Demo(storage=tmp_path, console=Console(file=io.StringIO()), _head_is_ours=True), Recorder()
    look = demo._near_end(cast(Any, jobs), demo.recipe(stage))
    for _ in range(2):
        look({"eta_s": eta_s})
    assert jobs.submitted == expected


@pytest.mark.parametrize("abandoned", [True, False])
def test_a_head_that_a_killed_demo_left_is_ended_and_one_in_use_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abandoned: bool
) -> None:
    me = psutil.Process()
    left = local_head.Head(
        pid=me.pid,
        created=me.create_time(),
        mark="left",
        address="http://127.0.0.1:9",
        token_file="token",
        folder=str(tmp_path),
        starter=me.pid,
        starter_created=me.create_time() - (60 if abandoned else 0),
    )
    ours = replace(left, mark="ours")
    stopped: list[str] = []
    monkeypatch.setattr(local_head, "remembered", lambda: left)
    monkeypatch.setattr(local_head, "running_elsewhere", lambda: None)
    monkeypatch.setattr(local_head, "start_head", lambda cpus: ours)
    monkeypatch.setattr(local_head, "stop_head", lambda head: stopped.append(head.mark))
    monkeypatch.setattr("launch.client.jobs.Jobs", lambda address: address)
    for name in left.environment():
        monkeypatch.setenv(name, "")
    demo = Demo(storage=tmp_path, console=Console(file=io.StringIO()))
    assert cast(Any, demo._cluster()) == left.address
    assert demo._head == (ours if abandoned else left) and stopped == (["left"] if abandoned else [])
    demo.stop()
    assert stopped == (["left", "ours"] if abandoned else []), "the head of another demo is not ours to stop"


def test_a_wrong_override_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", "optim.steps=3"]) == 2
    assert "STAGE.key=value" in capsys.readouterr().out


def test_every_stage_has_a_quick_recipe_that_is_right(tmp_path: Path) -> None:
    overrides = {stage: command.QUICK_ALWAYS + command.QUICK[stage] for stage in demo_module.STAGES}
    demo = Demo(storage=tmp_path, console=Console(file=io.StringIO()), overrides=overrides)
    for stage in demo_module.STAGES:
        recipe = demo.recipe(stage)
        assert recipe.stage == stage and recipe.optim.steps <= 3 and recipe.storage == str(tmp_path)
    assert demo.recipe("echo").init.s2t == str(tmp_path / "demo-s2t")


def test_a_scale_has_its_recipes_runs_and_inputs(tmp_path: Path) -> None:
    small = Demo(storage=tmp_path, console=Console(file=io.StringIO()), scale="small")
    recipe = small.recipe("echo")
    assert (recipe.scale, recipe.name) == ("small", "small-echo")
    assert recipe.init.t2c == str(small.run_folder("t2c")) == str(tmp_path / "small-t2c")
    assert {source.path.split("/")[0] for source in (*recipe.data.train, *recipe.data.valid)} == {"small"}


@pytest.mark.parametrize(("source", "new", "asked"), [("generated", 3, 1), ("generated", 0, 1), ("reference", 0, 0)])
def test_the_model_answers_where_stage_three_learns_from_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, new: int, asked: int
) -> None:
    calls: list[Any] = []

    class Respond:
        @staticmethod
        def respond(recipe: Any, *, progress: Any) -> Any:
            calls.append(recipe)
            return SimpleNamespace(datasets=(SimpleNamespace(new=new),))

    monkeypatch.setitem(sys.modules, "echox.respond", cast(Any, Respond))
    overrides = {"echo": (f"model.echo.pseudo_text={source}",)}
    demo = Demo(storage=tmp_path, console=Console(file=io.StringIO()), overrides=overrides)
    demo._respond()
    assert len(calls) == asked and all(recipe.stage == "echo" for recipe in calls)
    assert ("respond" in demo.phases.seconds) is bool(asked)
    assert ("respond" in demo.phases.reused) is (asked == 1 and new == 0)


def test_a_cut_down_corpus_gets_its_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    (shared / "models" / "m").mkdir(parents=True)
    monkeypatch.setenv("ECHOX_CACHE", str(shared))
    whole = Demo(storage=tmp_path / "a", console=Console(file=io.StringIO()))
    whole._own_cache()
    assert os.environ["ECHOX_CACHE"] == str(shared)
    cut = Demo(storage=tmp_path / "b", console=Console(file=io.StringIO()), limit=3)
    for _ in range(2):
        cut._own_cache()
        own = Path(os.environ["ECHOX_CACHE"])
        assert own == tmp_path / "b" / "cache" and (own / "models" / "m").is_dir() and not (own / "data").exists()


class Evaluated:
    """Stands for `echox.evaluate.demo`."""

    calls = 0

    @classmethod
    def evaluate_demo(cls, run: Path, *, limit: int | None, progress: Any, corpus: str) -> Evaluated:
        assert corpus == "demo"
        cls.calls += 1
        progress("sqa-heldout-phrasing", 60, 60)
        return cls()

    def to_json(self) -> dict[str, Any]:
        return SCORES

    def samples(self) -> list[dict[str, Any]]:
        return []


def test_evaluation_is_shown_kept_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "echox.evaluate.demo", cast(Any, Evaluated))
    monkeypatch.setattr(Evaluated, "calls", 0)
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Demo, "_data", lambda self: None)
    monkeypatch.setattr(Demo, "_train", lambda self: None)
    for stage in demo_module.STAGES:
        folder = tmp_path / f"demo-{stage}"
        manifest = folder / "checkpoints" / "step-00000002" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        rows = [{"step": 1, "loss/total": 2.0, "lr/lora": 1.0}, {"step": 2, "loss/total": 1.25}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')

    def run(**more: Any) -> tuple[dict[str, Any], str]:
        screen = Console(file=io.StringIO(), width=200)
        demo = Demo(storage=tmp_path, console=screen, command="make demo", **more)
        demo.run()
        demo.show()
        return json.loads((tmp_path / "result.json").read_text()), cast(io.StringIO, demo.console.file).getvalue()

    result, said = run()
    assert result["sets"] == SCORES["sets"] and result["original_wer"] == 0.1 and "failed" not in result
    assert result["final_losses"]["echo"] == {"loss/total": 1.25}
    assert set(result) == {
        *(
            "phases",
            "phases_command",
            "reused",
            "peak_memory_gib",
            "final_losses",
            "sets",
            "resynthesis_wer",
            "original_wer",
        ),
        *("t2c_heldout_wer", "t2c_heldout_exact", "t2c_heldout_n"),
        *("t2c_heldout_loss", "segments_per_sample", "pseudo_text_differs_share"),
    }
    assert (result["t2c_heldout_wer"], result["segments_per_sample"]) == (0.3, None)
    plain = " ".join(said.split())
    for shown in (*(f"{column.label}: {column.meaning}" for column in COLUMNS), "strict: answer alone"):
        assert shown in plain, shown
    for shown in (
        "95.0 %",
        "80.0 %",
        "75.0 %",
        "[63–84]",
        "0.79",
        "30.0 %",
        "echo 1.250",
        f"{tmp_path}/report.html",
        "mlflow ui",
        "--repeat echo",
    ):
        assert shown in said, shown
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == 3 and "<code>make demo</code>" in page and "first sound, median" in page
    assert "| first sound, median | 812 ms |" in (tmp_path / "MODEL_CARD.md").read_text()
    assert "it was not tracked" in said

    result, said = run()
    assert Evaluated.calls == 1 and result["reused"] == ["evaluation", "report"] and "80.0 %" in said
    run(evaluated=5)
    assert Evaluated.calls == 2
    later = tmp_path / "demo-echo" / "checkpoints" / "step-00000003" / "manifest.json"
    later.parent.mkdir()
    later.write_text("{}")
    os.utime(later, (later.stat().st_mtime + 60,) * 2)
    run(evaluated=5)
    assert Evaluated.calls == 3
    # Scores of a version that did not know all of these are made again.
    scores = tmp_path / "evaluation" / "scores.json"
    old = json.loads(scores.read_text())
    del old["t2c_heldout_wer"]
    scores.write_text(json.dumps(old))
    os.utime(scores, (later.stat().st_mtime + 60,) * 2)
    run(evaluated=5)
    assert Evaluated.calls == 4


def test_losses_of_a_missing_run_are_empty() -> None:
    assert final_losses([]) == {}
    assert set(teacher_facts({}).values()) == {None}


def test_what_training_measured_of_the_teacher_is_kept() -> None:
    t2c = [{"step": 1, "valid/loss/t2c": 3.0}, {"step": 2, "loss/t2c": 1.0}, {"step": 2, "valid/loss/t2c": 2.5}]
    echo = [
        {"step": 1, "loss/denoising": 1.0},
        {"step": 2, "teacher/segments_per_sample": 1.0, "pseudo_text/differs_share": 0.25},
        {"step": 3, "teacher/segments_per_sample": 1.5, "pseudo_text/differs_share": 0.5},
    ]
    facts = teacher_facts({"t2c": t2c, "echo": echo})
    assert facts == {"t2c_heldout_loss": 2.5, "segments_per_sample": 1.25, "pseudo_text_differs_share": 0.375}
