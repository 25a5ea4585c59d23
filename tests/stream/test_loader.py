from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echox.audio.features import LogMel
from echox.audio.io import encode_flac
from echox.errors import DataError
from echox.stream.collate import Item, PromptTokens, SpeechCollate, UnitCollate
from echox.stream.index import ShardFolder
from echox.stream.loader import TrainLoader, ValidLoader
from echox.stream.writer import write_shards

PROMPT = PromptTokens(before=[1], after=[2, 3], after_asr=[9, 2, 3], end=4)


def _sample(number: int) -> dict[str, Any]:
    seconds = 0.2 + 0.1 * (number % 5)
    wave = np.sin(np.arange(int(16000 * seconds)) / (5 + number)).astype(np.float32) * 0.3
    meta = {
        "id": f"s{number}",
        "question_text": "ab",
        "answer_text": "c" * (1 + number % 3),
        "task": "sqa",
        "question_s": seconds,
    }
    units = np.arange(number + 1, dtype="<u2")
    return {
        "__key__": f"s{number:04d}",
        "question.flac": encode_flac(wave),
        "answer.units": units.tobytes(),
        "json": meta,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", (_sample(n) for n in range(11)), per_shard=4)
    return tmp_path / "set"


def _collate() -> SpeechCollate:
    return SpeechCollate(lambda text: [ord(c) for c in text], PROMPT, LogMel(80), max_samples=16000)


def test_index_lists_every_sample_with_its_bytes(folder: Path) -> None:
    samples = ShardFolder.open(folder).samples
    assert [sample.meta["id"] for sample in samples] == [f"s{n}" for n in range(11)]
    assert samples[7].read("answer.units") == np.arange(8, dtype="<u2").tobytes()


def test_a_shard_cut_in_half_is_refused_by_name(folder: Path) -> None:
    shard = sorted(folder.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(DataError, match="cut or replaced") as caught:
        ShardFolder.open(folder)
    assert shard.name in caught.value.where


def test_missing_shard_listing_and_json_member_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset\.json"):
        ShardFolder.open(tmp_path)
    listing = folder / "dataset.json"
    described = json.loads(listing.read_text())
    described["samples"] += 1
    listing.write_text(json.dumps(described))
    with pytest.raises(DataError, match="11 samples found where dataset.json lists 12"):
        ShardFolder.open(folder)


def test_speech_collate_pads_and_masks(folder: Path) -> None:
    samples = ShardFolder.open(folder).samples
    batch = _collate()([Item(samples[0], "sqa"), Item(samples[4], "asr", 0.0)], 7)
    assert batch.step == 7 and batch.weight_B.tolist() == [1.0, 0.0]
    assert batch.after_BQ.tolist() == [[2, 3, 0], [9, 2, 3]]
    assert batch.after_mask_BQ.tolist() == [[True, True, False], [True] * 3]
    assert batch.response_BR.tolist() == [[99, 4, 0], [99, 99, 4]]
    assert batch.response_mask_BR.tolist() == [[True, True, False], [True] * 3]
    assert batch.transcript_lengths_B.tolist() == [2, 2]
    assert batch.mel_BMT.shape[2] >= int(batch.frames_B.max())


def test_audio_longer_than_the_limit_is_cut_and_counted() -> None:
    collate = _collate()
    wave = np.ones(40000, dtype=np.float32) * 0.1
    batch = collate.from_audio([wave], ["sqa"], [""], [""], ids=["a"], weights=[1.0])
    assert collate.cut == 1
    assert int(batch.frames_B[0]) < 40000 / 160


def test_unit_collate_encodes_units(folder: Path) -> None:
    samples = ShardFolder.open(folder).samples
    collate = UnitCollate(lambda text: [ord(c) for c in text], lambda units: (units + 100).tolist())
    batch = collate([Item(samples[2], "tts"), Item(samples[0], "tts")], 0)
    assert batch.words_BM.tolist() == [[100, 101, 102], [100, 0, 0]]
    assert batch.words_mask_BM.sum(1).tolist() == [3, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_train_loader_is_a_pure_function_of_the_step(folder: Path, threads: int) -> None:
    items = [Item(sample, "sqa") for sample in ShardFolder.open(folder).samples]

    def loader(rank: int) -> TrainLoader:
        return TrainLoader(
            items, _collate(), seed=1, batch=8, micro_batch=2, rank=rank, world_size=2, threads=threads, prefetch=3
        )

    straight = loader(0)
    steps = [straight.step(step) for step in range(4)]
    jumped = loader(0).step(3)
    assert [batch.ids for batch in jumped] == [batch.ids for batch in steps[3]]
    assert torch.equal(jumped[0].mel_BMT, steps[3][0].mel_BMT)
    other = loader(1).step(3)
    ids = [i for batch in [*jumped, *other] for i in batch.ids]
    assert len(ids) == 8
    assert all(len(rank) == 2 for rank in (jumped, other))


def test_valid_loader_gives_all_ranks_as_many_batches_and_counts_each_sample_once(folder: Path) -> None:
    items = [Item(sample, "sqa") for sample in ShardFolder.open(folder).samples]
    ranks = [list(ValidLoader(items, _collate(), micro_batch=3, rank=r, world_size=2)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 2
    counted = [i for rank in ranks for batch in rank for i, w in zip(batch.ids, batch.weight_B, strict=True) if w]
    assert sorted(counted) == sorted(item.sample.meta["id"] for item in items)
