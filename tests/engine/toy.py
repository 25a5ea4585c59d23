"""A small stage with two losses of uneven token counts, a frozen tower with a shared tensor, data made on the fly."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echox.config.schema import Recipe
from echox.engine.interfaces import StageSetup
from echox.errors import CheckpointError

FEATURES, WIDTH, CLASSES, POSITIONS = 8, 16, 5, 6


@dataclass
class ToyTerm:
    total: Tensor
    count: Tensor


@dataclass
class ToyBatch:
    ids: list[str]
    x_BTD: Tensor
    labels_BT: Tensor
    mask_BT: Tensor
    ctc_B: Tensor
    account: np.ndarray | None = None

    def to(self, device: torch.device) -> ToyBatch:
        moved = {name: getattr(self, name).to(device) for name in ("x_BTD", "labels_BT", "mask_BT", "ctc_B")}
        return replace(self, **moved)


@dataclass(frozen=True)
class ToyOptions:
    """What a scenario changes about the toy."""

    dropout: float = 0.0
    known: bool = True
    skip_odd_steps: bool = False
    dead: bool = False
    leak: bool = False
    nan_at: int = -1
    nan_from: int = 1_000_000
    bad_data_at: int = -1
    spike_at: int = -1
    term_at: int = -1
    term_in_validation: bool = False
    sleep_at: int = -1
    free_at: int = -1
    ballast: str = ""


class ToyStage(nn.Module):
    """Frozen tower, adapter and LoRA-like bottleneck, two heads; `ctc` may stay out of the graph on odd steps."""

    def __init__(self, options: ToyOptions) -> None:
        super().__init__()
        self.options = options
        self.tower = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.tower[2].weight
        for part in (self.tower, self.tied):
            part.requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(options.dropout)
        self.lora = nn.Linear(WIDTH, WIDTH, bias=False)
        self.text_head = nn.Linear(WIDTH, CLASSES)
        self.ctc_head = nn.Linear(WIDTH, 3)
        self.register_buffer("classes", torch.tensor([7, 1, 4]))
        if options.dead:
            self.dead = nn.Linear(WIDTH, 2, bias=False)

    def forward(self, batch: ToyBatch) -> dict[str, ToyTerm]:
        if self.options.leak and self.training:
            self.tower[0].bias.add_(1e-3)
        hidden_BTD = self.tied(torch.tanh(self.tower(batch.x_BTD)))
        hidden_BTD = self.drop(torch.relu(self.adapter(hidden_BTD))) + self.lora(hidden_BTD)
        token_BT = nn.functional.cross_entropy(
            self.text_head(hidden_BTD).transpose(1, 2), batch.labels_BT, reduction="none"
        )
        if batch.ids[0].startswith(f"{self.options.spike_at}-"):
            token_BT = 100 * token_BT
        terms = {"s2t": ToyTerm((token_BT * batch.mask_BT).sum(), batch.mask_BT.sum())}
        # The same on all ranks: a parameter in the graph of some ranks only would break ZeRO-3's reductions.
        if self.options.skip_odd_steps and int(batch.ids[0].partition("-")[0]) % 2:
            zero = torch.zeros((), device=batch.x_BTD.device)
            terms["ctc"] = ToyTerm(zero, zero)
        else:
            ctc_B = nn.functional.cross_entropy(
                self.ctc_head(hidden_BTD[:, 0]), batch.labels_BT[:, 0] % 3, reduction="none"
            )
            terms["ctc"] = ToyTerm((ctc_B * batch.ctc_B).sum(), batch.ctc_B.sum())
        if self.options.dead:
            terms["echo"] = ToyTerm(self.dead(hidden_BTD).sum(), batch.mask_BT.sum())
        return terms

    def loss_weights(self, means: dict[str, Tensor], step: int) -> dict[str, Any]:
        weights: dict[str, Any] = {"s2t": 1.0, "ctc": torch.tensor(0.3), "echo": 0.0}
        if step == self.options.nan_at or step >= self.options.nan_from:
            weights["ctc"] = float("nan")
        return {name: weights[name] for name in means}

    def known_counts(self, batch: ToyBatch) -> dict[str, int]:
        if not self.options.known:
            return {}
        return {"s2t": int(batch.mask_BT.sum()), "ctc": int(batch.ctc_B.sum())}

    def needs_survey(self, batch: ToyBatch) -> bool:
        return not self.options.known

    def parameter_groups(self) -> dict[str, list[str]]:
        names = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        lora = [name for name in names if name.startswith("lora")]
        return {"adapters": [name for name in names if name not in lora], "lora": lora}

    def metrics(self) -> dict[str, Tensor]:
        return {"answer": torch.tensor(42.0)}


def sample(step: int, index: int, options: ToyOptions) -> ToyBatch:
    """Sample `index` of the global batch of a step, from its own seed."""
    generator = torch.Generator().manual_seed(1_000_003 * step + index)
    length = int(torch.randint(1, POSITIONS + 1, (), generator=generator))
    ctc = float(index % 3 == 0) * (0.0 if options.skip_odd_steps and step % 2 else 1.0)
    x_BTD = torch.randn(1, POSITIONS, FEATURES, generator=generator)
    if step == options.bad_data_at and index == 5:
        x_BTD[0, 0, 0] = float("nan")
    return ToyBatch(
        ids=[f"{step}-{index}"],
        x_BTD=x_BTD,
        labels_BT=torch.randint(0, CLASSES, (1, POSITIONS), generator=generator),
        mask_BT=(torch.arange(POSITIONS) < length)[None].float(),
        ctc_B=torch.tensor([ctc]),
    )


def collate(samples: list[ToyBatch]) -> ToyBatch:
    return ToyBatch(
        ids=[name for one in samples for name in one.ids],
        **{
            name: torch.cat([getattr(one, name) for one in samples])
            for name in ("x_BTD", "labels_BT", "mask_BT", "ctc_B")
        },
    )


class UncountedLoader:
    """What a loader has beside `step`, for one whose data need no account."""

    def identity(self) -> dict[str, Any]:
        return {}

    def start(
        self, *, step: int, run_folder: Path, saved: Mapping[str, Any] | None, accept_new_data: bool = False
    ) -> list[str]:
        return []

    def commit(self) -> None:
        pass

    def check_accounts(self, account: Sequence[float]) -> dict[str, float]:
        return {}

    def record(self) -> dict[str, Any]:
        return {}

    def rewind(self, *, step: int, saved: Mapping[str, Any] | None, pass_over: int) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class ToyLoader(UncountedLoader):
    """Micro-batch m of rank r holds samples (m * world + r) * micro onwards of the global batch.

    The account of a batch is [samples, sum of their indices].
    """

    recipe: Recipe
    rank: int
    world: int
    options: ToyOptions
    data: str = "toy"
    seen: float = 0.0
    committed: int = 0
    passed_over: int = 0

    def identity(self) -> dict[str, Any]:
        return {"data": self.data}

    def start(
        self, *, step: int, run_folder: Path, saved: Mapping[str, Any] | None, accept_new_data: bool = False
    ) -> list[str]:
        self.committed = step
        if saved is None:
            return []
        self.seen, self.passed_over = saved["seen"], saved["passed_over"]
        if saved["data"] == self.data:
            return []
        clause = f"the data are {self.data} and were {saved['data']}"
        if not accept_new_data:
            raise CheckpointError(clause)
        return [clause]

    def step(self, step: int) -> list[ToyBatch]:
        assert step == self.committed
        if self.rank == self.world - 1 and step == self.options.term_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.rank == 0 and step == self.options.sleep_at:
            time.sleep(600)
        if self.rank == 0 and step == self.options.free_at:
            os.truncate(self.options.ballast, 0)
        micro, data = self.recipe.data.micro_batch, self.recipe.data
        starts = range(self.rank * micro, data.global_batch, self.world * micro)
        batches = []
        for start in starts:
            indices = range(start, start + micro)
            at = step + self.passed_over
            batches.append(collate([sample(at, index, self.options) for index in indices]))
            batches[-1].account = np.array([micro, sum(indices)], dtype=np.float64)
        return batches

    def commit(self) -> None:
        self.committed += 1

    def check_accounts(self, account: Sequence[float]) -> dict[str, float]:
        self.seen += account[0]
        return {"data/samples": self.seen, "data/indices": account[1]}

    def record(self) -> dict[str, Any]:
        return {"data": self.data, "seen": self.seen, "committed": self.committed, "passed_over": self.passed_over}

    def rewind(self, *, step: int, saved: Mapping[str, Any] | None, pass_over: int) -> None:
        assert saved is not None and saved["committed"] == step
        self.seen, self.committed = saved["seen"], step
        self.passed_over = saved["passed_over"] + pass_over


@dataclass(frozen=True)
class ToyValidation:
    rank: int
    world: int
    options: ToyOptions

    def __iter__(self) -> Iterator[ToyBatch]:
        for index in range(self.rank, 4, self.world):
            if self.options.term_in_validation and self.rank == 0 and index == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield sample(10_000, index, ToyOptions())


@dataclass(frozen=True)
class ToyBuild:
    """The injected build function of a scenario."""

    options: ToyOptions
    frozen_folder: Path
    data: str = "toy"

    def __call__(self, recipe: Recipe, rank: int, world_size: int) -> StageSetup:
        return StageSetup(
            module=ToyStage(self.options),
            train_loader=ToyLoader(recipe, rank, world_size, self.options, self.data),
            valid_loaders={"held": ToyValidation(rank, world_size, self.options)},
            frozen_models={"tower": self.frozen_folder},
        )


def toy_recipe(name: str, deepspeed: Path, **changes: Any) -> Recipe:
    """A recipe of ten steps over eight samples; `changes` are dotted keys with `__` for the dot."""
    tree: dict[str, Any] = {
        "name": name,
        "stage": "s2t",
        "scale": "toy",
        "model": {
            "llm": {"path": "none", "prompt": {"before": "a", "after": "b", "end": "c"}},
            "speech_encoder": {"path": "none"},
            "ctc": {"align_steps": 0},
        },
        "data": {"train": [{"path": "none", "task": "sqa"}], "global_batch": 8, "micro_batch": 4},
        "optim": {"steps": 10, "warmup_steps": 2, "lr": {"adapters": 0.01, "lora": 0.02}, "clip": 0.5},
        "engine": {"deepspeed": str(deepspeed), "precision": "fp32", "validate_every": 5},
        "scaling": {"workers": 1},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return Recipe.model_validate(tree)
