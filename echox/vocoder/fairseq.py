"""Converts a code HiFi-GAN of fairseq (`g_*` and its config) to a vocoder folder, without executing anything in it.

fairseq keeps the generator as a pickle of weight-normed tensors under its own names. The pickle is read with torch's
reader of plain tensors alone, every tensor is given its place or refused by name, and weight norm is folded:
weight = g · v / ‖v‖, the norm over all dimensions but the first.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.errors import DataError
from echox.files import open_regular, read_json
from echox.vocoder.shape import DURATION_KERNEL, HifiGanShape

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2 << 30
"""Bytes of a checkpoint; that of 13 million weights has 54 MB."""
SPEAKERS = 200
"""Rows of the table of speakers where the configuration names no number, as in fairseq."""
_FIX = "Give the g_* file of a fairseq code HiFi-GAN with its duration predictor, and the config.json beside it."
_MOST_NAMED = 20
_RENAMED = (
    (r"unit_embedding\.", "dict."),
    (r"speaker_embedding\.", "spkr."),
    (r"dur_predictor\.(conv\d)\.", r"dur_predictor.\1.0."),
    (r"hifi_gan\.upsampler\.", "ups."),
    (r"hifi_gan\.", ""),
)


def convert(checkpoint: Path, config: Path, speaker: int | None = None) -> tuple[HifiGanShape, dict[str, Tensor]]:
    """The shape of a fairseq code HiFi-GAN, and its weights under transformers' names.

    Args:
        checkpoint: the `g_*` file: `torch.save({"generator": state})`.
        config: its `config.json`.
        speaker: which voice of a model of several alone; None keeps all that there are.

    Raises:
        DataError: a file cannot be read, or the two are not what transformers' class can compute; all reasons at once.
    """
    settings = _settings(config)
    shape, problems = read_config(settings)
    problems += _speaker_problems(shape, speaker)
    state = read_generator(checkpoint)
    weights: dict[str, Tensor] = {}
    if not any(shape.mistakes()) and not any(shape.misfits()):
        weights, more = rename(state, shape, checkpoint.stat().st_size)
        problems += more
    if problems:
        said = "; ".join(problems[:_MOST_NAMED])
        more_of_them = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise DataError(f"The vocoder cannot be imported: {said}{more_of_them}", where=str(checkpoint), fix=_FIX)
    if speaker is not None:
        weights["speaker_embedding.weight"] = weights["speaker_embedding.weight"][speaker : speaker + 1].clone()
        shape = replace(shape, speakers=1)
    return shape, weights


def read_config(settings: Mapping[str, Any]) -> tuple[HifiGanShape, list[str]]:
    """Sizes in a fairseq configuration, and what it asks for that transformers' class cannot compute, a clause each."""
    several = bool(settings.get("multispkr"))
    duration = settings.get("dur_predictor_params")
    duration = duration if isinstance(duration, Mapping) else {}
    width = settings.get("embedding_dim")
    default = HifiGanShape()
    shape = HifiGanShape(
        units=settings.get("num_embeddings", 0),
        embedding=0 if width is None else width,
        speaker=width if several and type(width) is int else 0,
        speakers=settings.get("num_speakers", SPEAKERS) if several else 1,
        rates=_listed(settings.get("upsample_rates")),
        kernels=_listed(settings.get("upsample_kernel_sizes")),
        channels=settings.get("upsample_initial_channel", 0),
        resblock_kernels=_listed(settings.get("resblock_kernel_sizes")),
        resblock_dilations=tuple(map(_listed, _listed(settings.get("resblock_dilation_sizes")))),
        dropout=duration.get("var_pred_dropout", default.dropout),
        sample_rate=settings.get("sampling_rate", 0),
    )
    problems = list(shape.mistakes())
    if not problems:
        problems += shape.misfits()
        problems += _contradictions(settings, shape)
    problems += _unsupported(settings, duration, width)
    return shape, problems


def _unsupported(settings: Mapping[str, Any], duration: Mapping[str, Any], width: object) -> Iterator[str]:
    """Parts of fairseq's generator that transformers' class does not have."""
    if settings.get("f0") or settings.get("f0_quant_num_bin"):
        yield "it takes a pitch (f0)"
    if settings.get("embedder_params"):
        yield "it takes the vector of a speaker embedder (embedder_params)"
    if str(settings.get("resblock", "1")) != "1":
        yield f"its resblock is {settings['resblock']!r:.20}, not 1"
    if not duration:
        yield "it predicts no durations (dur_predictor_params)"
        return
    if duration.get("var_pred_hidden_dim", width) != width:
        yield f"var_pred_hidden_dim is {duration['var_pred_hidden_dim']!r:.20}, other than embedding_dim"
    if duration.get("var_pred_kernel_size", DURATION_KERNEL) != DURATION_KERNEL:
        yield f"var_pred_kernel_size is {duration['var_pred_kernel_size']!r:.20}, not {DURATION_KERNEL}"


