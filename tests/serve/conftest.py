"""The tiny run that all of these tests serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from echox.serve.app import build_app
from echox.serve.worker import Worker
from echox.speak.pipeline import SpeechToSpeech
from echox.speak.vocoder import UnitMelVocoder
from tests.serve.serving import LIMITS, Served
from tests.speak.echo_run import load_with_ends, write_echo_run
from tests.speak.voices import unit_mel


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpeechToSpeech:
    return load_with_ends(write_echo_run(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="package")
def vocoder() -> UnitMelVocoder:
    return unit_mel(7)


@pytest.fixture(scope="package")
def served(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> Iterator[Served]:
    made = Served(build_app(Worker(model, vocoder, LIMITS), LIMITS, name="tiny"))
    yield made
    made.stop()
