"""Discriminators, losses, generator and batches of a vocoder, each beside what it should be by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echox.errors import CorruptSampleError, DataError, RecipeError
from echox.stream.collate import Item
from echox.stream.storage.store import Sample, read_folder
from echox.units.identity import UnitSetIdentity, write_unit_set
from echox.vocoder import losses
from echox.vocoder.data import Clip, VoiceCollate, held_out, open_voice, units_of_voice
from echox.vocoder.discriminators import Discriminators, PeriodDiscriminator, Verdict, halves
from echox.vocoder.generator import Generator
from echox.vocoder.recipe import VoiceRecipe, load_voice
from echox.vocoder.shape import HifiGanShape
from tests.vocoder import toy


def test_the_discriminators_have_the_weights_of_the_paper() -> None:
    with torch.device("meta"):
        judges = Discriminators()

    def weights(module: torch.nn.Module) -> int:
        magnitudes = ".parametrizations.weight.original0"  # of weight norm
        return sum(value.numel() for name, value in module.named_parameters() if not name.endswith(magnitudes))

    assert weights(judges.periods) == 41_092_165
    spectral = sum(v.numel() for n, v in judges.scales[0].named_parameters())
    assert spectral == 9_870_209 and weights(judges.scales) == 3 * 9_870_209
    assert sum(value.numel() for value in HifiGanShape().build("meta").parameters()) == 13_475_010


def test_a_period_discriminator_sees_the_samples_of_one_column() -> None:
    torch.manual_seed(0)
    judge = PeriodDiscriminator(3, 32)
    wave_BN = torch.randn(1, 3 * 81, requires_grad=True)
    verdict = judge(wave_BN)
    columns = verdict.features[0].shape[-1]
    verdict.score_BS[0, 1].backward()
    assert columns == 3 and wave_BN.grad is not None
    (seen,) = wave_BN.grad[0].nonzero(as_tuple=True)
    assert len(seen) > 9 and {int(place) % 3 for place in seen} == {1}


def test_verdicts_do_not_depend_on_what_they_are_batched_with() -> None:
    torch.manual_seed(0)
    judges = Discriminators(16).eval()
    waves_BN = torch.randn(3, 1000)
    first, rest = halves(judges(waves_BN), 1)
    assert len(first) == 8 and all(verdict.score_BS.shape[0] == 2 for verdict in rest)
    for both, alone in zip(first, judges(waves_BN[:1]), strict=True):
        torch.testing.assert_close(both.score_BS, alone.score_BS, rtol=1e-4, atol=1e-6)
        assert [f.shape for f in both.features] == [f.shape for f in alone.features]
    scales = [verdict.score_BS.shape[1] for verdict in first[5:]]
    assert scales == [16, 8, 4], "each scale sees half the samples of the one before"


def test_losses_are_those_of_the_paper() -> None:
    def verdict(score: list[list[float]], *features: list[list[float]]) -> Verdict:
        return Verdict(torch.tensor(score), [torch.tensor(each) for each in features])

    real = [verdict([[1.0, 0.5]], [[1.0, 2.0]], [[0.0]]), verdict([[0.0, 0.0]], [[4.0]])]
    made = [verdict([[0.5, 0.5]], [[0.0, 4.0]], [[0.5]]), verdict([[1.0, 3.0]], [[1.0]])]
    assert losses.discriminator_loss(real, made).tolist() == [(0 + 0.25) / 2 + 0.25 + 1 + (1 + 9) / 2]
    assert losses.adversarial_loss(made).tolist() == [0.25 + (0 + 4) / 2]
    assert losses.feature_loss(real, made).tolist() == [(1 + 2) / 2 + 0.5 + 3]
    logs_BU = torch.tensor([[0.0, 1.0, 9.0]])
    mask_BU = torch.tensor([[True, True, False]])
    wanted = np.log(3.0) ** 2 + (1 - np.log(2.0)) ** 2
    found = losses.duration_loss(logs_BU, torch.tensor([[2, 1, 0]]), mask_BU)
    assert found.tolist() == pytest.approx([wanted])
    assert losses.mel_loss(torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [3.0, -6.0]]])).tolist() == [3.0]


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_log_mel_is_that_of_a_transform_by_hand(rate: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    wave = np.random.default_rng(0).normal(size=2560).astype(np.float32) * 0.1
    mirrored = np.concatenate([wave[384:0:-1], wave, wave[-2:-386:-1]])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([mirrored[start : start + 1024] * hann for start in range(0, len(mirrored) - 1023, 256)])
    filters = mel_filter_bank(513, 80, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    wanted = np.log(np.maximum(np.abs(np.fft.rfft(frames)) @ filters, 1e-5)).T
    found = losses.LogMel(rate)(torch.from_numpy(wave)[None])[0].numpy()
    assert found.shape == (80, 10)
    np.testing.assert_allclose(found, wanted, atol=2e-3)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(1)
    made = Generator(
        HifiGanShape(units=5, embedding=8, channels=32, resblock_kernels=(3,), resblock_dilations=((1, 3),))
    )
    return made.eval()


def test_durations_in_a_batch_are_those_of_each_clip_alone(generator: Generator) -> None:
    units_BU = torch.tensor([[1, 2, 3, 4, 0, 1, 3], [4, 3, 2, 0, 0, 0, 0]])
    mask_BU = torch.arange(7) < torch.tensor([[7], [3]])
    logs_BU = generator.log_durations(units_BU, mask_BU)
    for row, size in ((0, 7), (1, 3)):
        alone_1U = generator.net.dur_predictor(generator.net.unit_embedding(units_BU[row : row + 1, :size]))
        torch.testing.assert_close(logs_BU[row, :size], alone_1U[0], rtol=0, atol=1e-6)
    without = generator.log_durations(units_BU, torch.ones_like(mask_BU))
    assert not torch.allclose(without[1, :3], logs_BU[1, :3], atol=1e-4), "what is padded would be heard"


def test_folded_weights_speak_as_those_that_train(generator: Generator) -> None:
    plain = generator.shape.build().eval()
    plain.load_state_dict(generator.folded())
    frames_1T = torch.tensor([[1, 1, 4, 2, 3, 0, 0, 2]])
    wave_1N = generator.speak(frames_1T, torch.zeros(1, dtype=torch.long))
    wanted_1N = plain.hifi_gan(plain.unit_embedding(frames_1T).transpose(1, 2))
    assert wave_1N.shape == (1, 8 * 320) and float(wave_1N.detach().std()) > 1e-3
    torch.testing.assert_close(wave_1N, wanted_1N, rtol=0, atol=1e-6)


def test_the_first_weights_are_those_that_the_published_vocoders_began_with() -> None:
    """HiFi-GAN draws its own after weight norm, in vain: torch's stay, uniform within 1 / sqrt(fan)."""
    torch.manual_seed(0)
    made = Generator(HifiGanShape(units=5, embedding=32, channels=64))
    fans = {"conv_pre": 32 * 7, "upsampler.0": 32 * 11, "resblocks.2.convs1.1": 32 * 11, "conv_post": 2 * 7}
    weights = made.folded()
    for name, fan in fans.items():
        deviation = float(weights[f"hifi_gan.{name}.weight"].std())
        assert deviation == pytest.approx((3 * fan) ** -0.5, rel=0.3 if name == "conv_post" else 0.1), name
    wave_BN = made.speak(torch.randint(0, 5, (4, 8)), torch.zeros(4, dtype=torch.long))
    assert float(wave_BN.detach().std()) > 0.005, "a sound from the first step on, which the mel loss can shape"


