"""`echox evaluate --benchmark` of a tiny run: scores, page, shards of the work, and going on after being killed."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echox import cli
from echox.errors import DataError
from echox.evaluate.benchmarks import page
from echox.evaluate.benchmarks.command import parse_names
from echox.evaluate.judges import NamedJudge
from echox.speak.pipeline import SpeechToSpeech
from tests.evaluate.benchmarks.world import COUNT, GOLDS, command, stand_in, write_world

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def rows_of(out: Path, name: str = "greedy-0") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "benchmarks" / "mine" / f"{name}.jsonl").read_text().splitlines()][1:]


def answers_of(out: Path) -> dict[str, bytes]:
    """Every file of results by name, also those of another place, whose command is another."""
    found = {
        path.relative_to(out).as_posix(): path.read_bytes().replace(str(out).encode(), b"OUT")
        for path in out.rglob("*")
        if path.is_file()
    }
    assert "benchmarks/results.json" in found and "benchmarks/benchmark.html" in found
    return found


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results that nobody interrupted, with sampled runs."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        assert cli.main(command(world, out, "--sampling", "release", "--repeats", "2")) == 0
    return out


def test_scores_are_those_of_the_answers_on_disk(whole: Path, world: Path) -> None:
    results = json.loads((whole / "benchmarks" / "results.json").read_text())
    found = results["benchmarks"]["mine"]
    assert [(row["decoding"], row["seed"]) for row in found["runs"]] == [
        ("greedy", 0), ("release", 17), ("release", 18)]  # fmt: skip
    for row, name in zip(found["runs"], ("greedy-0", "release-17", "release-18"), strict=True):
        rows = rows_of(whole, name)
        assert [each["number"] for each in rows] == list(range(COUNT)) and row["n"] == COUNT
        for key, text in (("s2t", "text"), ("s2s", "heard"), ("cascade", "cascade_heard")):
            words = [re.findall(r"w\d+", each[text]) for each in rows]
            right = [bool(set(said) & set(golds)) for said, golds in zip(words, GOLDS, strict=True)]
            assert row[key] == pytest.approx(sum(right) / COUNT)
        assert row["seconds"] == pytest.approx(sum(each["seconds"] for each in rows) / COUNT)
        assert all((each["seconds"] > 0) == bool(each["units"]) for each in rows)
    assert 0 < found["runs"][0]["s2t"] < 1, "both outcomes are met"
    mean = found["repeated"]["s2t"]["mean"]
    assert mean == pytest.approx((found["runs"][1]["s2t"] + found["runs"][2]["s2t"]) / 2)
    assert results["judge"] == str(world / "judge") and found["published"] == []
    texts = [[each["text"] for each in rows_of(whole, name)] for name in ("greedy-0", "release-17", "release-18")]
    assert texts[0] != texts[1] != texts[2]


def test_the_texts_are_those_of_the_run_asked_alone(whole: Path, world: Path) -> None:
    from echox.audio.io import read_audio

    model = SpeechToSpeech.load(world / "runs" / "echo")
    model.max_new = 8
    clips = [read_audio(world / "questions" / f"{number}.wav") for number in range(COUNT)]
    assert [each["text"] for each in rows_of(whole)] == model.write(clips)


def test_the_command_beside_a_row_makes_that_row(whole: Path, world: Path, tmp_path: Path) -> None:
    results = json.loads((whole / "benchmarks" / "results.json").read_text())
    greedy, sampled, _ = results["benchmarks"]["mine"]["runs"]
    assert "--sampling" not in greedy["command"]
    assert " --sampling release --repeats 2 " in sampled["command"]
    words = shlex.split(greedy["command"].replace(str(whole), str(tmp_path)))
    assert cli.main(words[1:]) == 0
    again = json.loads((tmp_path / "benchmarks" / "results.json").read_text())["benchmarks"]["mine"]["runs"][0]
    assert {**again, "command": ""} == {**greedy, "command": ""}


def test_complete_answers_are_scored_again_without_a_model(
    whole: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = answers_of(whole)
    monkeypatch.setattr(SpeechToSpeech, "load", None)
    monkeypatch.setattr(NamedJudge, "open", None)
    words = command(world, whole, "--sampling", "release", "--repeats", "2")
    assert cli.main(words) == 0 and answers_of(whole) == before
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"mine, judge {world / 'judge'} ") and "greedy " in shown[1]
    assert "release, seed 17" in shown[2] and "mean ± sd of 2" in shown[4]
    assert shown[-1] == str(whole / "benchmarks" / "benchmark.html")
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((whole / "benchmarks" / "results.json").read_text())


def test_shards_of_the_work_give_the_same_scores(
    whole: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = ("--sampling", "release", "--repeats", "2")
    assert cli.main(command(world, tmp_path, *sampled, "--shard", "1/2")) == 0
    assert "answers of other shards are missing" in capsys.readouterr().err
    assert not (tmp_path / "benchmarks" / "results.json").exists()
    numbers = [row["number"] for row in rows_of(tmp_path, "greedy-0-1of2")]
    assert numbers == [3, 4, 5], "the second batch"
    assert cli.main(command(world, tmp_path, *sampled, "--shard", "0/2")) == 0
    one, two = answers_of(whole), answers_of(tmp_path)
    for name in ("results.json", "benchmark.html"):
        assert two[f"benchmarks/{name}"] == one[f"benchmarks/{name}"]
    assert sorted(row["number"] for row in rows_of(tmp_path, "greedy-0-0of2")) == [0, 1, 2, 6]


def test_other_answers_are_never_mixed_in(
    whole: Path, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers_of(whole)
    for more, named in ((("--limit", "5"), "questions"), (("--batch", "2"), "batch"), (("--max-new", "7"), "max_new")):
        assert cli.main(command(world, whole, *more)) == 4
        assert f"answers of another {named}" in capsys.readouterr().err.replace("decoding.", "").replace(".count", "")
    other = world / "judge" / "tokenizer.json"
    other.write_text("{}")
    try:
        assert cli.main(command(world, whole)) == 4
        assert "answers of another judge.files" in capsys.readouterr().err
    finally:
        other.unlink()
    assert answers_of(whole) == before


def test_the_page_escapes_what_comes_from_outside_and_holds_all_questions(
    whole: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (whole / "benchmarks" / "benchmark.html").read_text()
    rows = rows_of(whole)
    assert "<b>x</b>" not in text and "&lt;b&gt;x&lt;/b&gt;" in text and "<i>" not in text
    assert text.count('class="sample ') == COUNT
    for number, row in enumerate(rows):
        assert f"&lt;i&gt;{number}?" in text and row["text"] in text and "; ".join(GOLDS[number]) in text
    spoken = sum(bool(row["units"]) for row in rows)
    assert text.count("data:audio/wav;base64,UklGR") == COUNT + spoken
    assert "http" not in text.replace("http-equiv", "") and "--sampling release" in text
    right = json.loads((whole / "benchmarks" / "results.json").read_text())["benchmarks"]["mine"]["runs"][0]["s2s"]
    assert text.count('class="sample ok"') == round(right * COUNT)
    monkeypatch.setattr("echox.evaluate.benchmarks.command.PLAYED", 2)
    assert cli.main(command(world, whole, "--sampling", "release", "--repeats", "2")) == 0
    text = (whole / "benchmarks" / "benchmark.html").read_text()
    players = 2 + sum(bool(row["units"]) for row in rows[:2])
    assert text.count("data:audio/wav") == players and text.count('class="sample ') == COUNT


def test_published_scores_stand_apart_with_their_judge_and_source() -> None:
    from echox.evaluate.benchmarks.catalogue import BENCHMARKS, PUBLISHED

    rows = [{"system": each.system, "s2s": each.scores["trivia-qa"], "source": each.source, "judge": "j"}
            for each in PUBLISHED if "trivia-qa" in each.scores]  # fmt: skip
    shown = page._published(rows)
    assert "published, judge openai/whisper-large-v3" in shown and "not comparable" in shown
    assert shown.count("arXiv 2509.09174") == len(rows) == 9
    echox = {each.system: each.scores for each in PUBLISHED}["EchoX-8B"]
    assert sum(echox[name] for name in BENCHMARKS) / 3 == pytest.approx(0.463, abs=5e-4), "the average it gives"


@pytest.mark.parametrize(
    ("given", "places", "said"),
    [
        ("nonsense", [], "nonsense is no known benchmark (llama-questions, web-questions, trivia-qa)"),
        ("../up", ["../up=x"], "no name of a benchmark"),
        ("", [], "no name of a benchmark"),
        ("web-questions", ["web-questions"], "names no place"),
        ("web-questions", ["other=x"], "does not name what --data does"),
        ("web-questions,web-questions", [], "one twice"),
    ],
)
def test_names_that_cannot_be_are_refused(given: str, places: list[str], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        parse_names(given, places)


def test_several_names_and_places() -> None:
    names, places = parse_names("trivia-qa, mine", ["mine=a=b"])
    assert names == ("trivia-qa", "mine") and places == {"mine": Path("a=b")}


def test_options_of_benchmarks_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "x", "--judge", "y", "--shard", "0/2"]) == 4
    assert "--judge, --shard needs --benchmark" in capsys.readouterr().err
    assert cli.main(["evaluate", "x", "--benchmark", "web-questions", "--limit", "0"]) == 4
    for words in (["--shard", "2/2"], ["--shard", "x"], ["--repeats", "0"], ["--batch", "-1"]):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "x", "--benchmark", "web-questions", *words])


def test_scores_go_to_the_run_in_mlflow_where_asked(
    whole: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(world, whole, "--sampling", "release", "--repeats", "2", "--track")
    assert cli.main(words) == 4 and "it was not tracked" in capsys.readouterr().err
    kept: dict[str, Any] = {}
    monkeypatch.setattr("echox.tracking.run.uri_of", lambda run: "http://127.0.0.1:9")
    monkeypatch.setattr("echox.tracking.servers.refusal", lambda uri, run: "")
    monkeypatch.setattr("echox.tracking.run.record", lambda run, **given: kept.update(given) or True)
    assert cli.main(words) == 0
    row = json.loads((whole / "benchmarks" / "results.json").read_text())["benchmarks"]["mine"]["runs"][0]
    assert kept["metrics"]["eval/mine/s2s_acc"] == row["s2s"] and kept["metrics"]["eval/mine/wer"] == row["wer"]
    assert kept["step"] == 1
    monkeypatch.setattr("echox.tracking.servers.refusal", lambda uri, run: "it is of no kind")
    assert cli.main(words) == 4 and "it is of no kind" in capsys.readouterr().err


Killed = Callable[..., int]


@pytest.fixture
def killed() -> Iterator[Killed]:
    pipe: Any = subprocess.PIPE
    words = [sys.executable, "-m", "tests.evaluate.benchmarks.killed"]
    process = subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout
    assert answers.readline() == "ready\n"

    def run(words: list[str], line: int = 0, share: float = 0.0) -> int:
        print(json.dumps({"words": words, "line": line, "share": share}), file=requests, flush=True)
        return int(answers.readline())

    yield run
    process.kill()
    process.wait()


def test_answers_at_even_distances_are_rated_for_their_sound(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = [row for row in rows_of(whole) if row["units"]]
    assert len(spoken) > 3
    for row in spoken:  # of seven, by default all
        assert row["quality"] == pytest.approx([len(row["units"]) * 40 / 1e4, 2.0, 3.0, 0.3333]), row["number"]
    found = json.loads((whole / "benchmarks" / "results.json").read_text())["benchmarks"]["mine"]["runs"][0]
    mean = sum(row["quality"][0] for row in spoken) / len(spoken)
    assert found["dnsmos_n"] == len(spoken) and found["dnsmos_ovrl"] == pytest.approx(mean)
    assert f"<td>{mean:.2f} of {len(spoken)}</td>" in (whole / "benchmarks" / "benchmark.html").read_text()

    words = command(world, tmp_path, "--rated", "3")
    assert cli.main(words) == 0
    assert {row["number"] for row in rows_of(tmp_path) if row["quality"]} <= {0, 3, 6}
    three = sum(bool(row["units"]) for row in rows_of(tmp_path) if row["number"] in (0, 3, 6))
    capsys.readouterr()
    assert cli.main([*words, "--json"]) == 0  # nothing is answered or rated again
    run = json.loads(capsys.readouterr().out)["benchmarks"]["mine"]["runs"][0]
    assert run["dnsmos_n"] == three and "--rated 3" in run["command"]
    assert cli.main(command(world, tmp_path, "--rated", "2")) == DataError.exit_code
    assert "answers of another quality.most" in capsys.readouterr().err

    assert cli.main(command(world, tmp_path / "none", "--rated", "0", "--json")) == 0
    run = json.loads(capsys.readouterr().out)["benchmarks"]["mine"]["runs"][0]
    assert run["dnsmos_ovrl"] is None and run["dnsmos_n"] == 0


def test_answers_of_one_speaker_are_not_those_of_another(
    whole: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    voices = {"spkr_embed_dim": 4, "vocoder_num_spkrs": 2, "speaker_id_map": {"ann": 0, "bo": 1}}
    (world / "vocoder" / "config.json").write_text(json.dumps(voices))
    try:
        words = command(world, tmp_path, "--limit", "1")
        assert cli.main([*words, "--speaker", "bo", "--json"]) == 0
        run = json.loads(capsys.readouterr().out)["benchmarks"]["mine"]["runs"][0]
        assert "--speaker bo" in run["command"]
        assert cli.main([*words, "--speaker", "1"]) == 0, "the same by its number"
        assert cli.main(words) == DataError.exit_code
        assert "answers of another vocoder.speaker" in capsys.readouterr().err
        assert cli.main([*words, "--speaker", "bob"]) == DataError.exit_code
        assert "did you mean 'bo'?" in capsys.readouterr().err
        assert cli.main(command(world, tmp_path / "first")) == cli.main(
            command(world, tmp_path / "first", "--speaker", "ann")
        ), "the first, by name or not"
    finally:
        (world / "vocoder" / "config.json").write_text("{}")


def test_killed_at_any_point_and_started_again_it_ends_in_the_same_files(
    whole: Path, world: Path, tmp_path: Path, killed: Killed
) -> None:
    words = command(world, tmp_path, "--sampling", "release", "--repeats", "2")
    # In the header, at the first answer, within a batch of three, between two, in the last line of a file, in the next.
    for line, share in ((1, 0.5), (2, 0.0), (3, 0.9), (2, 1.0), (4, 0.3), (3, 0.4)):
        assert killed(words, line, share) == -signal.SIGKILL
    assert killed(words) == 0
    assert answers_of(tmp_path) == answers_of(whole)
