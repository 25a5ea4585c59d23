"""Every command on inputs of someone who wishes us ill: rejected by name or passed over, and nothing run, read or lost.

One process imports what the commands need, and each command is a fork of it, see `tests.hostile.warm`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echox import cli
from echox.speak.unit_mel import UnitMel, UnitMelConfig
from echox.stream.format.writer import write_shards
from tests.hostile import inputs
from tests.hostile.inputs import World, deep
from tests.hostile.running import Outcome, Warm, held
from tests.test_cli import leaves
from tests.vocoder import fairseq, toy

COVERED = {
    "shards build manifest",
    "shards build audioqa",
    "shards build hh-rlhf-speech",
    "shards build librispeech",
    "shards build magpie-pro-speech",
    "shards build mls",
    "shards build sharechatx",
    "shards build speech-instruct",
    "shards encode",
    "shards index",
    "shards check",
    "shards stats",
    "units fit",
    "units import",
    "units extract",
    "unit-language fit",
    "unit-language encode",
    "unit-language decode",
    "vocoder import",
    "vocoder train",
    "speak",
    "serve",
    "evaluate",
    "report",
    "listen",
    "voices",
    "runs list",
    "runs compare",
    "checkpoint list",
    "checkpoint verify",
    "export",
    "import",
    "status",
    "logs",
    "stop",
    "resume",
    "submit",
    "train",
    "respond",
    "bench step",
    "bench life",
    "bench teacher",
    "plan",
    "ablate",
    "sweep",
    "new",
    "run",
}
"""Commands that the tests below run on what others made."""
OF_OUR_OWN = {
    "recipe keys": "reads nothing",
    "shards build demo": "makes its own corpus, of pinned models",
    "bench data": "makes its own data",
    "bench recovery": "makes its own run",
    "bench gpu": "makes its own models; its results file is read in tests/bench/test_gpu.py",
    "doctor": "reads this machine",
}
"""Commands that take no file of others, and why."""


def test_every_command_is_run_on_hostile_input_or_takes_none() -> None:
    known = {" ".join(words) for words in leaves(cli.build_parser([]))}
    assert known == COVERED | set(OF_OUR_OWN)
    assert not COVERED & set(OF_OUR_OWN)


class Trial:
    """The world of one test: runs commands in it and collects what went wrong."""

    def __init__(self, root: Path, warm: Warm) -> None:
        self.world = World(root)
        self.root, self.out = root, root / "out"
        self.out.mkdir()
        self._warm = warm
        self.faults: list[str] = []

    def run(self, *words: Any, refused: bool = False, seconds: float = 25.0) -> Outcome:
        """Run one command; with `refused`, it must not succeed."""
        with held(self.world, self.out) as wrong:
            outcome = self._warm.run(*words, folder=self.out, seconds=seconds)
        wrong += outcome.faults()
        if self.world.secret in outcome.out + outcome.err:
            wrong.append("the secret is shown")
        if refused and outcome.code == 0:
            wrong.append("it was taken")
        if wrong:
            command = " ".join(outcome.words).replace(str(self.root), "")
            self.faults.append(f"{command}: {', '.join(wrong)}: {outcome.err.strip()[-300:]}")
        return outcome

    def run_on(self, inputs: Iterable[Path], *commands: list[Any], refused: bool = False) -> None:
        """Run commands on every input; `None` in a command is its place."""
        for path in inputs:
            for command in commands:
                self.run(*(path if word is None else word for word in command), refused=refused)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    started = Warm(tmp_path_factory.mktemp("warm"))
    yield started
    started.close()


@pytest.fixture
def trial(tmp_path: Path, warm: Warm) -> Iterator[Trial]:
    made = Trial(tmp_path / "world", warm)
    yield made
    assert made.faults == []


ALL = ("--max-rejected", "1", "--workers", "1")


def test_recordings(trial: Trial) -> None:
    folder = trial.root / "recordings"
    inputs.recordings(folder, trial.world)
    built = trial.out / "built"
    trial.run("shards", "build", "manifest", "--source", folder / "manifest.jsonl", "--out", built, *ALL)
    for voice in (folder, folder / "manifest.jsonl"):
        trial.run("new", trial.out / "mine", "--llm", "no/such-llm", "--voice", voice, refused=True)
    assert json.loads((built / "dataset.json").read_text())["samples"] == 6, "the good ones are kept"
    trial.run("units", "fit", folder, trial.out / "units", "--features", "log_mel", "--clusters", "2")
    trial.run("units", "extract", trial.out / "units", folder, "--out", trial.out / "units.jsonl")
    for sound in (*inputs.SOUNDS, "fifo.wav", "loop.wav", "device.wav", "folder.wav"):
        trial.run("speak", "--question", folder / sound, "--out", trial.out / "a.wav", "--run", folder, refused=True)


def test_benchmarks(trial: Trial) -> None:
    judge, vocoder = trial.root / "judge", trial.root / "vocoder"
    judge.mkdir()
    for name in ("config.json", "model.safetensors"):
        (judge / name).write_text("{}")
    UnitMel(UnitMelConfig(n_units=5, width=16, blocks=1)).save(vocoder)
    run = inputs.sealed_run(trial.root / "run")
    for path in inputs.benchmarks(trial.root / "sets", trial.world):
        where = ("--benchmark", "theirs", "--data", f"theirs={path}")
        trial.run("evaluate", run, *where, "--vocoder", vocoder, "--judge", judge, "--out", trial.out, refused=True)
    assert not any(trial.out.rglob("*.jsonl")), "nothing was answered"


@pytest.mark.slow
def test_archives_of_dialogues(trial: Trial) -> None:
    whole = trial.root / "whole"
    inputs.dialogue_archives(whole, trial.world)
    for corpus in ("hh-rlhf-speech", "sharechatx", "magpie-pro-speech", "audioqa"):
        trial.run("shards", "build", corpus, "--source", whole, "--out", trial.out / corpus, *ALL, refused=True)
    for path in sorted(whole.iterdir()):
        alone = trial.root / "alone" / path.name
        alone.mkdir(parents=True)
        path.rename(alone / path.name)
        command = ["shards", "build", "hh-rlhf-speech", "--out", trial.out / f"one-{path.name}", *ALL, "--source"]
        trial.run(*command, alone)


def test_lists_of_other_corpora(trial: Trial) -> None:
    for name, files in inputs.listings(trial.world).items():
        for number, (file, content) in enumerate(files):
            source = trial.root / f"{name}-{number}"
            (source / file).parent.mkdir(parents=True)
            (source / file).write_bytes(content)
            trial.run("shards", "build", name, "--source", source, "--out", trial.out / source.name, *ALL)


def test_shards_of_other_tools(trial: Trial) -> None:
    together = trial.root / "together"
    inputs.shards_of_others(together, trial.world)
    trial.run_on([together], ["shards", "check", None, "--workers", "1"])
    for shard in sorted(together.iterdir()):
        alone = trial.root / "alone" / shard.stem
        alone.mkdir(parents=True)
        shard.rename(alone / shard.name)
        trial.run_on([alone], ["shards", "index", None, "--workers", "1"], ["shards", "stats", None])


@pytest.mark.slow
def test_datasets(trial: Trial) -> None:
    found = inputs.hostile_datasets(trial.root / "sets", trial.world)
    language = ["unit-language", "fit", None, trial.out / "language.json", "--clusters", "500", "--words", "520"]
    trial.run_on(found.values(), ["shards", "stats", None, "--json"], language)
    trial.run_on(found.values(), ["shards", "check", None, "--workers", "1"])
    elsewhere = [found[name] for name in found if name.startswith(("at-", "sealed-names"))]
    trial.run_on(elsewhere, ["units", "fit", None, trial.out / "units"], language, refused=True)
    listings = [found[name] for name in found if name.startswith(("listing-", "header-dee", "fifo"))]
    trial.run_on(listings, ["shards", "index", None, "--workers", "1"])
    train = ["train", "demo/s2t", "model.random_init=true", f"storage={trial.out}", "tracking.uri=http://127.0.0.1:9"]
    for path in elsewhere[:2]:
        where = f'data.train=[{{"path": "{path}", "task": "sqa"}}]'
        trial.run("respond", "demo/echo", where, refused=True)
        trial.run("shards", "encode", "demo/s2t", where, refused=True)
        trial.run(*train, where, refused=True)
        trial.run("vocoder", "train", "demo", f'data.train=["{path}"]', *train[3:], refused=True)


def test_units_and_unit_languages(trial: Trial) -> None:
    folder = trial.root / "units"
    inputs.unit_files(folder, trial.world)
    fit = ["unit-language", "fit", None, trial.out / "l.json", "--clusters", "4", "--words", "9"]
    trial.run_on(sorted(folder.glob("units-*")), fit)
    trial.run_on(sorted(folder.glob("language-*")), ["unit-language", "encode", None, "-"], refused=True)
    good = trial.root / "good.jsonl"
    good.write_text('{"units": [0, 1, 2, 3, 0, 1]}\n')
    trial.run(*[good if word is None else word for word in fit])
    trial.run_on(sorted(folder.glob("units-*")), ["unit-language", "encode", trial.out / "l.json", None])
    trial.run_on(sorted(folder.glob("words-*")), ["unit-language", "decode", trial.out / "l.json", None])
    centroids = [path for path in sorted(folder.iterdir()) if not path.name.startswith(("units", "words", "lang"))]
    imported = ["units", "import", None, trial.out / "units", "--model", "x", "--layer", "1", "--features", "log_mel"]
    trial.run_on(centroids, imported, refused=True)
    for path in centroids:
        units = trial.root / f"k-{path.name}"
        units.mkdir()
        path.rename(units / "kmeans.npz")
        trial.run("units", "extract", units, trial.world.outside / "speech.wav", refused=True)


def test_recipes(trial: Trial) -> None:
    found = inputs.recipes(trial.root / "recipes", trial.world).values()
    commands: list[list[Any]] = [["train", None], ["submit", None, "--cluster", "slurm", "--dry-run"]]
    trial.run_on(found, *commands, refused=True)
    some = sorted(found)[::4]
    trial.run_on(some, ["respond", None], ["shards", "encode", None], ["bench", "step", None], refused=True)
    trial.run_on(some, ["bench", "life", None], ["bench", "teacher", None], ["plan", None], refused=True)
    for text in ("[" * 3000, "{a: " * 200, "&a [*a]", "!!python/object/apply:os.system [x]", "9" * 6000):
        trial.run("train", "demo/s2t", f"name={text}", refused=True)
        trial.run("ablate", "demo", f"name={text}", "--storage", trial.out, refused=True)
        project = trial.out / "project"
        project.mkdir(exist_ok=True)
        (project / "project.yaml").write_text(text)
        trial.run("run", project, refused=True)
        trial.run("sweep", "demo/s2t", f"name={text},x", f"storage={trial.out}", refused=True)


@pytest.mark.slow
def test_run_folders(trial: Trial) -> None:
    storage = trial.root / "storage"
    found = inputs.hostile_runs(storage, trial.world)
    good = storage / "good"
    good.mkdir()
    (good / "mlflow.json").write_text('{"name": "good"}')
    (good / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n')
    for path in found.values():
        trial.run("status", path)
        trial.run("logs", path)
        trial.run("logs", path, "--errors", "--json")
    known = [path for path in found.values() if (path / "mlflow.json").is_file() and "server" not in path.name]
    alone = [path for path in known if "metrics" in path.name or path.name == "sparse"]  # a sentence of their own
    trial.run_on(alone, ["runs", "compare", good, None, "--storage", storage])
    known = [path for path in known if path not in alone]
    outcome = trial.run("runs", "compare", good, *known, "--storage", storage, seconds=60)
    assert outcome.code == 0, outcome.err
    assert not (trial.world.outside / "made.db").exists()
    for number, path in enumerate(found.values()):
        if "resolved" in path.name:
            trial.run("resume", path, "--cluster", "slurm", "--dry-run", refused=True)
        if number % 5 == 0 or "stop" in path.name:
            trial.run("stop", path)
    listed = trial.run("runs", "list", "--storage", storage, "--limit", "0", "--json", seconds=60)
    assert {"good", "evil"} <= {row["name"] for row in json.loads(listed.out)}


def test_checkpoints(trial: Trial) -> None:
    found = inputs.hostile_checkpoints(trial.root / "storage", trial.world)
    vocoder = trial.root / "vocoder"
    UnitMel(UnitMelConfig(n_units=5, width=16, blocks=1)).save(vocoder)
    speak = ["speak", "--question", trial.world.outside / "speech.wav", "--vocoder", vocoder, "--out", "a.wav"]
    whole = list(found.values())
    trial.run_on(whole, ["checkpoint", "list", None], ["checkpoint", "list", None, "--json"])
    trial.run_on(whole, ["checkpoint", "verify", None])
    serve = ["serve", None, "--vocoder", vocoder, "--port", "0"]
    listen = ["listen", None, "--vocoder", vocoder, "--question", trial.world.outside / "speech.wav"]
    export = [["export", None, trial.out / "exported", "--format", form] for form in ("hf", "echox")]
    trial.run_on(whole, [*speak, "--run", None], serve, listen, ["evaluate", None], *export, refused=True)


def test_releases(trial: Trial) -> None:
    found = inputs.releases(trial.root / "releases", trial.world)
    trial.run_on(found, ["import", None, trial.out / "imported", "--drop-unknown"], refused=True)
    assert list(trial.out.iterdir()) == []


def test_vocoders(trial: Trial) -> None:
    good = trial.root / "good"
    UnitMel(UnitMelConfig(n_units=5, width=16, blocks=1)).save(good)
    for name, text in inputs.vocoder_configs(json.loads((good / "config.json").read_text())).items():
        folder = trial.root / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(text)
        question = trial.world.outside / "speech.wav"
        trial.run("speak", "--question", question, "--out", "a.wav", "--run", good, "--vocoder", folder, refused=True)


def test_voices_to_compare(trial: Trial) -> None:
    judge, good = trial.root / "judge", trial.root / "good"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    UnitMel(UnitMelConfig(n_units=5, width=16, blocks=1)).save(good)
    whole = toy.sample("s", *toy.clip(0))
    whole["json"]["answer_text"] = "word"
    changes: dict[str, dict[str, Any]] = {
        "units-high": {"answer.units": b"\xff\xff" * 9},
        "units-odd": {"answer.units": b"odd"},
        "durations-few": {"answer.durations": b"\x01\x00"},
        "durations-long": {"answer.durations": b"\xff\xff" * 9},
        "sound": {"answer.flac": b"fLaC" + trial.world.pickled()},
        "text-none": {"json": {**whole["json"], "answer_text": None}},
    }
    for name, change in changes.items():
        write_shards(trial.root / name, [{**whole, **change}])
        trial.run("voices", trial.root / name, good, "--judge", judge, "--out", trial.out, refused=True)
    assert not any(trial.out.iterdir())


def test_vocoders_to_import(trial: Trial) -> None:
    good, out = trial.root / "good", trial.out / "voice"
    checkpoint, config = fairseq.write(good, fairseq.SMALL, fairseq.random_state(fairseq.SMALL))
    command = ["vocoder", "import", checkpoint, config, out, "--units"]
    assert trial.run(*command[:-1]).code == 0
    for path in inputs.vocoder_checkpoints(trial.root / "checkpoints", trial.world):
        trial.run("vocoder", "import", path, config, trial.out / "evil", refused=True)
    for name, text in inputs.fairseq_configs(fairseq.SMALL).items():
        path = trial.root / f"{name}.json"
        path.write_text(text)
        trial.run("vocoder", "import", checkpoint, path, trial.out / "evil", refused=True)
    for text in (deep(), '{"features": 7}', '{"clusters": 1e999}'):
        (good / "unit_set.json").write_text(text)
        trial.run(*command, good, refused=True)
    assert not (trial.out / "evil").exists()


def test_recipes_of_vocoders(trial: Trial) -> None:
    found = sorted(inputs.recipes(trial.root / "recipes", trial.world).values())
    trial.run_on(found[::2], ["vocoder", "train", None], refused=True)


def test_evaluations(trial: Trial) -> None:
    found = inputs.hostile_evaluations(trial.root / "evaluations", trial.world)
    trial.run_on(found.values(), ["report", None, "--out", trial.out / "report.html"])
    for name in ("passwd", "outside", "link", "fifo", "deep"):
        trial.run("report", found[name], "--out", trial.out / f"{name}.html", refused=True)