def row(frames: int, name: str = "a") -> Clip:
    """A clip of which frame f sounds as f and is of unit f % 5."""
    places = np.arange(frames)
    return Clip(name, 1.0, places % 5, np.ones(frames, np.int64), np.repeat(places, 320).astype(np.float32))


def test_a_segment_is_heard_where_its_units_are() -> None:
    collate = VoiceCollate(5, 8, seed=3, rate=16_000)
    found = set()
    for step in range(120):
        batch = collate.join([row(20, "a"), row(20, "b"), row(3, "c")], step)
        assert batch.frames_BT.shape == (3, 8) and batch.wave_BN.shape == (3, 8 * 320)
        heard_BT = batch.wave_BN.reshape(3, 8, 320)
        assert torch.equal(heard_BT.amin(-1), heard_BT.amax(-1)), "it begins with a frame"
        assert torch.equal(heard_BT[..., 0].long() % 5, batch.frames_BT)
        assert torch.equal(heard_BT[:2, 1:, 0], heard_BT[:2, :-1, 0] + 1)
        assert set(heard_BT[2, :, 0].tolist()) == {0.0, 1.0, 2.0}, "a short clip is repeated"
        found.add((int(heard_BT[0, 0, 0]), int(heard_BT[1, 0, 0])))
        assert torch.equal(batch.wave_BN, collate.join([row(20, "a"), row(20, "b"), row(3, "c")], step).wave_BN)
    first = {place for place, _ in found}
    assert {0, 12} <= first <= set(range(13)) and len(found) > 60, "anywhere in the clip, at each step again"


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_voice(tmp_path_factory.mktemp("voice") / "train")


