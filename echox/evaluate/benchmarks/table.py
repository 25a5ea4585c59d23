"""Formats the scores of benchmarks, for a terminal and the page: ours with their judge, then published ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from echox.config.languages import ENGLISH
from echox.evaluate.benchmarks.catalogue import PUBLISHED_JUDGE
from echox.evaluate.columns import Column, aligned, in_language, percent

COLUMNS = (
    Column("n", "n", "Number of questions."),
    Column("s2t", "S2T", "An accepted answer stands in the model's own text."),
    Column("s2s", "S2S", "The judge hears an accepted answer in the speech; with its 95 % interval (Wilson)."),
    Column("cascade", "cascade", "The same when the frozen T2C teacher speaks the text: the trivial way to speak."),
    Column("retention", "retention", "S2S over S2T, under the same judge."),
    Column("retention_paired", "paired", "Of the answers right in text, the share right in speech."),
    Column("chance_s2t", "chance S2T", "S2T when each answer is given to another question (fixed seed)."),
    Column("chance_s2s", "chance S2S", "S2S when each answer is given to another question (fixed seed)."),
    Column("wer", "WER", "Word error rate of what is heard against the model's own text, both normalised."),
    Column("silent", "silent", "Answers in which nothing is heard; they are never right."),
    Column("seconds", "s/answer", "Seconds of speech an answer."),
    Column("failed", "failed", "Answers with a segment that did not end or had no units."),
    Column(
        "dnsmos_ovrl",
        "DNSMOS",
        "How it sounds: the opinion from 1 to 5 that DNSMOS P.835 predicts; of so many answers.",
    ),
    Column("dnsmos_sig", "sig", "The same of the speech alone."),
    Column("dnsmos_bak", "bak", "The same of what is behind it; 5 is silence."),
    Column("dnsmos_p808", "P.808", "The whole, by the network that was trained on P.808 listening tests."),
)


def cell(key: str, row: Mapping[str, Any]) -> str:
    """One score as people read it."""
    value = row.get(key)
    if value is None:
        return "–"
    if key == "n":
        return str(value)
    if key == "seconds":
        return f"{value:.1f}"
    if key.startswith("dnsmos"):
        return f"{value:.2f} of {row['dnsmos_n']}" if key == "dnsmos_ovrl" else f"{value:.2f}"
    shown = f"{value:.2f}" if key.startswith("retention") else percent(value)
    if key == "s2s" and row.get("s2s_interval_95"):
        low, high = (100 * end for end in row["s2s_interval_95"])
        return f"{shown} [{low:.1f}–{high:.1f}]"
    return shown


def spread(key: str, repeated: Mapping[str, Any]) -> str:
    """Mean ± standard deviation of a score of repeated runs."""
    value = repeated.get(key)
    if not value or value["mean"] is None:
        return "–"
    factor, unit = (1.0, "") if key in ("seconds", "retention", "dnsmos_ovrl") else (100.0, " %")
    sd = "–" if value["sd"] is None else f"{factor * value['sd']:.2f}"
    return f"{factor * value['mean']:.2f} ± {sd}{unit}"


def row_name(row: Mapping[str, Any]) -> str:
    """Decoding and, where random numbers were drawn, their seed."""
    return f"{row['decoding']}, seed {row['seed']}" if row["temperature"] else str(row["decoding"])


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The results as a table for a terminal, benchmark by benchmark."""
    judge, columns = results["judge"], in_language(COLUMNS, results.get("language") or ENGLISH)
    for name, found in results["benchmarks"].items():
        heads = [f"{name}, judge {judge}", *(column.label for column in columns)]
        rows = [[row_name(row), *(cell(column.key, row) for column in columns)] for row in found["runs"]]
        if found["repeated"]:
            count = found["repeated"]["runs"]
            rows.append([f"mean ± sd of {count}", *(spread(column.key, found["repeated"]) for column in columns)])
        yield from (line.rstrip() for line in aligned([heads, *rows]))
        if found["published"]:
            shown = ", ".join(f"{each['system']} {percent(each['s2s'])}" for each in found["published"])
            yield f"published S2S, judge {PUBLISHED_JUDGE}, not comparable under another judge: {shown}"
    if len(results["benchmarks"]) > 1:
        all_ = results["pooled"]
        yield f"all {all_['n']} questions: S2S {cell('s2s', all_)}, S2T {percent(all_['s2t'])}; " + (
            f"mean of the benchmarks {percent(all_['average_s2s'])}, judge {judge}"
        )
