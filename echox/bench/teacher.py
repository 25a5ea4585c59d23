"""Measures the teacher's greedy decode alone: the slow oracle against the static steps, and their words compared."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from echox.bench.counting import Operators
from echox.bench.imposed import words_of
from echox.bench.oracle import as_hugging_face, dynamic_greedy, generate_alone
from echox.bench.techniques import technique
from echox.errors import EchoXError
from echox.models.greedy import DecodedUnits
from echox.models.ragged import JoinedRows
from echox.models.t2c import T2CDecoder

if TYPE_CHECKING:
    from echox.config.model_schema import T2cConfig

ALONE = 4
"""Rows that are decoded one by one: the rate of words is that of any number."""
COUNTED_WORDS = 33
COMPARED_ROWS, COMPARED_WORDS = 16, 32
"""Rows and their first words whose equality is asserted, in float32: of many more, two may be as good as each other."""


@dataclass(frozen=True)
class TeacherRow:
    """One way to decode.

    Attributes:
        name: of the way.
        ms: of the decode, the best of a few.
        words_s: words a second.
        kernels, syncs: of a step of one word, counted on a few words; None under a graph, where a step is one launch.
        same_words: whether all words were those of the oracle, in float32.
    """

    name: str
    ms: float
    words_s: float
    kernels: float | None
    syncs: float | None
    same_words: bool


@dataclass(frozen=True)
class _Way:
    name: str
    decode: Callable[[T2CDecoder, JoinedRows, Tensor], DecodedUnits]
    switches: tuple[str, ...] = ()
    rows: int | None = None
    counted: bool = True


def random_teacher(config: T2cConfig, width: int, words: int, dtype: torch.dtype) -> T2CDecoder:
    """A decoder of a recipe's shape with random weights that never says its end, on the default device."""
    from echox.builders.stages import build_t2c

    table = nn.Embedding(16, width, dtype=dtype)
    nn.init.normal_(table.weight, std=0.02)
    decoder = build_t2c(config, words=words, text_table=table).eval().requires_grad_(False)
    nn.init.zeros_(decoder.head.weight[decoder.text_classes + decoder.end])
    return decoder


