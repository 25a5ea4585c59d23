"""Report and model card of real run folders: what the card says, and what a real MLflow keeps of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from mlflow.tracking import MlflowClient
from safetensors.numpy import load_file

from echox.cli import main
from echox.engine.checkpoint.manifest import WEIGHTS, read_manifest, write_manifest
from echox.errors import DataError
from echox.evaluate.published import write_pages
from echox.evaluate.store import load_evaluation, save_evaluation
from echox.tracking.run import open_run
from tests.evaluate.test_report import RESULT, SAMPLES
from tests.speak.echo_run import write_echo_run
from tests.tracking.parts import recipe as tracked_recipe

WAV = b"RIFF" + bytes(8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with an echo run of random weights, its metrics and an evaluation."""
    storage = tmp_path_factory.mktemp("storage")
    write_echo_run(storage)
    (storage / "echo").rename(storage / "tiny-echo")
    run = storage / "tiny-echo"
    _describe_weights(run)
    known = {"model": {"llm": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora": {"r": 16}},
                       "speech_encoder": {"path": "/models/`a|b`\n# mine"}, "t2c": {"layers": 4, "width": 256}},
             "data": {"train": [{"path": "demo/sqa-train", "task": "sqa"}, 7]}, "seed": 17}  # fmt: skip
    (run / "recipe.json").write_text(json.dumps(known))
    rows = [{"step": 1, "loss/total": 2.0, "data/demo-sqa-train-sqa/seconds": 3600.0},
            {"step": 2, "loss/total": 1.5, "data/demo-sqa-train-sqa/seconds": 9000.0}]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{**sample, **{name: WAV for name in sample if name.endswith("_wav")}} for sample in SAMPLES]
    save_evaluation(storage / "evaluation", {**RESULT, "corpus": "demo"}, samples)
    return storage


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "data" / "demo" / "sqa-train"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"samples": 1234, "hours": 0.75, "fingerprint": "ab" * 32}))
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_card_holds_model_data_scores_and_licences(
    made: Path, corpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(made), "--out", str(tmp_path / "out" / "page.html")]) == 0
    page, path = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert page.is_file() and path == tmp_path / "out" / "MODEL_CARD.md"
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"], "a folder is no name on the hub"
    found = {(each.dataset_name, each.metric_name): each for each in card.data.eval_results}
    strict = found["sqa-heldout-phrasing", "S2S strict"]
    assert (strict.metric_value, strict.metric_type) == (0.7, "accuracy")
    assert strict.metric_args == {"n": 60, "judge": "some/judge", "interval_95": [0.575, 0.8]}
    assert found["sqa-heldout-phrasing", "DNSMOS ovrl"].metric_value == 2.718
    assert found["asr-heldout-real", "WER"].task_type == "automatic-speech-recognition"
    assert not {"cascade", "copy"} & {name for _, name in found}, "they are not the model's"
    text = card.text
    for shown in (
        "| echo | demo/sqa-train | sqa | 1,234 | 0.75 | 2.50 | abababababab |",
        "70.0 % \\[57–80\\]",
        "Judge: `some/judge`",
        "| first sound, median | 812 ms |",
        "| sqa-heldout-phrasing | Echo | 11 | 2.72 | 3.10 | 3.90 | 3.25 |",
        "| the frozen T2C teacher on their text | 31.4 % |",
        "| HuggingFaceTB/SmolLM2-135M-Instruct | Apache-2.0 |",
        "| microsoft/dnsmos | MIT |",
        "| /models/\\`a\\|b\\` \\# mine | see its source |",
        "echox evaluate 'my runs/echo' --limit 60",
        "Questions are about countries",
    ):
        assert shown in text, shown
    sizes = re.findall(r"\| Stage III[^|]*\| \S+ \| ([\d.]+) M \| fp32 \|", text)
    assert sizes == [f"{_trained(made / 'tiny-echo') / 1e6:.2f}"]


