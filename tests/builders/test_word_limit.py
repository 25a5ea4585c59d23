"""The teacher's limit from the T2C run's data to the decode of Stage III: measured, recorded, taken, kept, obeyed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echox.bench.plan.load import Sample, rows_of
from echox.bench.plan.memory import activation_bytes
from echox.bench.plan.shapes import stage_shape
from echox.builders import setup, word_limit
from echox.builders.labels import keep_labels, teacher_identity
from echox.builders.setup import TextTools, build_stage
from echox.builders.unit_sets import LANGUAGE, run_files
from echox.builders.word_limit import likely, settle, with_own_limit
from echox.config.load import load_recipe
from echox.config.schema import Recipe
from echox.engine import run_files as engine_files
from echox.engine.checkpoint.manifest import WEIGHTS, checkpoints_folder, step_name, write_manifest
from echox.errors import CheckpointError, RecipeError
from echox.files import sha256_file
from echox.models import greedy
from echox.models.step_graph import StepGraph
from echox.speak import pipeline
from echox.stages.labels import Label
from echox.stream.format.writer import write_shards
from echox.units.word_limit import SPARE_WORDS, UNKNOWN
from tests import tiny
from tests.builders import tiny_run

TEXTS = {"one": 40, "two": 25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a unit language and two datasets whose texts take one to five units a token."""
    folder = tmp_path_factory.mktemp("models")
    tiny_run.write_models(folder)
    for seed, (name, samples) in enumerate(TEXTS.items()):
        random = np.random.default_rng(seed)

        def sample(number: int, name: str = name, random: np.random.Generator = random) -> dict[str, object]:
            tokens = random.integers(3, 45, random.integers(4, 30)).tolist()
            units = random.integers(0, tiny_run.N_UNITS, int(len(tokens) * random.uniform(1, 5))).astype("<u2")
            text = " ".join(f"w{token}" for token in tokens)
            about = {"id": f"{name}{number}", "answer_text": text, "task": "tts", "answer_s": len(units) / 50}
            return {"__key__": f"{name}{number:03d}", "answer.units": units.tobytes(), "json": about}

        write_shards(folder / name, map(sample, range(samples)), 10)
    return folder


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything relative is in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def t2c_recipe(folder: Path, **data: Any) -> Recipe:
    recipe = tiny_run.make_recipe(folder, "t2c").model_dump()
    recipe["data"]["train"] = [{"path": str(folder / name), "task": "tts"} for name in TEXTS]
    recipe["data"] |= data
    recipe["engine"]["deepspeed"] = str(Path(setup.__file__).parents[2] / "ds_configs/cpu.json")
    return Recipe.model_validate(recipe)


def echo_recipe(folder: Path, t2c: Path | None, units_per_token: Any = "auto", **echo: Any) -> Recipe:
    init = {} if t2c is None else {"t2c": str(t2c)}
    random_init = t2c is None or not (t2c / "s2t").exists()
    return tiny_run.make_recipe(
        folder, "echo", init=init, random_init=random_init, echo={"units_per_token": units_per_token, **echo}
    )


def built(recipe: Recipe, rank: int = 0, world_size: int = 1) -> Any:
    made = setup.build_setup(recipe, rank, world_size)
    made.train_loader.close()
    return made


def texts_of(folder: Path) -> list[tuple[int, int]]:
    """Tokens and words of every text, from the archives themselves, one encoded after the other."""
    found = []
    recipe = t2c_recipe(folder)
    text = TextTools.load(recipe)
    assert text.language is not None
    for name in TEXTS:
        for shard in sorted((folder / name).glob("*.tar")):
            with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            for key in {name.split(".")[0] for name in members}:
                units = np.frombuffer(members[f"{key}.answer.units"], dtype="<u2")
                tokens = json.loads(members[f"{key}.json"])["answer_text"].split()
                found.append((len(tokens), len(text.language.encode(units))))
    assert len(found) == sum(TEXTS.values())
    return found


