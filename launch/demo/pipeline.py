"""Runs the demo: from an empty cache to a model that answers speech with speech, and a report of it.

Models, corpus, units, a Ray head, the three stages through Ray's job API, evaluation, report. What an earlier run has
done is reused. Every process started here is stopped here, also on Ctrl-C, and no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

from echox.config.load import load_recipe
from echox.config.paths import cache_dir
from echox.engine.checkpoint.manifest import newest_manifest
from echox.errors import EchoXError
from echox.evaluate.columns import COLUMNS, cell, note, percent
from launch import paths, run_state
from launch.client import local_head
from launch.client.follow import follow
from launch.demo.phases import MemoryWatch, Phases

if TYPE_CHECKING:
    from echox.config.schema import Recipe
    from echox.run_records import Progress
    from launch.client.jobs import Jobs
    from shards.demo.plan import Scale

STAGES = ("s2t", "t2c", "echo")
STOP_WAIT_S = 20
LEAD_S = 60
"""Seconds before the end of a stage at which the next one is submitted: about what a start takes."""
EVALUATED = (
    *("sets", "resynthesis_wer", "original_wer"),
    *("t2c_heldout_wer", "t2c_heldout_exact", "t2c_heldout_n"),
)
"""What `result.json` takes over from the evaluation."""


@dataclass
class Demo:
    """One run of the demo.

    Attributes:
        storage: folder of runs, absolute.
        console: where it talks to.
        limit: samples a corpus set at most; None is all.
        evaluated: items evaluated of each set; None is all.
        overrides: stage to `key=value` overrides of its recipe.
        repeat: stages to train again.
        vocoder_steps: optimizer steps of the vocoder; None takes its default.
        scale: recipes, corpus and names of the runs.
        command: by which it was started, for the report.
    """

    storage: Path
    console: Console
    limit: int | None = None
    evaluated: int | None = None
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    repeat: tuple[str, ...] = ()
    vocoder_steps: int | None = None
    scale: Scale = "demo"
    command: str = "python -m launch.demo"
    phases: Phases = field(init=False)
    result: dict[str, Any] = field(init=False)
    _open: dict[str, tuple[Jobs, str]] = field(default_factory=dict)
    _head: local_head.Head | None = None
    _head_is_ours: bool = False
    _before: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.phases = Phases(self.console)
        self.result = {"phases": self.phases.seconds, "reused": self.phases.reused, "peak_memory_gib": 0.0}
        self.result["phases_command"] = self.command

    def run(self) -> None:
        """All phases; `result.json` is written in every case.

        Raises:
            EchoXError: a phase failed.
        """
        self.storage.mkdir(parents=True, exist_ok=True)
        memory = MemoryWatch(self._head_processes)
        try:
            self._own_cache()
            self._data()
            self._train()
            self._evaluate()
        except BaseException as error:
            why = str(error) or type(error).__name__
            self.result["failed"] = {"phase": (list(self.phases.seconds) or ["start"])[-1], "error": why}
            raise
        finally:
            with _uninterrupted():
                self.stop()
            memory.close()
            self.result["peak_memory_gib"] = round(memory.peak_gib, 2)
            (self.storage / "result.json").write_text(json.dumps(self.result, indent=1) + "\n")

    def recipe(self, stage: str) -> Recipe:
        """The recipe of a stage with this run's overrides, paths absolute."""
        return paths.make_absolute(load_recipe(f"{self.scale}/{stage}", self._overrides(stage)), Path.cwd())

    def run_folder(self, stage: str) -> Path:
        """Where a stage's run lies."""
        return self.storage / f"{self.scale}-{stage}"

    def stop(self) -> None:
        """End the jobs, the head and the MLflow run that are still open, if they are ours."""
        from echox.tracking.run import close_orphan

        # The last first: one that waits for another's places must not get them.
        for jobs, job in reversed(self._open.values()):
            self.console.print(f"stopping job {job} ...", highlight=False)
            with contextlib.suppress(EchoXError):
                jobs.stop(job, timeout_s=STOP_WAIT_S + 10)
        self._open.clear()
        if self._head is not None:
            if self._head_is_ours:
                local_head.stop_head(self._head)
            for name, value in self._before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            self._head = None
        for stage in STAGES:
            folder = self.run_folder(stage)
            if (folder / "mlflow.json").exists():
                with contextlib.suppress(Exception):
                    close_orphan(folder)

    def _overrides(self, stage: str) -> list[str]:
        fixed = [f"storage={self.storage}"]
        if stage == "echo":
            fixed += [f"init.{part}={self.run_folder(part)}" for part in ("s2t", "t2c")]
        return [*fixed, *self.overrides.get(stage, ())]

    def _own_cache(self) -> None:
        """A cut-down corpus must not replace the whole one: it gets a cache of its own that shares the models."""
        if self.limit is None:
            return
        shared, own = cache_dir().absolute(), self.storage / "cache"
        if shared == own:
            return
        own.mkdir(parents=True, exist_ok=True)
        for name in ("models", "downloads"):
            (shared / name).mkdir(parents=True, exist_ok=True)
            if not (own / name).is_symlink():
                (own / name).symlink_to(shared / name, target_is_directory=True)
        os.environ["ECHOX_CACHE"] = str(own)

    def _data(self) -> None:
        from echox.release.assets import fetch
        from shards.builder.encode import encode_sources
        from shards.demo.build import build
        from shards.demo.units import add_units, settings_for
        from shards.demo.voice import ensure_vocoder

        cache, say = cache_dir(), self.phases.line
        corpus = cache / "data" / self.scale
        with self._unless_unchanged("assets", "pretrained models and a voice", cache / "models"):
            fetch(None, say)
        with self._unless_unchanged("corpus", "spoken questions, answers and transcripts", corpus):
            build(cache, say, self.limit, scale=self.scale)
        with self._unless_unchanged("units", "speech units and the unit language, fitted on the answers", corpus):
            add_units(cache, say, settings_for(self.limit, self.scale), self.scale)
        with self._unless_unchanged("encode", "the frozen speech encoder's output, once for all epochs", corpus):
            encode_sources(self.recipe("s2t"), say)
        with self.phases.phase("vocoder", "units to waveforms, trained on the answer voice"):
            if not ensure_vocoder(cache, self.vocoder_steps, self._every_ten_seconds(), self.scale):
                self.phases.reuse("vocoder", f"{corpus / 'vocoder'} is newer than the corpus")

    @contextlib.contextmanager
    def _unless_unchanged(self, name: str, title: str, folder: Path) -> Iterator[None]:
        """A phase that counts as reused when it leaves its folder as it was."""
        with self.phases.phase(name, title):
            before = _snapshot(folder)
            yield
            if before and before == _snapshot(folder):
                self.phases.reuse(name, f"{folder} is complete")

    def _train(self) -> None:
        for stage in self.repeat:
            aside = run_state.set_aside(self.recipe(stage))
            if aside is not None:
                self.console.print(f"{stage}: the earlier run is kept in {aside}", highlight=False)
        for stage in STAGES:
            recipe = self.recipe(stage)
            state, why = ("none", "") if stage in self._open else run_state.run_state(recipe)
            if state == "done":
                with self.phases.phase(stage, f"stage {stage}"):
                    self.phases.reuse(stage, why)
                if stage == "s2t":
                    self._respond()
                continue
            if state == "stale":
                aside = run_state.set_aside(recipe)
                self.console.print(f"{stage}: {why}; the earlier run is kept in {aside}", highlight=False)
            jobs = self._cluster()
            with self.phases.phase(stage, f"stage {stage}{f': {why}' if state == 'partial' else ''}"):
                if stage not in self._open:
                    self._submit(jobs, stage)
                folder, watch = Path(recipe.storage) / recipe.name, self._near_end(jobs, recipe)
                follow(*self._open[stage], folder, title=stage, console=self.console, watch=watch)
                del self._open[stage]
            if stage == "s2t":
                self._respond()
        if self._head is not None:
            with self.phases.phase("ray stop", "the Ray head that was started here"):
                self.stop()

    def _respond(self) -> None:
        """Let the trained S2T model answer the questions of Stage III, unless that stage needs no such answers."""
        from echox.respond import respond

        recipe = self.recipe("echo")
        if recipe.model.echo.pseudo_text != "generated":
            return
        with self.phases.phase("respond", "the model's own answers to the training questions"):
            summary = respond(recipe, progress=self._every_ten_seconds())
            if not any(dataset.new for dataset in summary.datasets):
                self.phases.reuse("respond", "every question is answered by these weights")

    def _submit(self, jobs: Jobs, stage: str) -> None:
        job = jobs.submit(f"{self.scale}/{stage}", self._overrides(stage), stop_wait_s=STOP_WAIT_S)
        self._open[stage] = (jobs, job)

    def _near_end(self, jobs: Jobs, running: Recipe) -> Callable[[Progress], None]:
        """Looks at the progress of a stage, and submits the next one when this one is about to end.

        Job, driver and controller of the next are up, then, when the places of this one's workers become free.
        """
        following = STAGES[STAGES.index(running.stage) + 1 :][:1]

        def look(record: Progress) -> None:
            eta_s = record.get("eta_s")
            if eta_s is None or eta_s > LEAD_S:
                return
            for stage in following:
                recipe = self.recipe(stage)
                fresh = stage not in self._open and run_state.run_state(recipe)[0] == "none"
                if fresh and self._waits_for(recipe, running):
                    self._submit(jobs, stage)

        return look

    def _waits_for(self, recipe: Recipe, running: Recipe) -> bool:
        """Whether a stage may be submitted now: it reads nothing of the running one, or has no room beside it."""
        if str(Path(running.storage) / running.name) not in (recipe.init.s2t, recipe.init.t2c):
            return True
        taken = sum(each.scaling.bounds[0] * each.scaling.cpus_per_worker for each in (recipe, running))
        return self._head_is_ours and taken > _head_cpus()

    def _cluster(self) -> Jobs:
        """The job API of a running head, or of one started now."""
        from launch.client.jobs import Jobs

        if self._head is not None:
            return Jobs(self._head.address)
        known = local_head.remembered()
        if known is not None and known.abandoned():
            local_head.stop_head(known)
            known = None
        elsewhere = local_head.running_elsewhere()
        if elsewhere is not None and (known is None or known.address != elsewhere):
            self.console.print(f"using the Ray head at {elsewhere}, and leaving it running", highlight=False)
            return Jobs(elsewhere)
        with self.phases.phase("ray", "a Ray head on this machine"):
            if known is not None:
                self._head, self._head_is_ours = known, False
                self.phases.reuse("ray", f"the head at {known.address} still runs")
            else:
                self._head, self._head_is_ours = local_head.start_head(cpus=_head_cpus()), True
            environment = self._head.environment()
            self._before = {name: os.environ.get(name) for name in environment}
            os.environ.update(environment)
            self.phases.line(f"dashboard and job API at {self._head.address}")
        return Jobs(self._head.address)

    def _head_processes(self) -> list[psutil.Process]:
        if self._head is None or not self._head.alive():
            return []
        root = psutil.Process(self._head.pid)
        return [root, *root.children(recursive=True)]

    def _evaluate(self) -> None:
        from echox.evaluate.published import publish, write_pages
        from echox.evaluate.store import SCORES as SAVED_SCORES
        from echox.evaluate.store import read_metrics, save_evaluation

        run = self.run_folder("echo")
        scores_path, report_path = self.storage / "evaluation" / SAVED_SCORES, self.storage / "report.html"
        curves = {stage: read_metrics(self.run_folder(stage)) for stage in STAGES}
        self.result["final_losses"] = {stage: final_losses(rows) for stage, rows in curves.items()}
        self.result |= teacher_facts(curves)
        wanted = {"evaluated": self.evaluated}
        samples: list[dict[str, Any]] | None = None
        with self.phases.phase("evaluation", "held-out questions, asked and answered aloud"):
            scores = self._earlier_scores(scores_path, report_path, wanted)
            if scores is not None:
                self.phases.reuse("evaluation", f"{scores_path} is newer than what it judges")
            else:
                from echox.evaluate.demo import evaluate_demo

                evaluation = evaluate_demo(
                    run, limit=self.evaluated, progress=self._every_ten_seconds(), corpus=self.scale
                )
                scores, samples = evaluation.to_json(), evaluation.samples()
                save_evaluation(scores_path.parent, {**wanted, **scores}, samples)
        self.result |= {key: scores[key] for key in EVALUATED}
        with self.phases.phase("report", "one page with curves, tables and players"):
            if samples is None:
                self.phases.reuse("report", f"{report_path} shows these scores")
            else:
                runs = {stage: self.run_folder(stage) for stage in STAGES}
                pages = write_pages(self.storage, runs, {**scores, **self.result}, samples, report_path)
                try:
                    publish(run, scores, pages, scores_path.parent, own=True)
                except EchoXError as error:  # the demo is done without a tracking server
                    self.phases.line(str(error))

    def _earlier_scores(self, scores: Path, report: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The scores of an earlier run, if everything they judge is older and they judged as much."""
        manifest = newest_manifest(self.run_folder("echo"))
        if manifest is None or not (scores.is_file() and report.is_file()):
            return None
        made = scores.stat().st_mtime
        if max(manifest.stat().st_mtime, _newest(cache_dir() / "data" / self.scale / "vocoder")) > made:
            return None
        earlier: dict[str, Any] = json.loads(scores.read_text())
        if not set(EVALUATED) <= set(earlier):
            return None
        return earlier if all(earlier.get(key) == value for key, value in wanted.items()) else None

    def _every_ten_seconds(self) -> Callable[[str, int, int], None]:
        said = 0.0

        def watch(name: str, finished: int, total: int) -> None:
            nonlocal said
            if finished == total or time.monotonic() - said > 10:
                said = time.monotonic()
                self.phases.line(f"{name} {finished}/{total}")

        return watch

    def show(self) -> None:
        """One table, what its scores mean, and three lines."""
        from echox.tracking.run import uri_of

        table = Table(title=f"EchoX {self.scale}, held-out sets")
        table.add_column("score", no_wrap=True)
        for name, row in self.result["sets"].items():
            table.add_column("\n".join(filter(None, (name, note(row)))), justify="right")
        for column in COLUMNS:
            table.add_row(column.label, *(cell(column.key, row) for row in self.result["sets"].values()))
        losses = "  ".join(
            f"{stage} {values['loss/total']:.3f}"
            for stage, values in self.result["final_losses"].items()
            if "loss/total" in values
        )
        table.caption = (
            f"final losses: {losses}; WER of held-out sentences: teacher {percent(self.result['t2c_heldout_wer'])}, "
            f"true units {percent(self.result['resynthesis_wer'])}, original {percent(self.result['original_wer'])}; "
            f"{sum(self.phases.seconds.values()):.0f} s, peak {self.result['peak_memory_gib']:.1f} GiB"
        )
        self.console.print(table)
        for column in COLUMNS:
            self.console.print(f"{column.label}: {column.meaning}", highlight=False, soft_wrap=True, markup=False)
        programs = Path(sys.executable).parent
        uri = uri_of(self.run_folder("echo")) or f"sqlite:///{self.storage / 'mlflow.db'}"
        for words in (
            f"report:  {self.storage / 'report.html'}",
            f"curves:  {programs / 'mlflow'} ui --backend-store-uri {shlex.quote(uri)}",
            f"again:   {sys.executable} -m launch.demo --repeat echo   (an interrupted stage resumes by `make demo`)",
        ):
            self.console.print(words, highlight=False, soft_wrap=True, markup=False)


def final_losses(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The last value of every training and validation loss."""
    last: dict[str, float] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if name.startswith(("loss/", "valid/loss/"))}
    return last


def teacher_facts(curves: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, float | None]:
    """What training measured of the T2C teacher and its text.

    Returns:
        `t2c_heldout_loss`, the last validation loss of the t2c run; `segments_per_sample` and
        `pseudo_text_differs_share`, means over what the echo run logged. None where nothing was logged.
    """

    def mean(name: str) -> float | None:
        values = [row[name] for row in curves.get("echo", ()) if name in row]
        return sum(values) / len(values) if values else None

    return {
        "t2c_heldout_loss": final_losses(curves.get("t2c", ())).get("valid/loss/t2c"),
        "segments_per_sample": mean("teacher/segments_per_sample"),
        "pseudo_text_differs_share": mean("pseudo_text/differs_share"),
    }


def _head_cpus() -> int:
    """CPUs of a head started here."""
    return max(2, len(os.sched_getaffinity(0)))


def _snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _newest(folder: Path) -> float:
    """Time of the last change to a folder's files; 0 without any."""
    return max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Cleaning up takes seconds; a second Ctrl-C in them would leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