def read(**changes: Any) -> Clip:
    units, durations, wave = toy.clip(0)
    made = toy.sample("s", units, durations, wave, **changes)
    members = {name: data for name, data in made.items() if name not in ("__key__", "json")}
    return VoiceCollate(5, 8, 0, 16_000).decode(Item(Sample("s", 0, members, made["json"]), "tts"))


def test_a_clip_ends_with_its_last_frame() -> None:
    units, durations, wave = toy.clip(0)
    samples = 320 * int(durations.sum())
    whole = read()
    assert len(wave) == samples == len(whole.wave) and whole.units.tolist() == units.tolist()
    from echox.audio.io import encode_flac

    short, long = (read(**{"answer.flac": encode_flac(each)}) for each in (wave[:-300], np.resize(wave, samples + 300)))
    assert len(short.wave) == len(long.wave) == samples
    assert not short.wave[-300:].any() and np.abs(long.wave - whole.wave).max() < 1e-3


def test_a_clip_is_heard_at_the_rate_of_the_vocoder(tmp_path: Path) -> None:
    from echox.audio.io import encode_flac

    units, durations, _ = toy.clip(0)
    seconds = np.arange(480 * int(durations.sum())) / 24_000
    wave = (0.3 * np.sin(2 * np.pi * 9_000 * seconds)).astype(np.float32)  # 16 kHz hold nothing above 8 kHz
    members = toy.sample("s", units, durations, wave, **{"answer.flac": encode_flac(wave, 24_000)})
    item = Item(Sample("s", 0, {k: v for k, v in members.items() if k[:2] == "an"}, members["json"]), "tts")
    high = VoiceCollate(5, 8, 0, 24_000)
    clip = high.decode(item)
    assert np.abs(clip.wave - wave).max() < 1e-4
    assert high.join([clip], 0).wave_BN.shape == (1, 8 * 480) and high.blank(0).wave_BN.shape == (1, 8 * 480)
    low = VoiceCollate(5, 8, 0, 16_000).decode(item)
    assert len(low.wave) == 320 * int(durations.sum()) and np.abs(low.wave[500:-500]).max() < 1e-2
    with pytest.raises(CorruptSampleError, match=r"it has 24,000 samples a second, fewer than the 48,000"):
        VoiceCollate(5, 8, 0, 48_000).decode(item)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer.durations": b"\1\0"}, "9 units cannot have 1 durations"),
        ({"answer.units": b"\5\0" * 9}, "unit 5 is unknown to a vocoder of 5 units"),
        ({"answer.durations": b"\1\0" * 9}, "9 frames of 20 ms are not the"),
        ({"answer.units": b"", "answer.durations": b""}, "it has no units"),
        ({"answer.units": b"\0"}, "answer.units cannot be decoded"),
        ({"answer.flac": b"x"}, "answer.flac cannot be decoded"),
    ],
)
def test_a_clip_that_cannot_be_trained_on_is_dropped_by_name(changes: dict[str, bytes], said: str) -> None:
    with pytest.raises(CorruptSampleError, match=said):
        read(**changes)