def checkpoint(run: Path, recipe: Recipe, number: Any, step: int = 1) -> Path:
    """A checkpoint that says what its run has learned; None for one of before."""
    place = checkpoints_folder(run) / step_name(step)
    place.mkdir(parents=True)
    (place / WEIGHTS).write_bytes(b"weights")
    contents: Any = {"stage": recipe.stage, "recipe": recipe.model_dump(mode="json"), "step": 1, "updates": 1}
    language = TextTools.load(recipe).language
    contents["run_files"] = engine_files.describe(run_files(recipe, language, words_per_token=number))
    write_manifest(place, contents, {WEIGHTS: {"bytes": 7, "sha256": sha256_file(place / WEIGHTS)}})
    return place


# Stage II -------------------------------------------------------------------------------------------------------------


def test_a_t2c_run_learns_what_all_its_texts_need(folder: Path) -> None:
    texts = texts_of(folder)
    made = built(t2c_recipe(folder))
    learned = made.files[LANGUAGE].about["words_per_token"]
    hundredths = next(
        number
        for number in range(1, 10_000)
        if all(said <= number / 125 * size + SPARE_WORDS + 1e-9 for size, said in texts)
        and number / 125 >= sum(said for _, said in texts) / sum(size for size, _ in texts)
    )
    assert learned == hundredths / 100
    assert f"{learned:g} words a text token" in made.notes["word_limit"]
    stage = tiny.echo_stage(units_per_token=learned)
    most = stage.most_words(torch.tensor([size for size, _ in texts])).tolist()
    assert all(said <= limit for (_, said), limit in zip(texts, most, strict=True)), "no useful text is cut"
    assert sum(most) < 0.75 * sum(UNKNOWN * size + SPARE_WORDS for size, _ in texts)


@pytest.mark.parametrize("blend", [False, True])
def test_the_sample_is_bounded_and_the_same_on_every_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch, blend: bool
) -> None:
    monkeypatch.setattr(word_limit, "TEXTS", 15)  # a window has ten
    reads: list[int] = []
    own = word_limit.ShardStore.read

    def read(self: Any, number: int, *more: Any) -> Any:
        reads.append(number)
        return own(self, number, *more)

    monkeypatch.setattr(word_limit.ShardStore, "read", read)
    train = [{"path": str(folder / name), "task": "tts", **({"weight": 0.5} if blend else {})} for name in TEXTS]
    recipe = t2c_recipe(folder, train=train, window_shards=1, global_batch=2, micro_batch=1)
    learned = []
    for rank in range(2):
        reads.clear()
        made = built(recipe, rank, 2)
        learned.append(dict(made.files[LANGUAGE].about))
        assert len(reads) == 15
    assert learned[0] == learned[1] and learned[0]["words_per_token"] > 0


def reader(recipe: Recipe) -> Any:
    return setup.open_sources(recipe, recipe.data.train), setup.build_collate(recipe, TextTools.load(recipe))


