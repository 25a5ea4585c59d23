"""`python -m launch.job.cluster_check`: asks every node of a Ray cluster what a run would ask it at its start."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from echox.config.paths import model_place, storage_folder
from echox.engine.start_check import NodeReport, compare, report_node
from echox.engine.storage_proof import place_of, proof_name, seen, written

RESULT = "RESULT "
"""How the line begins that holds the result as JSON."""
ASK_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, compare and print; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m launch.job.cluster_check")
    parser.add_argument("--storage", help="folder or object store that all nodes have to share")
    parser.add_argument("--model", action="append", default=[], help="model that all nodes have to have")
    args = parser.parse_args(argv)
    nodes, problems = ask(args.storage, args.model)
    for node in nodes:
        gpus = ", ".join(f"{count} x {name}" for name, count in node["gpus"].items()) or "no GPU"
        free = "" if node["free"] is None else f", {node['free'] / 2**30:.0f} GiB left on the storage"
        versions = " ".join(f"{name} {version}" for name, version in sorted(node["versions"].items()))
        print(f"ok    {node['host']}: {node['cpus']:g} CPUs, {gpus}{free}; code {node['code']}; {versions}")
    for problem in problems:
        print(f"FAIL  {problem}")
    print(RESULT + json.dumps({"nodes": nodes, "problems": problems}))
    return 1 if problems else 0


def ask(storage: str | None, models: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """What the nodes say, and what is wrong with them; one that does not answer is wrong."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False)
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = _names(alive)
    nonce, problems = uuid.uuid4().hex, []
    place = None if storage is None else place_of(storage)
    if place is not None and (unwritten := written(place, nonce, 0)):
        problems += unwritten
        storage = place = None
    task = ray.remote(num_cpus=0, max_retries=1)(_asked)
    asked = {}
    for number, node in enumerate(alive, 1):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = task.options(scheduling_strategy=there).remote(number, storage, nonce, list(models))
        asked[reference] = (number, node)
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
    found: list[dict[str, Any]] = []
    reports: list[NodeReport] = []
    for reference in sorted(done, key=lambda each: asked[each][0]):
        number, node = asked[reference]
        name = names[node["NodeID"]]
        try:
            report, gpus = ray.get(reference)
        except Exception as error:  # whatever a node raises is what is wrong with it
            problems.append(f"{name}: cannot be asked: {str(error).strip().splitlines()[-1][:200]}")
            continue
        report = replace(report, host=name, problems=[f"{name}: {problem}" for problem in report.problems])
        if place is not None and not report.problems and not seen(place, nonce, number):
            problems.append(f"what {name} writes to {storage} cannot be read on {socket.gethostname()}")
        reports.append(report)
        found.append({**asdict(report), "cpus": node["Resources"].get("CPU", 0.0), "gpus": gpus})
    problems += [f"{names[asked[each][1]['NodeID']]}: does not answer in {ASK_S:.0f} s" for each in late]
    if place is not None:
        for number in range(len(alive) + 1):
            place.remove(proof_name(nonce, number))
    return found, problems + compare(reports)


def _asked(number: int, storage: str | None, nonce: str, models: list[str]) -> tuple[NodeReport, dict[str, int]]:
    """Runs on a node: its report, and its GPUs by name."""
    import torch

    problems: list[str] = []
    if storage is not None:
        place = place_of(storage)
        if seen(place, nonce, 0):
            problems += written(place, nonce, number)
        else:
            problems.append(f"what the head writes to {storage} cannot be read here: it is no place that nodes share")
    names = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    places = {model: model_place(model) for model in models}
    report = report_node(number, storage_folder(storage or "."), places, gpus=bool(names))
    return replace(report, problems=problems), {name: names.count(name) for name in dict.fromkeys(names)}


def _names(nodes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A name of each node: its host's, with the beginning of its id where several are on one host."""
    hosts = [node["NodeManagerHostname"] for node in nodes]
    return {
        node["NodeID"]: host if hosts.count(host) == 1 else f"{host} ({node['NodeID'][:6]})"
        for node, host in zip(nodes, hosts, strict=True)
    }


if __name__ == "__main__":
    sys.exit(main())