def random_text(decoder: T2CDecoder, rows: int, tokens: int, seed: int = 0) -> tuple[JoinedRows, Tensor]:
    """Left-padded text parts of up to so many tokens, and the length of each."""
    generator = torch.Generator().manual_seed(seed)
    width, weight = decoder.projection.in_features, decoder.projection.weight
    lengths_N = torch.randint(max(1, tokens // 2), tokens + 1, (rows,), generator=generator)
    lengths_N[0] = tokens
    values = torch.randn(rows, tokens, width, generator=generator) * 0.02
    mask_NL = torch.arange(tokens)[None] >= tokens - lengths_N[:, None]
    text = JoinedRows(values.to(weight.device, weight.dtype), mask_NL.to(weight.device), [])
    return text, lengths_N.to(weight.device)


def measure_teacher(
    decoder: T2CDecoder, text: JoinedRows, tokens_N: Tensor, words_per_token: float, *, repeats: int = 3
) -> list[TeacherRow]:
    """A row for each way to decode that there is on the decoder's device.

    Args:
        decoder: in eval mode; where it never says its end, rows have the lengths of `imposed`.
        text, tokens_N: text parts, and how many tokens each has.
        words_per_token: words a text token.
        repeats: timed runs of each.

    Raises:
        EchoXError: a way says other words than the oracle.
    """
    starts_NS = _starts(decoder, text)
    limit_N = words_of(tokens_N, words_per_token)
    ways = _ways(decoder, starts_NS)
    exact = copy.deepcopy(decoder).float()
    return [_measure(way, ways[0], decoder, exact, text, limit_N, repeats) for way in ways]


def _ways(decoder: T2CDecoder, starts_NS: Tensor | None) -> list[_Way]:
    def of(text: JoinedRows) -> Tensor | None:
        return None if starts_NS is None else starts_NS[: len(text.mask_BL)]

    def static(decoder: T2CDecoder, text: JoinedRows, limit_N: Tensor) -> DecodedUnits:
        return decoder.greedy(text, limit_N, of(text))

    def growing(decoder: T2CDecoder, text: JoinedRows, limit_N: Tensor) -> DecodedUnits:
        return dynamic_greedy(decoder, text, limit_N, of(text))

    gpu = decoder.head.weight.is_cuda
    ways = [_Way("a cache that grows, all rows", growing)]
    if not decoder._places_text and not decoder.text_classes:
        ways.append(_Way("generate of transformers, row by row", _generate(), rows=ALONE))
    ways.append(_Way("static steps, all rows to the end", static, ("graph", "rows leave the decode")))
    ways.append(_Way("static steps", static, ("graph",)))
    if gpu:
        ways.append(_Way("static steps in a graph", static, counted=False))
    return ways


def _generate() -> Callable[[T2CDecoder, JoinedRows, Tensor], DecodedUnits]:
    models: dict[int, Any] = {}

    def generate(decoder: T2CDecoder, text: JoinedRows, limit_N: Tensor) -> DecodedUnits:
        if id(decoder) not in models:
            models[id(decoder)] = as_hugging_face(decoder)
        rows = [
            generate_alone(decoder, models[id(decoder)], text, row, limit) for row, limit in enumerate(limit_N.tolist())
        ]
        longest = max(1, *(len(words) for words, _ in rows))
        words_NM = torch.tensor([[*words, *[decoder.pad] * (longest - len(words))] for words, _ in rows])
        words_NM = words_NM.to(limit_N.device)
        ended_N = torch.tensor([ended for _, ended in rows], device=limit_N.device)
        return DecodedUnits(words_NM, words_NM != decoder.pad, ended_N)

    return generate


def _measure(
    way: _Way,
    oracle: _Way,
    decoder: T2CDecoder,
    exact: T2CDecoder,
    text: JoinedRows,
    limit_N: Tensor,
    repeats: int,
) -> TeacherRow:
    rows = way.rows or len(limit_N)
    asked, limit_N = JoinedRows(text.values_BLh[:rows], text.mask_BL[:rows], []), limit_N[:rows]
    with _without(way.switches):
        _compare(way, oracle, exact, asked, limit_N)
        kernels, syncs = _a_step(way, decoder, asked, limit_N) if way.counted else (None, None)
        seconds = []
        for _ in range(repeats + 1):
            _finish(limit_N)
            before = time.perf_counter()
            way.decode(decoder, asked, limit_N)
            _finish(limit_N)
            seconds.append(time.perf_counter() - before)
    best = min(seconds[1:])
    return TeacherRow(way.name, best * 1e3, int(limit_N.sum()) / best, kernels, syncs, True)


def _compare(way: _Way, oracle: _Way, exact: T2CDecoder, text: JoinedRows, limit_N: Tensor) -> None:
    """Raise EchoXError unless the first words of all rows are the oracle's, computed in float32."""
    text = JoinedRows(text.values_BLh[:COMPARED_ROWS].float(), text.mask_BL[:COMPARED_ROWS], [])
    limit_N = limit_N[:COMPARED_ROWS].clamp(max=COMPARED_WORDS)
    found, wanted = (each.decode(exact, text, limit_N) for each in (way, oracle))
    same = found.words_NM.shape == wanted.words_NM.shape and all(
        bool(torch.equal(one, other)) for one, other in zip(found[:3], wanted[:3], strict=True)
    )
    if not same:
        raise EchoXError(
            f"'{way.name}' does not say the words of '{oracle.name}'", fix="do not trust its time; compare the two"
        )


def _a_step(way: _Way, decoder: T2CDecoder, text: JoinedRows, limit_N: Tensor) -> tuple[float, float]:
    """Kernels and syncs of a word: what more words cost, over how many steps more were made."""
    counts = []
    for most in (1, COUNTED_WORDS):
        with Operators() as operators:
            way.decode(decoder, text, torch.full_like(limit_N, most))
        counts.append((operators.kernels, operators.syncs))
    steps = (COUNTED_WORDS - 1) * (way.rows or 1)
    (kernels, syncs), (more_kernels, more_syncs) = counts
    return (more_kernels - kernels) / steps, (more_syncs - syncs) / steps


def _without(names: Sequence[str]) -> ExitStack:
    stack = ExitStack()
    for name in names:
        stack.enter_context(technique(name).off(None, None))
    return stack


def _starts(decoder: T2CDecoder, text: JoinedRows) -> Tensor | None:
    """Characters before each position, four a token, where the decoder wants them."""
    if decoder.units_per_character is None:
        return None
    size = text.mask_BL.shape[1]
    return (4.0 * torch.arange(size, device=text.mask_BL.device)).expand(len(text.mask_BL), -1)


def _finish(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def table(name: str, rows: Sequence[TeacherRow]) -> str:
    """The rows as Markdown."""
    lines = [
        f"### {name}",
        "",
        "| decode | ms | words/s | kernels a step | syncs a step | words |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        kernels = "1 launch" if row.kernels is None else f"{row.kernels:.4g}"
        syncs = "1/16" if row.syncs is None else f"{row.syncs:.3g}"
        lines.append(f"| {row.name} | {row.ms:,.0f} | {row.words_s:,.0f} | {kernels} | {syncs} | the same |")
    return "\n".join(lines)