def _contradictions(settings: Mapping[str, Any], shape: HifiGanShape) -> Iterator[str]:
    """Sizes that the configuration gives twice, differently."""
    wanted = {"model_in_dim": shape.embedding + shape.speaker, "code_hop_size": shape.hop}
    for name, size in wanted.items():
        if settings.get(name, size) != size:
            yield f"{name} is {settings[name]!r:.20}, where the other sizes make {size}"


def _speaker_problems(shape: HifiGanShape, speaker: int | None) -> Iterator[str]:
    if speaker is None or any(shape.mistakes()):
        return
    if not shape.speaker:
        yield "it has one voice, so no speaker can be chosen"
    elif not 0 <= speaker < shape.speakers:
        yield f"it has no speaker {speaker}: its {shape.speakers} have the numbers from 0"


def read_generator(checkpoint: Path) -> dict[str, Any]:
    """What lies under `generator` in a checkpoint: name to tensor.

    Raises:
        DataError: it cannot be read as plain tensors; nothing in it was executed.
    """
    import pickle

    import torch

    try:
        with open_regular(checkpoint) as descriptor, open(descriptor, "rb", closefd=False) as file:
            _check_archive(checkpoint, file)
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
        state = found.get("generator") if isinstance(found, dict) else None
        if not isinstance(state, dict) or not state:
            raise ValueError("it has no tensors under `generator`")
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        said = "it holds something other than plain tensors, and nothing in it was executed"
        raise DataError(f"The checkpoint cannot be read: {said}", where=str(checkpoint), fix=_FIX) from error
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, LookupError, AttributeError) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0][:200]
        raise DataError(f"The checkpoint cannot be read: {said}", where=str(checkpoint), fix=_FIX) from error
    return {str(name): tensor for name, tensor in state.items()}


def _check_archive(checkpoint: Path, file: Any) -> None:
    """Raise ValueError unless it is a ZIP file as torch writes it, whose members are no longer than it."""
    size = checkpoint.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MiB")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no file that torch.save has written since version 1.6")
    members = zipfile.ZipFile(file).infolist()
    if any(each.compress_type != zipfile.ZIP_STORED for each in members):
        raise ValueError("its members are compressed, which torch.save does not do")
    if sum(each.file_size for each in members) > size:
        raise ValueError("its members claim to be longer than the file")


def rename(state: Mapping[str, Any], shape: HifiGanShape, size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under transformers' names, folded; and what is unknown, missing or of another shape, a clause each.

    Args:
        state: fairseq's tensors.
        shape: what its configuration says.
        size: bytes of the file; a network of more weights is not built.
    """
    import torch

    shapes = {name: tuple(tensor.shape) for name, tensor in shape.build("meta").state_dict().items()}
    claimed = sum(torch.Size(shape).numel() for shape in shapes.values())
    if claimed > size:
        return {}, [f"the configuration describes {claimed:,} weights, and the file has {size:,} bytes"]
    weights: dict[str, Tensor] = {}
    problems: list[str] = []
    taken: set[str] = set()
    for name, size_of in shapes.items():
        if not torch.Size(size_of).numel():
            weights[name] = torch.zeros(size_of)
            continue
        parts = _parts(name, size_of)
        taken |= parts.keys()
        wrong = [clause for part, wanted in parts.items() for clause in _wrong(state, part, wanted)]
        problems += wrong
        if not wrong:
            weights[name] = _folded([state[part].float() for part in parts])
    problems += [f"{name!r:.80} is unknown" for name in sorted(state.keys() - taken)]
    return weights, problems


def _parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """fairseq's tensors behind one of transformers', with their shapes."""
    theirs = name
    for pattern, put in _RENAMED:
        theirs = re.sub(rf"^{pattern}", put, theirs)
    if not (name.startswith("hifi_gan.") and name.endswith(".weight")):
        return {theirs: shape}
    return {f"{theirs}_g": (shape[0], *(1 for _ in shape[1:])), f"{theirs}_v": shape}


def _wrong(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[str]:
    import torch

    tensor = state.get(name)
    if tensor is None:
        yield f"{name} is missing"
    elif not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        yield f"{name} is no tensor of floating-point numbers"
    elif tuple(tensor.shape) != shape:
        yield f"{name} is {list(tensor.shape)}, not {list(shape)}"
    elif not tensor.isfinite().all():
        yield f"{name} has numbers that are not finite"


def _folded(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0].clone()
    magnitude, direction = parts
    norm = direction.flatten(1).norm(dim=1).reshape(magnitude.shape)
    folded: Tensor = magnitude * direction / norm
    return folded


def _settings(config: Path) -> Mapping[str, Any]:
    try:
        settings = read_json(config)
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"The configuration cannot be read: {said}", where=str(config), fix=_FIX) from error
    return settings


def _listed(value: Any) -> Any:
    """A list as a tuple; anything else as it is, for the shape to refuse."""
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) else (value,)
