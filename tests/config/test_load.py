"""Recipes: reading, overrides, and every mistake in one report."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from echox.config.load import find_recipe, fingerprint, load_recipe, recipe_names, resolved
from echox.config.schema import Recipe, batch_sentence, worker_counts
from echox.errors import RecipeError

ALL = [f"{scale}/{stage}" for scale in ("3b", "8b", "demo", "small") for stage in ("echo", "s2t", "t2c")]


def lines(error: RecipeError) -> list[str]:
    return [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]


def mistakes(path: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    found = lines(caught.value)
    count = re.match(r"\d+", caught.value.what)
    assert count is not None and int(count.group()) == len(found)
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_of_the_project_is_right(name: str) -> None:
    recipe = load_recipe(name)
    scale, stage = name.split("/")
    assert (recipe.scale, recipe.stage, recipe.name) == (scale, stage, f"{scale}-{stage}")
    assert Recipe.model_validate(resolved(recipe)) == recipe


def test_no_recipe_is_left_out() -> None:
    assert recipe_names() == ALL


@pytest.mark.parametrize("scale", ["demo", "small", "3b", "8b"])
def test_the_echo_stage_fits_the_stages_it_starts_from(scale: str) -> None:
    s2t, t2c, echo = (load_recipe(f"{scale}/{stage}") for stage in ("s2t", "t2c", "echo"))
    assert echo.init.s2t == f"{s2t.storage}/{s2t.name}"
    assert echo.init.t2c == f"{t2c.storage}/{t2c.name}"
    assert echo.model.llm == s2t.model.llm == t2c.model.llm
    assert echo.model.t2c == t2c.model.t2c
    assert echo.model.speech_encoder == s2t.model.speech_encoder
    assert echo.model.ctc.vocabulary == s2t.model.ctc.vocabulary
    assert s2t.tracking.parent_run == t2c.tracking.parent_run == echo.tracking.parent_run


def test_large_recipes_have_the_published_shapes() -> None:
    for scale, llm, shape in (
        ("3b", "meta-llama/Llama-3.2-3B-Instruct", (6, 512, 8, 2048, 2048)),
        ("8b", "meta-llama/Llama-3.1-8B-Instruct", (8, 768, 12, 2048, 2048)),
    ):
        model = load_recipe(f"{scale}/echo").model
        assert model.t2c is not None and model.speech_encoder is not None
        t2c = model.t2c
        assert (t2c.layers, t2c.width, t2c.heads, t2c.ffn, t2c.max_positions) == shape
        assert (model.llm.path, model.speech_encoder.path) == (llm, "openai/whisper-large-v3")
        assert (model.llm.lora.r, model.llm.lora.alpha, len(model.llm.lora.targets)) == (64, 16, 7)


def test_three_mistakes_are_three_sentences() -> None:
    found = mistakes("demo/s2t", "optim.step=100", "engine.precision=bf61", "data.global_batch=24")
    assert found == [
        'optim.step: unknown key; did you mean "steps"?',
        'engine.precision="bf61": must be one of auto, bf16, fp32; did you mean "bf16"?',
        "data.global_batch=24 is not a multiple of data.micro_batch * scaling.workers = 8 * 2 = 16; "
        "set data.global_batch to a multiple of 16, data.micro_batch=6, or data.batch_for to the ranks that the batch "
        "is meant for",
    ]


def test_a_rule_about_a_wrong_key_is_not_reported_on_top() -> None:
    found = mistakes("demo/s2t", "optim.steps=many", "optim.warmup_steps=1000", "data.global_batch=17")
    assert [line.split(":")[0].split(" is ")[0] for line in found] == ['optim.steps="many"', "data.global_batch=17"]


def test_a_misspelt_required_key_is_one_mistake(tmp_path: Path) -> None:
    tree = yaml.safe_load(find_recipe("demo/t2c").read_text())
    tree["optim"]["stepps"] = tree["optim"].pop("steps")
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert mistakes(file) == ['optim.stepps: unknown key; did you mean "steps"?']


def test_a_key_in_the_wrong_section_is_told_where_it_belongs() -> None:
    assert mistakes("demo/s2t", "warmup_steps=3") == ['warmup_steps: unknown key; did you mean "optim.warmup_steps"?']


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.steps=true", "optim.steps=true: must be a valid integer"),
        ("optim.steps=1.5", "optim.steps=1.5: must be a valid integer"),
        ("optim.steps='100'", 'optim.steps="100": must be a valid integer'),
        ("optim.clip=.inf", "optim.clip=Infinity: must be a finite number"),
        ("optim.steps=0", "optim.steps=0: must be greater than 0"),
        ("data.train=[]", "data.train=[]: must be a list of at least 1"),
        ("optim=3", "optim=3: must be a section with keys"),
        ("name=a b", 'name="a b": may hold letters'),
        ("optim.betas=[0.9]", "optim.betas.1: required, but missing"),
        ("data.train.0.task=spa", 'data.train.0.task="spa": must be one of sqa, asr, tts; did you mean "sqa"?'),
        ("data.train.7.task=sqa", 'data.train: override item "7" does not exist; the list has items 0 to 1'),
        ("optim.steps", 'override "optim.steps" is not key=value'),
        ("optim.lr.lora=[", 'optim.lr.lora: override value "[" is not valid YAML'),
        ("scaling.gpus_per_worker=0.5", "scaling.gpus_per_worker=0.5, but a worker is one rank"),
        ("data.train.1={path: demo/sqa-train, task: sqa}", "data.train.1 repeats data.train.0"),
        ("data.train.0.weight=2", "data.train mixes weight with repeat"),
        ("data.budget={by: tokens, size: 9, micro_batches: 3}", "data.budget.micro_batches=3 is not a multiple of"),
        ("model.speech_encoder=null", "stage=s2t hears speech"),
        ("model.ctc.align_steps=750", "model.ctc.align_steps=750 leaves no step for the text loss"),
        ("data.train.0.task=tts", "data.train.0.task=tts does not fit stage=s2t; use asr or sqa"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1=1 is outside [0, 1)"),
        ("engine.deepspeed=ds_configs/none.json", "engine.deepspeed: DeepSpeed JSON ds_configs/none.json does not"),
    ],
)
def test_each_wrong_value_gives_exactly_one_sentence(override: str, expected: str) -> None:
    found = mistakes("demo/s2t", override)
    assert len(found) == 1
    assert found[0].startswith(expected)
    assert "; " in found[0], "the sentence ends with a fix"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("init.s2t=null", "stage=echo starts from a trained s2t stage"),
        ("model.t2c=null", "stage=echo speaks units"),
        ("model.t2c.text_stride=2", "model.t2c.units_per_character and model.t2c.text_stride both place the text"),
        ("model.t2c.width=100", "model.t2c.width=100 does not split into 4 heads"),
        ("model.t2c.body=own", "model.t2c.body"),
        ("model.echo.denoising.align_steps=900", "model.echo.denoising.align_steps=900 leaves no step for the echo"),
        ("model.echo.segmentation.min_tokens=60", "model.echo.segmentation.min_tokens=60 is above max_wait=50"),
        ("model.echo.pseudo_text=argmax", 'model.echo.pseudo_text="argmax": must be one of'),
        ("model.echo.ctc_weight=-1", "model.echo.ctc_weight=-1: must be"),
    ],
)
def test_rules_of_the_echo_stage(override: str, expected: str) -> None:
    found = mistakes("demo/echo", override)
    assert len(found) == 1 and found[0].startswith(expected)


def test_a_window_in_units_needs_text_that_is_placed_by_units() -> None:
    (found,) = mistakes("3b/echo", "model.t2c.window_units=16")
    assert found.startswith("model.t2c.window_units=16 is a distance in units") and "; set model.t2c." in found
    assert load_recipe("demo/echo", ["model.t2c.window_units=16"]).model.t2c.window_units == 16


def test_answers_are_made_again_only_where_they_are_read() -> None:
    (found,) = mistakes("demo/echo", "model.echo.refresh_every=1", "model.echo.pseudo_text=reference")
    assert found.startswith("model.echo.refresh_every=1 answers again, but model.echo.pseudo_text=reference reads no")
    assert load_recipe("3b/echo", ["model.echo.refresh_every=1"]).model.echo.pseudo_text == "generated"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["labels=annotated", "pseudo_text=reference", "segmentation.mode=none"], ""),
        (
            ["labels=annotated", "pseudo_text=free_run", "segmentation.mode=none"],
            "pseudo_text=free_run is another text",
        ),
        (["labels=annotated", "pseudo_text=reference"], "segmentation.mode=trigger cuts them"),
        (["labels=cached", "pseudo_text=reference"], ""),
        (["labels=cached", "pseudo_text=generated"], ""),
        (["labels=drafted", "pseudo_text=free_run"], ""),
        (["labels=cached", "pseudo_text=free_run"], "pseudo_text=free_run changes with the weights"),
        (["labels=cached", "pseudo_text=argmax_teacher_forced"], "argmax_teacher_forced changes with the weights"),
    ],
)
def test_labels_go_with_the_text_that_they_are_of(overrides: list[str], expected: str) -> None:
    written = [f"model.echo.{override}" for override in overrides]
    if expected:
        (line,) = mistakes("demo/echo", *written)
        assert expected in line
    else:
        load_recipe("demo/echo", written)
    if "labels=cached" in overrides and not expected:
        (line,) = mistakes("demo/echo", *written, "engine.frozen_placement=shard")
        assert "engine.frozen_placement=shard makes all ranks gather it together" in line
        (line,) = mistakes("demo/echo", *written, "engine.frozen_placement=auto")
        assert "engine.frozen_placement=auto may make all ranks gather it together" in line


def test_turns_are_not_heard_where_the_encoder_does_not_run() -> None:
    precomputed = ["model.speech_encoder.precomputed=true", "data.history=speech"]
    (line,) = mistakes("demo/s2t", *precomputed)
    assert line.startswith("data.history=speech hears earlier turns") and "set data.history to text" in line
    load_recipe("demo/s2t", [*precomputed, "data.history_tokens=0"])
    load_recipe("demo/s2t", ["data.history=speech", "model.speech_encoder.precomputed=false"])


def test_random_weights_need_no_earlier_stage() -> None:
    recipe = load_recipe("3b/echo", ["model.random_init=true", "init.s2t=null", "init.t2c=null"])
    assert recipe.model.random_init


def test_ten_mistakes_planted_everywhere_are_all_found() -> None:
    planted = {
        "nme=x": "nme",
        "model.llm.lora.rank=4": "model.llm.lora.rank",
        "model.shrink.keys=few": "model.shrink.keys",
        "data.train.0.pth=x": "data.train.0.pth",
        "data.train.1.task=asrr": "data.train.1.task",
        "optim.lr.t2c=-1": "optim.lr.t2c",
        "optim.betas=[a, b]": "optim.betas.0",
        "engine.keep=0": "engine.keep",
        "scaling.workers=two": "scaling.workers",
        "tracking.uri=3": "tracking.uri",
    }
    found = mistakes("demo/s2t", *planted)
    for key in planted.values():
        assert sum(line.startswith((f"{key}:", f"{key}=")) for line in found) == 1, key
    assert len(found) == len(planted) + 1  # both betas are wrong


def test_overrides_reach_lists_absent_sections_and_numbers() -> None:
    recipe = load_recipe(
        "demo/t2c",
        [
            "optim.lr.t2c=1e-4",
            "data.train.0.repeat=3",
            "model.speech_encoder.path=w",
            "name=no",
            "tracking.uri=sqlite:///a=b",
        ],
    )
    assert recipe.optim.lr.t2c == 1e-4
    assert recipe.data.train[0].repeat == 3
    assert recipe.model.speech_encoder is not None and recipe.model.speech_encoder.path == "w"
    assert recipe.name == "no"
    assert recipe.tracking.uri == "sqlite:///a=b"


def test_numbers_are_numbers_and_words_are_words(tmp_path: Path) -> None:
    text = find_recipe("demo/s2t").read_text().replace("name: demo-s2t", "name: off")
    file = tmp_path / "r.yaml"
    file.write_text(text.replace("weight_decay: 0.01", "weight_decay: 1e-2"))
    recipe = load_recipe(file)
    assert recipe.name == "off"
    assert recipe.optim.weight_decay == 0.01
    assert recipe.optim.lr.lora == 1e-3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", 'key "name" is given twice'),
        ("name: [a\n", "not valid YAML"),
        ("- a\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(file)


def test_an_empty_mapping_lists_what_is_required(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("{}")
    required = [name for name, field in Recipe.model_fields.items() if field.is_required()]
    assert [line.split(":")[0] for line in mistakes(file)] == required


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError, match='did you mean "demo/s2t"'):
        load_recipe("demo/s2")


def test_short_names_work_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_recipe("demo/echo")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo/echo") == expected


def test_fingerprint_follows_what_is_computed_and_nothing_else() -> None:
    base = fingerprint(load_recipe("demo/s2t"))
    same = ["name=x", "storage=/s", "tracking.uri=sqlite:///x", "engine.keep=9", "data.reader_threads=7", "scale=big"]
    same += ["health.spike_sigma=6", "scaling.workers=1", "data.micro_batch=4", "data.valid=[]", "engine.keep_best=x"]
    same += ["engine.frozen_placement=shard", "engine.deepspeed=ds_configs/zero3_3b.json", "data.quarantine.share=1"]
    for override in same:
        assert fingerprint(load_recipe("demo/s2t", [override])) == base, override
    others = ["seed=1", "optim.lr.lora=1e-5", "data.train.0.repeat=2", "engine.precision=bf16", "init.s2t=runs/x"]
    others += ["data.budget={by: tokens, size: 9, micro_batches: 4}", "model.llm.path=x", "model.ctc.weight=0.4"]
    for override in others:
        assert fingerprint(load_recipe("demo/s2t", [override])) != base, override


def test_a_text_table_of_its_own_comes_from_a_folder_that_stage_ii_has_not() -> None:
    (found,) = mistakes("demo/t2c", "model.t2c.text_table=own")
    assert found.startswith("stage=t2c starts from nothing that has a text table of its own")
    assert load_recipe("demo/t2c", ["model.t2c.text_table=head"]).model.t2c is not None


def test_a_prompt_is_written_or_left_to_the_chat_template(tmp_path: Path) -> None:
    tree = yaml.safe_load(find_recipe("demo/s2t").read_text())
    del tree["model"]["llm"]["prompt"]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tree))
    left_out = load_recipe(file)
    assert left_out == load_recipe("demo/s2t", ["model.llm.prompt=auto"])
    assert set(left_out.model.llm.prompt.model_dump().values()) == {None}
    assert Recipe.model_validate(resolved(left_out)) == left_out
    part = load_recipe("demo/s2t", ["model.llm.prompt=auto", "model.llm.prompt.end=<|end|>"]).model.llm.prompt
    assert part.model_dump() == {
        "before": None, "after": None, "end": "<|end|>", "begin": None, "unseen": None}  # fmt: skip
    assert mistakes("demo/s2t", "model.llm.prompt=atuo") == [
        'model.llm.prompt="atuo": must be auto, or a section with before, after and end; write a section with its keys'
    ]


def test_lora_targets_are_names_or_auto() -> None:
    def targets(*overrides: str) -> tuple[str, ...]:
        return load_recipe("demo/s2t", overrides).model.llm.lora.targets

    assert len(targets()) == 7
    assert targets("model.llm.lora.targets=auto") == ("auto",)
    assert targets("model.llm.lora.targets=[qkv_proj, o_proj]") == ("qkv_proj", "o_proj")
    for wrong, rule in (("[]", "must be a list of at least 1"), ("all", "must be a valid"), ("[3]", "must be a valid")):
        (line,) = mistakes("demo/s2t", f"model.llm.lora.targets={wrong}")
        assert rule in line and "; write " in line


def test_the_schema_alone_enforces_its_rules_too() -> None:
    tree: dict[str, Any] = copy.deepcopy(resolved(load_recipe("demo/s2t")))
    tree["data"]["global_batch"] = 24
    with pytest.raises(ValueError, match="not a multiple"):
        Recipe.model_validate(tree)


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        (["scaling.workers=[1, 2]", "data.global_batch=16", "data.micro_batch=8"], (1, 2)),
        (["scaling.workers=[2, 6]", "data.global_batch=48", "data.micro_batch=4"], (2, 3, 4, 6)),
        (["scaling.workers=[1, 4]", "data.budget={by: tokens, size: 9, micro_batches: 4}"], (1, 2, 4)),
    ],
)
def test_a_range_of_workers_has_the_counts_that_divide_the_batch(overrides: list[str], counts: tuple[int, ...]) -> None:
    assert worker_counts(load_recipe("demo/s2t", overrides)) == counts


def test_a_range_whose_ends_do_not_divide_the_batch_says_which_counts_do() -> None:
    found = mistakes("demo/s2t", "scaling.workers=[2, 5]", "data.global_batch=48", "data.micro_batch=4")
    assert found == ["scaling.workers=[2, 5]: of these counts the batch divides by 2, 3, 4; set it to [2, 4]"]
    for wrong in ("[3, 2]", "0", "[1]", "[0, 2]", "[1, 2, 3]"):
        (line,) = mistakes("demo/s2t", f"scaling.workers={wrong}")
        assert "must be a whole number above 0, or a range such as [2, 4]" in line


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64, 512])
def test_a_batch_for_some_ranks_holds_on_any_number_and_says_what_that_means(ranks: int) -> None:
    recipe = load_recipe("8b/echo", [f"scaling.workers={ranks}"])
    data = recipe.data.on(ranks)
    assert (data.global_batch, data.micro_batch) == (16 * ranks, 8)
    assert data.on(ranks) == data, "asked again, it is the same"
    said = batch_sentence(recipe, ranks)
    assert (said is None) == (ranks == 8)
    if ranks == 64:
        assert said == (
            "a step has 1,024 samples on 64 ranks, 8 times the 128 for 8, and the learning rates stay: "
            "optim.steps=312 is as many samples as 2500 were there"
        )


def test_a_batch_that_is_fixed_says_which_ways_lead_out() -> None:
    (line,) = mistakes("8b/echo", "scaling.workers=64", "data.batch_for=null")
    assert line.endswith(
        "multiple of 512, data.micro_batch=2, or data.batch_for to the ranks that the batch is meant for"
    )
    (line,) = mistakes("8b/echo", "scaling.workers=512", "data.batch_for=null")
    assert line.endswith("multiple of 4096, or data.batch_for to the ranks that the batch is meant for")
    load_recipe("8b/echo", ["scaling.workers=64", "data.batch_for=null", "data.micro_batch=2"])
    (line,) = mistakes("8b/echo", "data.global_batch=100")
    assert "data.global_batch=100 is not a multiple of data.micro_batch * data.batch_for = 8 * 8 = 64" in line