def test_a_damaged_sample_is_passed_over_and_none_at_all_is_no_number(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = t2c_recipe(folder)
    whole = settle(recipe, *reader(recipe)).words_per_token
    own = setup.UnitCollate.decode

    def decode(self: Any, item: Any) -> Any:
        raise word_limit.CorruptSampleError(f"sample {item.sample.key} is damaged", kind="decode")

    monkeypatch.setattr(setup.UnitCollate, "decode", decode)
    assert settle(recipe, *reader(recipe)) == (recipe, None, "")
    assert "words_per_token" not in built(recipe).files[LANGUAGE].about
    monkeypatch.setattr(
        setup.UnitCollate, "decode", lambda self, item: own(self, item) if item.sample.number else decode(self, item)
    )
    assert settle(recipe, *reader(recipe)).words_per_token == pytest.approx(whole, rel=0.3)


def test_a_t2c_run_that_goes_on_keeps_its_number(folder: Path, storage: Path) -> None:
    recipe = t2c_recipe(folder)
    checkpoint(storage / recipe.name, recipe, 1.25)
    assert built(recipe).files[LANGUAGE].about["words_per_token"] == 1.25
    # One of before has none: it is measured where it goes on.
    checkpoint(storage / recipe.name, recipe, None, step=2)
    assert built(recipe).files[LANGUAGE].about["words_per_token"] > 2


# Stage III ------------------------------------------------------------------------------------------------------------


def test_stage_three_takes_what_its_t2c_run_has_learned(folder: Path, tmp_path: Path) -> None:
    t2c = tmp_path / "elsewhere"
    place = checkpoint(t2c, t2c_recipe(folder), 3.25)
    for given in (t2c, place):
        found = settle(echo_recipe(folder, given), [], None)  # type: ignore[arg-type]
        assert found.words_per_token == found.recipe.model.echo.units_per_token == 3.25
        assert found.note == (
            f"the teacher says at most 3.25 words a text token and 32 more, as {given} has learned from its data"
        )
        assert likely(echo_recipe(folder, given)) == 3.25
    stage = tiny.echo_stage(units_per_token=3.25)
    assert stage.most_words(torch.tensor([0, 1, 2, 4, 100])).tolist() == [32, 36, 39, 45, 357]


def test_a_number_in_the_recipe_comes_first_and_counts_as_ever(folder: Path, storage: Path, tmp_path: Path) -> None:
    t2c = tmp_path / "elsewhere"
    checkpoint(t2c, t2c_recipe(folder), 3.25)
    recipe = echo_recipe(folder, t2c, 7)
    checkpoint(storage / recipe.name, recipe, 2.5)
    found = settle(recipe, [], None)  # type: ignore[arg-type]
    assert found.recipe == recipe and found.words_per_token == 7 == likely(recipe)
    assert found.note.endswith("7 words a text token and 32 more, as the recipe says")
    tokens_N = torch.arange(0, 300)
    assert torch.equal(tiny.echo_stage(units_per_token=7).most_words(tokens_N), tokens_N * 7 + 32)
    assert torch.equal(tiny.echo_stage(units_per_token="auto").most_words(tokens_N), tokens_N * 12 + 32)


def test_a_t2c_run_of_before_leaves_twelve(folder: Path, tmp_path: Path) -> None:
    old, older = tmp_path / "old", tmp_path / "older"
    checkpoint(old, t2c_recipe(folder), None)
    tiny_run.write_run(older, t2c_recipe(folder), {"a": torch.zeros(1)})
    for t2c in (old, older, None):
        recipe = echo_recipe(folder, t2c)
        found = settle(recipe, [], None)  # type: ignore[arg-type]
        assert found.words_per_token == found.recipe.model.echo.units_per_token == 12 == likely(recipe)
        assert "12 words a text token and 32 more, as holds where no T2C run has learned" in found.note


def test_a_run_of_stage_three_keeps_its_number_whatever_its_t2c_run_says_now(
    folder: Path, storage: Path, tmp_path: Path
) -> None:
    t2c = tmp_path / "elsewhere"
    checkpoint(t2c, t2c_recipe(folder), 3.25)
    recipe = echo_recipe(folder, t2c)
    assert settle(recipe, [], None).words_per_token == 3.25  # type: ignore[arg-type]
    place = checkpoint(storage / recipe.name, recipe, 12)
    found = settle(recipe, [], None)  # type: ignore[arg-type]
    assert found.words_per_token == 12 and "as this run has had from its beginning" in found.note
    # A checkpoint that is damaged is not what the run goes on from.
    checkpoint(storage / recipe.name, recipe, 5, step=2)
    (checkpoints_folder(storage / recipe.name) / step_name(2) / "manifest.json").write_text("{}")
    assert settle(recipe, [], None).words_per_token == 12  # type: ignore[arg-type]
    assert with_own_limit(recipe, place).model.echo.units_per_token == 12


@pytest.mark.parametrize("number", [True, "3", -1.0, 0, 1e9, [3], {"a": 1}])
def test_a_record_that_is_no_number_of_words_is_one_sentence(folder: Path, tmp_path: Path, number: Any) -> None:
    t2c = tmp_path / "elsewhere"
    place = checkpoint(t2c, t2c_recipe(folder), number)
    with pytest.raises(CheckpointError, match="a text token takes .* unit-language words") as caught:
        settle(echo_recipe(folder, t2c), [], None)  # type: ignore[arg-type]
    assert caught.value.where == str(place) and "model.echo.units_per_token" in caught.value.fix


@pytest.mark.parametrize("word", ["0", "-2", "many", "null"])
def test_what_is_no_number_of_words_in_a_recipe_is_refused(word: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.echo\.units_per_token"):
        load_recipe("demo/echo", [f"model.echo.units_per_token={word}"])


def test_the_setup_of_stage_three_records_and_says_what_it_goes_by(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t2c = tmp_path / "elsewhere"
    checkpoint(t2c, t2c_recipe(folder), 3.25)
    recipe = echo_recipe(folder, t2c, pseudo_text="reference")
    used: list[Any] = []
    monkeypatch.setattr(setup, "build_stage", lambda recipe, text, **_: used.append(recipe) or torch.nn.Linear(1, 1))
    for name in ("open_sources", "train_reader", "valid_readers", "check_inits"):
        monkeypatch.setattr(setup, name, lambda *_, **__: [])
    for rank in range(2):
        made = setup.build_setup(recipe, rank, 2)
        assert made.files[LANGUAGE].about["words_per_token"] == 3.25
        assert "at most 3.25 words a text token and 32 more" in made.notes["word_limit"]
        assert used[rank].model.echo.units_per_token == 3.25


def test_a_trained_run_speaks_by_the_number_that_it_has_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded(Exception):
        pass

    used: list[Any] = []

    def stop(recipe: Recipe, text: Any) -> Any:
        used.append(recipe.model.echo.units_per_token)
        raise Loaded

    monkeypatch.setattr(pipeline, "build_stage", stop)
    for number, (given, recorded) in enumerate((("auto", 2.75), ("auto", None), (9, 2.75))):
        run = tmp_path / f"echo-{number}"
        checkpoint(run, echo_recipe(folder, None, given), recorded)
        with pytest.raises(Loaded):
            pipeline.SpeechToSpeech.load(run)
    assert used == [2.75, 12, 9]


def test_the_plan_has_room_for_as_many_words(folder: Path, tmp_path: Path) -> None:
    t2c = tmp_path / "elsewhere"
    checkpoint(t2c, t2c_recipe(folder), 3.0)

    def cache(*overrides: str) -> float:
        recipe = load_recipe("3b/echo", list(overrides))
        return activation_bytes(recipe, stage_shape(recipe), rows_of(recipe, Sample()), 8)["teacher's KV cache"]

    assert cache() == cache("model.echo.units_per_token=12") > 2 * cache(f"init.t2c={t2c}")
    assert cache(f"init.t2c={t2c}") == cache("model.echo.units_per_token=3")


# The decode -----------------------------------------------------------------------------------------------------------


def test_a_teacher_that_never_ends_is_stopped_at_the_learned_number(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    own = StepGraph.__call__
    monkeypatch.setattr(StepGraph, "__call__", lambda self: steps.append(1) or own(self))
    never = torch.zeros(1, dtype=torch.bool)
    monkeypatch.setattr(greedy, "repeats", lambda words_NM, mask_NM: never.expand(len(words_NM)))
    taken = {}
    for number in ("auto", 2.5):
        stage = tiny.echo_stage(
            pseudo_text="reference", units_per_token=number, segmentation={"mode": "fixed", "fixed_tokens": 4}
        ).eval()
        decoder = stage.teacher.decoder
        with torch.no_grad():
            # Its logit is the mean of all, which is never the largest.
            decoder.head.weight[decoder.text_classes + decoder.end] = decoder.head.weight.mean(0)
        batch = tiny.speech_batch(6)
        steps.clear()
        stage(batch)
        rows, units = batch.targets.rows, batch.targets.units
        limit_N = stage.most_words(rows.mask_NT.sum(1))
        assert not units.ended_N.any() and torch.equal(units.mask_NM.sum(1), limit_N)
        assert int(rows.mask_NT.sum(1).max()) == 4
        taken[number] = len(steps)
    assert taken == {"auto": 12 * 4 + 32 + 1, 2.5: 10 + 32 + 1}


def test_labels_made_under_another_limit_are_not_used(folder: Path, storage: Path) -> None:
    names = []
    for number in (2.5, 2.5, 2.51, 3, "auto", 12):
        recipe = echo_recipe(folder, None, number, labels="cached", pseudo_text="reference")
        torch.manual_seed(0)  # of the weights
        stage: Any = build_stage(recipe, TextTools.load(recipe))
        keep_labels(recipe, stage, 0)
        names.append(teacher_identity(stage))
        known = stage.label_store.get((1, 2))
        assert (known is None) is (names.count(names[-1]) == 1)
        stage.label_store.add({(1, 2): Label([len(names)], True)})
    assert names[0] == names[1] and names[4] == names[5] and len(set(names)) == 4
