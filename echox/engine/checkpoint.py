"""Saving and loading the trainable state of a run: complete under its name, or not there at all."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.engine import rng
from echox.engine.manifest import (
    MANIFEST,
    WEIGHTS,
    Choice,
    checkpoints_folder,
    choose,
    describe_file,
    discard,
    list_checkpoints,
    publish,
    step_name,
    write_manifest,
)
from echox.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from echox.config.schema import Recipe
    from echox.engine.deepspeed_engine import Engine
    from echox.engine.gang import Gang

_DEEPSPEED = "deepspeed"
_GATHER_ELEMENTS = 1 << 26
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray", "webdataset", "numpy")
_OF_RANK = re.compile(r"(?:zero_pp_rank_|rng/rank-0*)(\d+)")


def find_weights(run_or_checkpoint: Path) -> Path:
    """The consolidated trainable weights of a checkpoint folder, or of a run's newest good checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or none whose weights match their hash.
    """
    folder = Path(run_or_checkpoint)
    candidates = [folder] if (folder / MANIFEST).is_file() else list_checkpoints(folder)
    chosen = choose(candidates, only=(WEIGHTS,)).checkpoint
    if chosen is None:
        raise CheckpointError("no checkpoint found", where=str(folder), fix="train the stage first: echox train RECIPE")
    return chosen / WEIGHTS


def find_checkpoint(run_folder: Path, asked: Path | None = None) -> Choice:
    """The newest verified checkpoint of a run; the one the launcher `asked` for counts when it lies elsewhere."""
    candidates = list_checkpoints(run_folder)
    if asked is not None and asked.resolve() not in {path.resolve() for path in candidates}:
        candidates.append(asked)
    return choose(candidates)


def check_fits(choice: Choice, recipe: Recipe, world_size: int) -> None:
    """Raise CheckpointError when the run cannot go on from the chosen checkpoint as this recipe and world want."""
    if choice.checkpoint is None:
        return
    saved, where = choice.manifest, str(choice.checkpoint)
    if saved["world_size"] != world_size:
        raise CheckpointError(
            f"the checkpoint was written by {saved['world_size']} workers and this run has {world_size}",
            where=where,
            fix=f"resume with {saved['world_size']} workers, or start a new run under another name",
        )
    if saved["recipe"]["stage"] != recipe.stage:
        raise CheckpointError(
            f"stage is {recipe.stage} and was {saved['recipe']['stage']} when the checkpoint was written",
            where=where,
            fix="set stage back, or start a new run under another name",
        )


@dataclass(frozen=True, kw_only=True)
class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Attributes:
        engine: the run's engine.
        gang: the ranks; every method is collective.
        run_folder: folder of the run, seen by every rank.
        attempt: number of this attempt; part of temporary names, so that attempts never mix files.
        keep: checkpoints kept.
        contents: what every manifest of the run carries (recipe, frozen models, census, data).
    """

    engine: Engine
    gang: Gang
    run_folder: Path
    attempt: int
    keep: int
    contents: Mapping[str, Any]

    def save(self, step: int, *, cursor: Mapping[str, Any], metrics: Mapping[str, float]) -> Path:
        """Write and publish the checkpoint after `step` optimizer steps; return its folder.

        Shards, consolidated weights and random states go to a temporary folder; every rank hashes and fsyncs its own
        files; rank 0 writes the manifest; only when every rank agrees does the folder get its name.

        Raises:
            CheckpointError: a file could not be written; published checkpoints are untouched.
        """
        parent = checkpoints_folder(self.run_folder)
        temporary = parent / f".attempt-{self.attempt}-{step_name(step)}"
        final = parent / step_name(step)
        try:
            with rng.untouched():
                self._write_shards(temporary)
                trainable = self._write_weights(temporary)
        except (OSError, RuntimeError) as error:
            # Other ranks may wait inside DeepSpeed's own barrier: leaving at once ends their wait as well.
            raise _failed(step, str(error), final) from error
        files, why = self._describe(temporary)
        described = self.gang.gather((files, why))
        self._agree(step, final, [problem for _, problem in described])
        why = ""
        if self.gang.leads:
            merged = {name: entry for part, _ in described for name, entry in part.items()}
            contents = {
                **self.contents,
                "step": step,
                "attempt": self.attempt,
                "world_size": self.gang.size,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "cursor": dict(cursor),
                "metrics": dict(metrics),
                "trainable": trainable,
                "versions": library_versions(),
            }
            try:
                write_manifest(temporary, contents, merged)
            except OSError as error:
                why = str(error)
        self._agree(step, final, self.gang.gather(why))
        if self.gang.leads:
            try:
                publish(temporary, final)
            except OSError as error:
                why = str(error)
        self._agree(step, final, self.gang.gather(why))
        return final

    def load(self, choice: Choice) -> int:
        """Bring engine and random states back to a checkpoint that fits; return its step.

        Raises:
            CheckpointError: the trainable tensors are not those of this model.
        """
        assert choice.checkpoint is not None
        ours = {name: list(_shape(parameter)) for name, parameter in self._trainables()}
        theirs = {name: entry["shape"] for name, entry in choice.manifest["trainable"].items()}
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CheckpointError(
                f"the checkpoint holds other trainable tensors than this model: {', '.join(differing[:3])}{more}",
                where=str(choice.checkpoint),
                fix="continue with the recipe of the run, or use another run name",
            )
        # Not strict: frozen weights are not in a checkpoint; the comparison above is the strict part.
        self.engine.ds.load_checkpoint(str(choice.checkpoint), tag=_DEEPSPEED, load_module_strict=False)
        import torch

        state = torch.load(choice.checkpoint / _rng_name(self.gang.rank), weights_only=False)
        rng.restore(state)
        return int(choice.manifest["step"])

    def retain(self) -> list[Path]:
        """Delete all but the newest checkpoints; call it after the newest is reported. Returns what was deleted."""
        if not self.gang.leads:
            return []
        gone: list[Path] = []
        for path in list_checkpoints(self.run_folder)[self.keep :]:
            try:
                discard(path)
            except OSError:
                continue  # A delete that fails must not end training; the next save tries again.
            gone.append(path)
        return gone

    def _write_shards(self, temporary: Path) -> None:
        import torch

        if self.gang.leads:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "rng").mkdir(parents=True)
        self.gang.barrier()
        self.engine.ds.save_checkpoint(
            str(temporary), tag=_DEEPSPEED, save_latest=False, exclude_frozen_parameters=True
        )
        torch.save(rng.capture(), temporary / _rng_name(self.gang.rank))

    def _write_weights(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Consolidate the trainable tensors in the dtype they train in, with the persistent buffers beside them.

        On rank 0, returns shape and dtype of the trainables by name.
        """
        from deepspeed.runtime.zero import GatheredParameters
        from safetensors.torch import save_file

        whole: dict[str, Tensor] = {}
        for names, parameters in self._gather_groups():
            with GatheredParameters(parameters):
                if self.gang.leads:
                    for name, parameter in zip(names, parameters, strict=True):
                        whole[name] = parameter.detach().to("cpu", copy=True).contiguous()
        if self.gang.leads:
            save_file({**whole, **self._persistent_buffers()}, str(temporary / WEIGHTS))
        self.gang.barrier()
        return {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in whole.items()}

    def _gather_groups(self) -> Iterator[tuple[list[str], list[Any]]]:
        """Trainables in groups small enough to be whole at the same time."""
        names: list[str] = []
        parameters: list[Any] = []
        elements = 0
        for name, parameter in self._trainables():
            size = int(getattr(parameter, "ds_numel", parameter.numel()))
            if names and elements + size > _GATHER_ELEMENTS:
                yield names, parameters
                names, parameters, elements = [], [], 0
            names.append(name)
            parameters.append(parameter)
            elements += size
        if names:
            yield names, parameters

    def _persistent_buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the model's state; those that stand for frozen weights are not persistent."""
        return {
            f"{path}.{name}" if path else name: buffer.detach().to("cpu", copy=True).contiguous()
            for path, module in self.engine.stage.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def _trainables(self) -> Iterator[tuple[str, Any]]:
        return (
            (name, parameter) for name, parameter in self.engine.stage.named_parameters() if parameter.requires_grad
        )

    def _describe(self, temporary: Path) -> tuple[dict[str, dict[str, Any]], str]:
        """Hash and fsync the files this rank wrote; the second value is why that failed, or empty."""
        try:
            names = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
            return {name: describe_file(temporary / name) for name in names if _writer(name) == self.gang.rank}, ""
        except OSError as error:
            return {}, str(error)

    def _agree(self, step: int, final: Path, problems: list[str]) -> None:
        bad = [f"rank {rank}: {why}" for rank, why in enumerate(problems) if why]
        if bad:
            raise _failed(step, "; ".join(bad), final)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries a checkpoint depends on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _failed(step: int, why: str, final: Path) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of step {step} could not be written: {why}",
        where=str(final),
        fix="earlier checkpoints are untouched; make room or restore access, then start the run again",
    )


def _rng_name(rank: int) -> str:
    return f"rng/rank-{rank:05d}.pt"


def _writer(name: str) -> int:
    """The rank that wrote a file of a checkpoint; it is the one whose fsync counts on a shared disk."""
    found = _OF_RANK.search(name)
    return int(found.group(1)) if found else 0


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
