"""An evaluation of the demo refuses a vocoder of other units than the run or the held-out set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from echox.errors import DataError
from echox.evaluate import demo
from echox.units.identity import UnitPart, UnitSetIdentity, write_unit_set

UNITS = UnitSetIdentity(features="log_mel", clusters=4, centroids="aa")
OTHER = replace(UNITS, centroids="bb")


class Scored(Exception):
    """The evaluation went on."""


@pytest.mark.parametrize(
    ("run", "heldout", "differing"),
    [(OTHER, UNITS, "run demo-echo"), (UNITS, OTHER, "demo/tts-heldout"), (UNITS, UNITS, None), (None, UNITS, None)],
)
def test_run_vocoder_and_heldout_set_are_of_one_unit_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: UnitSetIdentity | None,
    heldout: UnitSetIdentity,
    differing: str | None,
) -> None:
    def take(*_: object) -> None:
        raise Scored

    model = SimpleNamespace(units=UnitPart("run demo-echo", run), recipe=SimpleNamespace(language="en"))
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    monkeypatch.setattr("echox.evaluate.asr.Judge.load", lambda folder, language: None)
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: None)
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech.load", lambda folder: model)
    monkeypatch.setattr(demo, "resolve_model", lambda ref: tmp_path)
    monkeypatch.setattr(demo, "take", take)
    corpus = tmp_path / "data" / "demo"
    write_unit_set(corpus / "tts-heldout", heldout)
    write_unit_set(corpus / "vocoder", UNITS)
    (corpus / "corpus.json").write_text("{}")
    (corpus / "sqa-heldout-phrasing").mkdir()
    if differing is None:
        with pytest.raises(Scored):
            demo.evaluate_demo(tmp_path / "run")
    else:
        with pytest.raises(DataError, match=f"the vocoder .* and {differing} of"):
            demo.evaluate_demo(tmp_path / "run")