def _describe_weights(run: Path) -> None:
    """Put the shapes of the trained tensors into the manifest, as a training does."""
    checkpoint = next((run / "checkpoints").iterdir())
    known: Any = read_manifest(checkpoint)
    shapes = {name: {"shape": list(tensor.shape)} for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    contents: Any = {key: value for key, value in known.items() if key not in ("version", "files", "sha256")}
    write_manifest(checkpoint, {**contents, "trainable": shapes, "precision": "fp32"}, known["files"])


def _trained(run: Path) -> int:
    """Parameters in the checkpoint's own file of weights."""
    checkpoint = next((run / "checkpoints").iterdir())
    return sum(tensor.size for tensor in load_file(checkpoint / WEIGHTS).values())


@pytest.mark.parametrize(
    ("named", "language", "rate"), [("zh", "zh", "CER"), ("ru", "ru", "WER"), (None, "en", "WER"), ("<b>", "en", "WER")]
)
def test_card_and_report_say_the_language_and_what_the_error_rate_counts(
    tmp_path: Path, named: str | None, language: str, rate: str
) -> None:
    run = tmp_path / "zh-echo"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({} if named is None else {"language": named}))
    told = {"sets": {"asr": {"n": 2, "wer": 0.25}}, "judge": "some/judge", "original_wer": 0.1, "resynthesis_wer": 0.2}
    if language == named:
        told["language"] = language
    pages = write_pages(tmp_path, {"echo": run}, told, [])
    card = ModelCard.load(pages.card)
    assert card.data.to_dict()["language"] == language and f"| language | {language} |" in card.text
    assert [(each.metric_name, each.metric_type) for each in card.data.eval_results] == [(rate, rate.lower())]
    assert f"told that the language is `{language}`" in card.text
    assert f"| spoken by | {rate} |" in card.text and f"- {rate}: " in card.text
    page = pages.report.read_text(encoding="utf-8")
    assert f"<th>{rate}</th>" in page and ("told that the language is" in page) == (language != "en")
    assert ("have a character error rate of" in page) == (rate == "CER")


def test_a_card_without_evaluated_sets_or_run_folders_is_still_one(tmp_path: Path) -> None:
    save_evaluation(tmp_path / "evaluation", {"sets": {}}, [])
    assert main(["report", str(tmp_path)]) == 0
    card = ModelCard.load(tmp_path / "MODEL_CARD.md")
    assert card.data.eval_results is None and "Speech quality was not measured" not in card.text
    assert "## Limits" in card.text and "countries" not in card.text


def test_mlflow_keeps_report_card_and_scores(made: Path, corpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = open_run(tracked_recipe("tiny-echo", stage="echo"), {"a": 1}, storage=made)
    tracker.finish("FINISHED")
    assert main(["report", str(made), "--track"]) == 0
    state = json.loads((made / "tiny-echo" / "mlflow.json").read_text())
    client = MlflowClient(state["uri"])
    assert state["uri"].startswith("sqlite:///")
    run = client.get_run(state["run_id"])
    assert run.info.status == "FINISHED"
    kept = {entry.path for entry in client.list_artifacts(state["run_id"])}
    assert {"report.html", "MODEL_CARD.md", "evaluation"} <= kept
    for name in ("report.html", "MODEL_CARD.md"):
        copied = Path(client.download_artifacts(state["run_id"], name))
        assert copied.read_bytes() == (made / name).read_bytes()
    scores = {name: value for name, value in run.data.metrics.items() if name.startswith("eval/")}
    assert scores["eval/sqa-heldout-phrasing/s2s_strict_acc"] == 0.7
    assert scores["eval/sqa-heldout-phrasing/dnsmos_ovrl"] == 2.718
    assert scores["eval/asr-heldout-real/wer"] == 0.12
    step = int(next((made / "tiny-echo" / "checkpoints").iterdir()).name.removeprefix("step-"))
    history = client.get_metric_history(state["run_id"], "eval/asr-heldout-real/wer")
    assert [point.step for point in history] == [step]


def test_a_run_that_was_not_tracked_is_said(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    save_evaluation(tmp_path / "evaluation", {"sets": {}}, [])
    assert main(["report", str(tmp_path), "--track"]) == 4
    assert "there is no echo run to add to" in capsys.readouterr().err
    (tmp_path / "x-echo").mkdir()
    assert main(["report", str(tmp_path), "--track"]) == 4
    assert "it was not tracked" in capsys.readouterr().err
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mlflow.db"
    foreign = json.dumps({"uri": f"sqlite:///{elsewhere}", "run_id": "a"})
    (tmp_path / "x-echo" / "mlflow.json").write_text(foreign)
    assert main(["report", str(tmp_path), "--track"]) == 4
    assert "no MLflow database" in capsys.readouterr().err and not elsewhere.exists()


def test_a_saved_evaluation_keeps_all_five_columns(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [{**SAMPLES[1], "question_wav": WAV + b"q", "answer_wav": WAV + b"a",
                                      "cascade_wav": WAV + b"c", "reference_wav": WAV + b"r"}]  # fmt: skip
    save_evaluation(tmp_path, dict(RESULT), samples)
    scores, loaded = load_evaluation(tmp_path)
    assert loaded == samples and scores["sets"] == RESULT["sets"]
    for wrong in ({"quality": {"echo": {"n": 1}}}, {"quality": {"other": {}}}, {"quality": [1]}):
        row = {**RESULT["sets"]["sqa-heldout-phrasing"], **wrong}
        (tmp_path / "scores.json").write_text(json.dumps({"sets": {"x": row}}))
        with pytest.raises(DataError, match="this is no evaluation"):
            load_evaluation(tmp_path)