def test_the_units_are_those_of_the_records(voice: Path, tmp_path: Path) -> None:
    sources = open_voice([str(voice)])
    assert units_of_voice(sources, None) == (5, toy.UNIT_SET) == units_of_voice(sources, 5)
    with pytest.raises(DataError, match="generator.units=6, and the datasets have 5 units"):
        units_of_voice(sources, 6)
    other = toy.write_voice(tmp_path / "other", 1)
    write_unit_set(other, UnitSetIdentity(features="log_mel", clusters=5, centroids="bb"))
    with pytest.raises(DataError, match="differ in centroids"):
        units_of_voice(open_voice([str(voice), str(other)]), None)
    write_unit_set(other, None)
    with pytest.raises(DataError, match="no record says how many units"):
        units_of_voice(open_voice([str(other)]), None)
    assert units_of_voice(open_voice([str(other)]), 7) == (7, None)
    assert [clip.id for clip in held_out(str(voice), VoiceCollate(5, 8, 0, 16_000), 2)] == [
        each.key for each, _ in zip(read_folder(voice), range(2), strict=False)
    ]


def test_a_dataset_of_which_no_clip_can_be_spoken_is_refused(voice: Path) -> None:
    with pytest.raises(DataError, match="no clip of .* can be spoken"):
        held_out(str(voice), VoiceCollate(2, 8, 0, 16_000), 2)


def test_a_dataset_without_durations_is_refused(tmp_path: Path) -> None:
    from echox.stream.format.writer import write_shards

    made = toy.sample("s", *toy.clip(0))
    del made["answer.durations"]
    write_shards(tmp_path / "set", [made])
    with pytest.raises(DataError, match="no sample of .* has answer.durations, answer.flac, answer.units"):
        open_voice([str(tmp_path / "set")])


def shipped() -> Iterator[str]:
    yield from (file.stem for file in (Path(__file__).parents[2] / "launch" / "vocoders").glob("*.yaml"))


def test_the_recipes_load_and_the_large_one_is_that_of_the_published_vocoder() -> None:
    found = {name: load_voice(name) for name in shipped()}
    assert set(found) == {"demo", "hifi_gan"} and found["demo"].stage == "vocoder"
    large = found["hifi_gan"]
    assert large.generator.shape(1000) == HifiGanShape()
    assert large.data.segment_frames * 320 == 8960 and large.data.global_batch == 16
    assert (large.optim.lr, large.optim.betas, large.optim.decay) == (2e-4, (0.8, 0.99), 0.999)
    assert (large.loss.mel, large.loss.features, large.loss.duration) == (45, 2, 1)
    assert VoiceRecipe.model_validate(large.model_dump(mode="json")) == large


def test_every_mistake_in_a_recipe_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        load_voice("demo", ["optim.lrr=1", "generator.rates=[5,4]", "data.micro_batch=3", "optim.betas=[0.8,1]"])
    for said in ('optim.lrr: unknown key; did you mean "lr"?', "2 rates and 5 kernels", "3 * 1 = 3", "optim.betas"):
        assert said in raised.value.what
    with pytest.raises(RecipeError, match=r"product of rates is 240, and a unit frame of 20 ms at 16,000 Hz has 320"):
        load_voice("demo", ["generator.rates=[5,4,4,3,1]", "generator.kernels=[11,8,8,5,3]"])
    with pytest.raises(RecipeError, match="is no folder"):
        load_voice("demo", ["storage=s3://bucket/runs"])
    with pytest.raises(RecipeError) as unknown:
        load_voice("dem")
    assert unknown.value.fix == 'did you mean "demo"?'
