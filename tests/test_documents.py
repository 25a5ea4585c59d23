"""The documents are true: commands are accepted, named files are there, examples and tables are what the code does."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from torch.distributed.flight_recorder.components.config_manager import JobConfig

from echox import cli, errors
from echox.config.load import load_recipe
from echox.config.schema import DataConfig, HealthConfig
from echox.engine.checkpoint.manifest import MANIFEST, WEIGHTS, step_name
from echox.engine.checkpoint.sharded_state import slices_file
from echox.engine.checkpoint.writer import random_file
from echox.engine.monitor.watchdog import HUNG
from echox.engine.start_check import _REDUCED, LEAST_SHARED
from echox.stream.format.catalogue import CATALOGUE_NAME, DATASET_NAME
from echox.stream.format.writer import write_shards
from echox.stream.quarantine import TREND
from echox.stream.sampling.batching import JITTER, SampleBudget
from echox.stream.sampling.plan import Plan, StepAddress
from echox.stream.storage.retry import Retry
from echox.tracking.client import FINISH_S
from echox.tracking.run import CREATE_S
from echox.vocoder.recipe import load_voice
from launch.client.jobs import STOP_WAIT_S
from launch.client.resubmit import FINAL_CODES
from launch.client.status import report
from launch.deploy.kuberay import _SHARED_MEMORY
from launch.job.driver import RAY_STOP_WAIT_S, grace_s
from launch.job.ending import Ending
from launch.job.environment import NCCL_RECORDS, OF_THE_NODE, worker_environment
from launch.job.webhook import LIMIT_S, TRIES
from launch.recipe import load_job
from shards.builder.convert import SHORTEST_S
from shards.corpora.registry import CORPORA
from tests.shards.layouts import clip, encoded, put, put_lines
from tests.stream.datasets import source
from tests.stream.streaming import Run, Setting

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "*/README.md", "echox/*/README.md", "launch/*/README.md")
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
GUIDES = (*DOCUMENTS, "launch/deploy/fabric.md", "launch/another_language.md")
"""All whose commands, files and links are checked; the further ones are reached from a document of their folder."""
ROOMS = ("shards/README.md", "launch/README.md", "echox/stream/README.md", "echox/engine/README.md")
MOST_LINES = 170


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language; "" are those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text_of(document), flags=re.DOTALL | re.MULTILINE)
    return [content for name, content in fenced if name == language]


def rows(document: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the table that has this first line, without the line itself."""
    lines = text_of(document).splitlines()
    found: list[list[str]] = []
    for line in lines[lines.index(heading) + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def commands(document: str) -> list[str]:
    """Command lines of all shell blocks."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def check_echox(words: Sequence[str]) -> None:
    """The program accepts the words, and a recipe among them is right with its overrides."""
    args = cli.build_parser(words).parse_args(words)
    recipe, voice = getattr(args, "recipe", None), getattr(args, "voice", None)
    if isinstance(recipe, str):
        load_job(recipe, getattr(args, "overrides", ()))
    if isinstance(voice, str):
        load_voice(voice, args.overrides)


def check_job(module: str, recipe: str, overrides: Sequence[str]) -> None:
    """There is such an entry point, and it can run the recipe."""
    assert find_spec(module) is not None
    load_recipe(recipe, overrides)


@pytest.mark.parametrize(("document", "command"), [(name, line) for name in GUIDES for line in commands(name)])
def test_a_command_exists_and_is_accepted(document: str, command: str) -> None:
    """None is run: they need data, a cluster or minutes."""
    match shlex.split(command, comments=True):
        case ["make", target]:
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
        case ["echox", *rest]:
            check_echox(rest)
        case ["torchrun", *options, "-m", "echox", "train" | "respond" as name, recipe]:
            assert len(options) % 2 == 0 and set(options[::2]) <= {"--nproc-per-node", "--max-restarts"}
            assert all(count.isdigit() for count in options[1::2])
            check_echox([name, recipe])
        case ["torchrun", *_, "-m", "echox", "vocoder", "train", _] as words:
            check_echox(words[-3:])
        case ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", module, recipe, *overrides]:
            check_job(module, recipe, overrides)
        case ["ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", environment, "--", *rest]:
            assert json.loads(environment)["env_vars"] and rest[:2] == ["python", "-m"]
            check_job(rest[2], rest[3], rest[4:])
        case ["ray", "metrics", name]:
            source_of_ray = (Path(ray.__file__).parent / "scripts" / "scripts.py").read_text(encoding="utf-8")
            assert f'@metrics_group.command(name="{name}")' in source_of_ray
        case ["torchfrtrace", *rest]:
            assert JobConfig().parse_args(rest).prefix == NCCL_RECORDS
        case ["export", *assignments]:
            assert assignments and all("=" in assignment for assignment in assignments)
        case ["source" | ".", ".venv/bin/activate"]:
            pass
        case ["python", "-m", "pytest", *rest] | ["pytest", *rest]:
            for path in (word for word in rest if "/" in word):
                assert (ROOT / path.partition("::")[0]).exists(), path
        case ["python", "-m", module, *_] | ["ruff" | "mypy" as module, *_]:
            assert find_spec(module) is not None
        case ["uvx", "pre-commit", *_]:
            assert (ROOT / ".pre-commit-config.yaml").is_file()
        case _:
            pytest.fail(f"no test knows how to check: {command}")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: child for group in groups for name, child in group.choices.items()}


@pytest.mark.parametrize("document", GUIDES)
def test_a_command_named_in_a_sentence_exists(document: str) -> None:
    for words in re.findall(r"`echox ((?:[a-z0-9-]+ ?)+)", text_of(document)):
        parser = cli.build_parser(words.split())
        for word in words.split():
            known = subcommands(parser)
            if not known:
                break
            assert word in known, f"echox {words}"
            parser = known[word]


def test_the_blocks_are_found() -> None:
    assert {"README.md", *ROOMS, "ds_configs/README.md", "echox/bench/README.md"} <= set(DOCUMENTS)
    assert all(commands(document) for document in ("README.md", *ROOMS))
    assert sum(len(commands(document)) for document in DOCUMENTS) >= 50


@pytest.mark.parametrize("document", GUIDES)
def test_files_and_folders_that_are_named_are_there(document: str) -> None:
    for name in re.findall(r"`((?:echox|launch|shards|tests|ds_configs)/[\w./-]*)`", text_of(document)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", GUIDES)
def test_links_lead_to_files(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if "://" not in target and not target.startswith("#"):
            assert ((ROOT / document).parent / target.partition("#")[0]).exists(), target


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    assert len(text_of("README.md").splitlines()) <= MOST_LINES
    for document in DOCUMENTS:
        assert document == "README.md" or f"]({document})" in text_of("README.md"), document


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "README.md"])
def test_a_document_begins_with_the_question_it_answers(document: str) -> None:
    question = text_of(document).splitlines()[0].removeprefix("# ")
    assert question.endswith("?") and f"| {question} |" in text_of("README.md")


def test_the_example_of_mistakes_is_what_the_program_prints() -> None:
    (block,) = blocks("README.md", "console")
    command, _, printed = block.partition("\n")
    words = [sys.executable, "-m", *shlex.split(command.removeprefix("$ "))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == printed


def test_the_exit_codes_are_those_of_the_errors() -> None:
    table = [int(code) for code, _ in rows("README.md", "| exit code | means |")]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EchoXError)]
    assert set(table) == {kind.exit_code for kind in kinds} | {cli.INTERRUPTED, HUNG} and table == sorted(table)


def test_the_table_of_recipes_says_what_they_hold() -> None:
    table = rows("README.md", "| | LLM | speech encoder | T2C | workers |")
    assert [name for name, *_ in table] == [f"`{scale}/{{s2t,t2c,echo}}`" for scale in ("demo", "small", "3b", "8b")]
    for name, llm, encoder, t2c, workers in table:
        scale = name.strip("`").partition("/")[0]
        for stage in ("s2t", "t2c", "echo"):
            recipe = load_recipe(f"{scale}/{stage}")
            model, heard = recipe.model, recipe.model.speech_encoder
            assert Path(model.llm.path).name == llm
            assert heard is None or Path(heard.path).name == encoder.lower()
            assert model.t2c is None or f"{model.t2c.layers} × {model.t2c.width}" == t2c
            assert f"{recipe.scaling.workers} {'GPU' if recipe.scaling.gpus_per_worker else 'CPU'}" == workers


def test_the_table_of_corpora_is_the_registry() -> None:
    table = {
        name.strip("`"): task for name, _, task, _ in rows("shards/README.md", "| `CORPUS` | stage | task | where |")
    }
    assert table.keys() == CORPORA.keys() - {"manifest"}
    for name, cell in table.items():
        tasks = [word for word in cell.split(", ") if " " not in word]
        assert tasks[0] == CORPORA[name].tasks[0] and set(tasks) <= set(CORPORA[name].tasks)


def test_the_datasets_of_the_examples_have_the_names_that_the_recipes_use() -> None:
    names = set(re.findall(r"--out /shared/echox/data/(\S+)", text_of("shards/README.md")))
    sections = [load_recipe(f"3b/{stage}").data for stage in ("s2t", "t2c")]
    assert names and names <= {source.path for data in sections for source in (*data.train, *data.valid)}


def test_the_unit_language_of_the_example_is_the_one_that_the_recipes_use() -> None:
    languages = {
        load_recipe(f"{scale}/{stage}").model.t2c.unit_language for scale in ("3b", "8b") for stage in ("t2c", "echo")
    }
    (command,) = (line for line in commands("shards/README.md") if "unit-language fit /shared" in line)
    words = shlex.split(command)[1:]
    fitted = cli.build_parser(words).parse_args(words)
    assert {str(fitted.language)} == {f"/shared/echox/data/{name}" for name in languages}
    data = load_recipe("3b/t2c").data
    assert {f"/shared/echox/data/{source.path}" for source in data.train} == {str(path) for path in fitted.units}


def test_the_listing_of_a_shard_is_what_a_build_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (listing,) = (block for block in blocks("shards/README.md", "") if block.startswith("-rw-r--r--"))
    described = json.loads(blocks("shards/README.md", "json")[1])
    second = {"question_text": "what is the capital of france", "answer_text": "Paris is the capital of France."}
    lines: list[dict[str, Any]] = []
    for number, said in enumerate((described, {**second, "question_s": 1.7, "answer_s": 2.1}), 2):
        audio, answer = f"calls/{number:03d}.wav", f"voice/{number:03d}.wav"
        put(tmp_path / audio, encoded(clip(number, said["question_s"])))
        put(tmp_path / answer, encoded(clip(number + 2, said["answer_s"])))
        texts = {"text": said["question_text"], "answer_text": said["answer_text"]}
        lines.append({"audio": audio, "answer_audio": answer, **texts})
    put_lines(tmp_path / "questions.jsonl", lines)
    monkeypatch.chdir(tmp_path)
    build = shlex.split("shards build manifest --source questions.jsonl --out data/questions --workers 1")
    assert cli.main(build) == 0
    assert cli.main(shlex.split("units fit data/questions units/ --features log_mel --clusters 4")) == 0
    assert cli.main([*build, "--units", "units/"]) == 0
    out = tmp_path / "data" / "questions"
    with tarfile.open(out / "shard-000000.tar") as tar:
        found = [(f"{file.uname}/{file.gname}", file.mode, file.mtime, file.name) for file in tar]
        member = tar.extractfile("calls_002.json")
        assert member is not None and json.loads(member.read()) == described
    shown = [(owner, 0o644, 0, name) for _, owner, _, _, _, name in map(str.split, listing.splitlines())]
    assert shown == found
    assert {DATASET_NAME, CATALOGUE_NAME, "shard-000000.tar.idx", "rejected.jsonl"} <= {
        file.name for file in out.iterdir()
    }


def test_the_parts_that_the_drawing_of_the_stream_names_are_there() -> None:
    drawing = blocks("echox/stream/README.md", "")[0]
    files = [ROOT / "echox" / "stream" / name for name in re.findall(r"[\w/]+\.py", drawing)]
    written = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for name in ("Catalogue", "Plan", "ShardStore", "StreamReader", "Collate", "SpeechBatch", "UnitBatch"):
        assert name in drawing and re.search(rf"^class {name}\b", written, flags=re.MULTILINE), name


def test_the_eight_samples_come_as_the_table_says(tmp_path: Path) -> None:
    text = text_of("echox/stream/README.md")
    lengths = {
        name: float(seconds)
        for _, cell in rows("echox/stream/README.md", "| shard | samples and their lengths |")
        for name, seconds in re.findall(r"`(\w)` ([\d.]+) s", cell)
    }
    given = re.search(r"`seed: (\d+)`, `window_shards: (\d+)`, `global_batch: (\d+)`, `micro_batch: (\d+)`", text)
    assert given is not None and len(lengths) == 8
    seed, window_shards, global_batch, micro_batch = map(int, given.groups())
    samples = [
        {"__key__": name, "question.flac": name.encode(), "json": {"id": name, "question_s": seconds}}
        for name, seconds in lengths.items()
    ]
    write_shards(tmp_path / "eight", samples, 2)
    micro_batches = global_batch // micro_batch

    def trained(workers: int, steps: int, *, padded: bool = False) -> tuple[Plan, list[list[list[str]]]]:
        budget = SampleBudget(global_batch, micro_batches, padded)
        plan = Plan([source(tmp_path / "eight")], seed=seed, budget=budget, window_shards=window_shards)
        setting = Setting(world_size=workers, micro_batches=micro_batches)
        with Run([], tmp_path / f"run-{workers}-{padded}", setting, plan=plan) as run:
            return plan, [run.train() for _ in range(steps)]

    table = rows("echox/stream/README.md", "| step | epoch | window | its shards | rank 0 | rank 1 |")
    plan, steps = trained(2, len(table))
    place = StepAddress()
    for number, (row, (first, second)) in enumerate(zip(table, steps, strict=True), 1):
        window = plan.window(place.epoch, place.window)
        shards = sorted(set(plan.sources[0].catalogue.records["shard"][window.number_N].tolist()))
        ranks = [" ".join(f"`{name}`" for name in names) for names in (first, second)]
        assert row == [str(number), str(place.epoch), str(place.window), ", ".join(map(str, shards)), *ranks]
        place = plan.following(place, len(window.steps))
    assert trained(1, len(table))[1] == steps
    heard = [sum(lengths[name] for name in names) for names in steps[0]]
    assert "rank 0 has {:.1f} s of audio and rank 1 has {:.1f} s".format(*heard) in text
    ((first, second),) = trained(2, 1, padded=True)[1]
    assert "rank 0 has `{}` `{}`, rank 1 `{}` `{}`".format(*first, *second) in text


def test_the_example_of_a_data_section_is_valid() -> None:
    (block,) = blocks("echox/stream/README.md", "yaml")
    data = DataConfig.model_validate(yaml.safe_load(block)["data"])
    assert [source.weight for source in data.train] == [1, 3] and data.budget is not None


def test_the_example_of_a_health_section_is_valid_and_names_the_defaults() -> None:
    (block,) = blocks("echox/engine/README.md", "yaml")
    health, default = HealthConfig.model_validate(yaml.safe_load(block)["health"]), HealthConfig()
    assert health.on_bad_step == "rewind" and f"{default.on_bad_step} (default)" in block
    for words in (
        f"`max_bad_steps` ({default.max_bad_steps})",
        f"`max_rewinds` ({default.max_rewinds})",
        f"`hang_least_s` ({default.hang_least_s:g} s)",
        f"last {default.spike_window} good steps",
    ):
        assert words in text_of("echox/engine/README.md")


def test_the_folder_of_a_run_has_the_names_that_the_engine_writes() -> None:
    tree = blocks("echox/engine/README.md", "")[0]
    for name in (step_name(1200), MANIFEST, WEIGHTS, slices_file(0), random_file(0)):
        assert name in tree


def test_the_example_of_a_status_is_what_the_program_prints() -> None:
    (block,) = blocks("launch/README.md", "console")
    now = time.time()
    job: Any = {"id": "3b-s2t-a1", "status": "RUNNING", "start": now, "end": now + 4 * 3600 + 131.5}
    parts = {"workers": 24, "imports": 12, "run": 1, "models": 21, "data": 1, "engine": 4, "step": 8}
    lost = "worker 3 was lost: ActorDiedError: The actor died unexpectedly"
    failure = {"time": now - 21 * 60, "attempt": 1, "step": 812, "error": lost, "decision": "again, 2 left"}
    status: Any = {
        **{"folder": "/shared/runs/3b-s2t", "stage": "s2t", "state": "training", "attempt": 2, "time": now},
        **{"step": 1290, "steps": 9100, "loss": 1.402, "samples_per_s": 108.9, "eta_s": 9181.0},
        "start_s": {name: float(seconds) for name, seconds in parts.items()},
        "checkpoint": {"path": "/shared/runs/3b-s2t/checkpoints/step-00001000", "age_s": 360.0},
        "failure": failure,
    }
    assert block == f"$ echox status 3b-s2t\n{report('3b-s2t', job, status)}\n"


def test_the_example_of_a_message_is_what_a_webhook_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("launch/README.md", "json")
    shown = json.loads(block)
    monkeypatch.setattr("socket.gethostname", lambda: shown["host"])
    ending = Ending(status=shown["status"], why=shown["why"])
    assert shown == ending.message(run=shown["run"], stage=shown["stage"], step=shown["step"])


def test_numbers_in_the_sentences_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split("shards build manifest --source a --out b")
    built = cli.build_parser(words).parse_args(words)
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_WAIT_S))
    recording = worker_environment(load_recipe("3b/s2t"))
    sentences = {
        "shards/README.md": (
            f"shorter than {SHORTEST_S:g} s",
            f"More than {built.max_rejected:.0%}".replace("%", " %"),
        ),
        "echox/stream/README.md": (
            f"up to {JITTER:.0%} more".replace("%", " %"),
            {6: "tried six times"}[Retry().attempts],
            f"of {TREND:,} at least",
        ),
        "launch/README.md": (
            f"gives a run {STOP_WAIT_S} s, of which {grace_s():g} are for the save",
            f"Ray gives {RAY_STOP_WAIT_S:g} s",
            f"wait {max(CREATE_S, FINISH_S):g} s at most",
            {3: "three times"}[TRIES] + f" in {LIMIT_S:g} s at most",
        ),
        "launch/deploy/fabric.md": (
            f"all-reduce of {_REDUCED >> 20} MiB",
            f"start below {LEAST_SHARED >> 20} MiB",
            f"mount {_SHARED_MEMORY.removesuffix('Gi')} GiB",
            f"the last {recording['TORCH_FR_BUFFER_SIZE']} collectives",
            f"`log/{Path(recording['TORCH_FR_DUMP_TEMP_FILE']).name}N`",
            f"begin with {', '.join(f'`{prefix}`' for prefix in OF_THE_NODE[:-1])} or `{OF_THE_NODE[-1]}`",
        ),
    }
    for document, spoken in sentences.items():
        text = " ".join(text_of(document).split())
        assert [words for words in spoken if words not in text] == []
    assert {*range(2, 7), 8} == set(FINAL_CODES) and "(2 to 6, 8)" in text_of("launch/README.md")
