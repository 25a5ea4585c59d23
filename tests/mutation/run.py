"""Runs the tests against mutants of the science, and tells which changes no test notices (`make mutate`).

A copy of the project is made in a temporary folder, so that nobody's working tree is touched. One run of the tests over
it records which test executes which line. Then a process that has imported torch and its like, but nothing of the
project, forks once for each mutant; the child puts the mutated module in place as it is imported, and runs the tests
that execute the changed line until one fails. Why not mutmut 3: it leaves out every decorated function, here all under
`torch.no_grad`. Why not cosmic-ray: a new interpreter for each mutant imports torch again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from tests.mutation.mutants import Mutant, mutants_of, rewritten

ROOT = Path(__file__).resolve().parents[2]
NAMED = Path(__file__).with_name("named.yaml")
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")
MODULES = (
    *(f"echox/stages/{name}.py" for name in ("echo", "losses", "s2t", "t2c")),
    *(f"echox/models/{name}.py" for name in ("chunked_heads", "echo", "t2c", "s2t", "ragged")),
    "echox/units/language.py",
    "echox/speak/pipeline.py",
    *(f"echox/evaluate/{name}.py" for name in ("text", "spoken", "scores")),
)
TESTS = (
    *("tests/stages", "tests/builders/test_build_stage.py", "tests/speak/test_pipeline.py"),
    *(f"tests/models/test_{name}.py" for name in ("echo", "t2c", "s2t", "ragged", "padded_rows", "history")),
    *("tests/units/test_language.py", "tests/units/test_language_fit.py"),
    *(f"tests/evaluate/test_{name}.py" for name in ("text", "spoken", "scores")),
)
OURS = ("echox", "launch", "shards", "tests")
SLOWEST_S = 15.0
"""A test that takes more processor time is left to the default suite."""
_IN_COPY = "ECHOX_MUTATION_COPY"
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Select mutants, run the tests against each, write `mutants.json` and print a table."""
    args = _arguments()
    modules = [module for module in MODULES if not args.modules or any(part in module for part in args.modules)]
    mutants = {module: mutants_of(module, (ROOT / module).read_text(encoding="utf-8")) for module in modules}
    every = [mutant for found in mutants.values() for mutant in found] + list(named(args.modules))
    known = equivalents()
    for entry in known.keys() - {key(mutant) for mutant in every}:
        if entry[0] in modules and _IN_COPY not in os.environ:
            print(f"{EQUIVALENT.name}: no such mutant any more: {' | '.join(entry)}")
    chosen = sorted((m for m in every if key(m) not in known), key=lambda mutant: mutant.rank(str(args.seed)))
    if args.only:
        chosen = [mutant for mutant in chosen if mutant.id in args.only]
    if args.limit:
        chosen = chosen[: args.limit + sum(mutant.operator == "named" for mutant in chosen)]
    if args.list:
        for mutant in chosen:
            print(f"{mutant.id} {mutant.module}:{mutant.lines[0]} [{mutant.operator}] {mutant.change}")
        return 0
    if _IN_COPY not in os.environ:
        return _run_in_copy()
    return _run(chosen, args)


def key(mutant: Mutant) -> tuple[str, str, str]:
    """What an entry of `equivalent.yaml` names; of changes that read the same on one line, the second has ` #2`."""
    return mutant.module, mutant.line, f"{mutant.change} #{mutant.nth + 1}" if mutant.nth else mutant.change


def named(parts: Iterable[str] | None) -> Iterator[Mutant]:
    """Mutants of `named.yaml`; one whose text is gone is left out with a line."""
    for entry in yaml.safe_load(NAMED.read_text(encoding="utf-8")):
        if parts and not any(part in entry["module"] for part in parts):
            continue
        try:
            yield rewritten(source=(ROOT / entry["module"]).read_text(encoding="utf-8"), **entry)
        except ValueError as error:
            print(f"{NAMED.name}: {entry['name']}: {error}")


def equivalents() -> dict[tuple[str, str, str], str]:
    """Mutants that no test can or should notice, and why."""
    entries = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or []
    return {(entry["module"], entry["line"], change): entry["why"] for entry in entries for change in entry["changes"]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--modules", nargs="*", help="parts of module paths, as stages/ or models/t2c; default all")
    parser.add_argument("--limit", type=int, default=0, help="most generated mutants; 0: all of them")
    parser.add_argument("--seed", type=int, default=0, help="which mutants a limit selects")
    parser.add_argument("--only", nargs="*", help="ids of mutants, as the table and the list name them")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--minutes", type=float, default=0, help="begin no further mutant after so long; 0: no end")
    parser.add_argument("--list", action="store_true", help="print the selected mutants and run nothing")
    default = Path(tempfile.gettempdir()) / "echox-mutation"
    parser.add_argument("--out", type=Path, default=default, help="folder of mutants.json, outside the repository")
    return parser.parse_args()


def _run_in_copy() -> int:
    """The same command in a copy of what git tracks or would track."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    with tempfile.TemporaryDirectory(prefix="echox-mutation-") as folder:
        for name in names:
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        environment = {**os.environ, _IN_COPY: folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
        command = [sys.executable, "-m", "tests.mutation.run", *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


# In a child ---------------------------------------------------------------------------------------------------------


class _Mutated(importlib.machinery.SourceFileLoader):
    """Imports one module from a syntax tree in place of its file."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def get_code(self, fullname: str) -> Any:
        return compile(self._tree, self.path, "exec")


class _Finder:
    """Finds the mutated module, and leaves all others to those behind it."""

    def __init__(self, mutant: Mutant, tree: ast.Module) -> None:
        self._name = mutant.module.removesuffix(".py").replace("/", ".")
        self._path, self._tree = str(ROOT / mutant.module), mutant.apply(tree)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        loader = _Mutated(name, self._path, self._tree)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


class _Selection:
    """Keeps the tests named, quick ones first, and writes down the first that fails."""

    def __init__(self, order: dict[str, float], killer: Path) -> None:
        self._order, self._killer = order, killer

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self._order), key=self._cost)

    def _cost(self, item: pytest.Item) -> float:
        return self._order[item.nodeid]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._killer.write_text(report.nodeid)


class _Recorder:
    """Records which test executes which lines of the modules, how much processor time it takes and whether it passes.

    What a fixture executes counts for every test of the file, since the first test alone may set it up.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._files = {str(ROOT / module): module for module in modules}
        self.lines: dict[str, set[str]] = {}
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self._now = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        with self._traced(item.nodeid.partition("::")[0]):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        began = time.process_time()
        with self._traced(item.nodeid):
            try:
                return (yield)
            finally:
                self.seconds[item.nodeid] = time.process_time() - began

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)

    @contextlib.contextmanager
    def _traced(self, name: str) -> Iterator[None]:
        self._now = name
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        place = f"{self._files[frame.f_code.co_filename]}:{frame.f_lineno}"
        self.lines.setdefault(place, set()).add(self._now)
        return self._line


def _pytest(arguments: list[str], plugin: object) -> int:
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-W", "ignore"]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))


def _fork(work: Any, log: Path) -> int:
    """Process id of a child that does the work and exits with its result, in a process group of its own."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a run that is ended leaves no tests behind
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 99
    try:
        sys.modules.pop("tests.mutation.run", None)
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


# In the parent ------------------------------------------------------------------------------------------------------


def _run(chosen: list[Mutant], args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    record = _baseline(args.out, {mutant.module for mutant in chosen})
    if record["failed"]:
        print(f"left out, as they fail or are skipped without a mutant: {', '.join(sorted(record['failed']))}")
    for name in record["imported"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    print(f"{len(chosen)} mutants, {len(record['seconds'])} tests; warm after {time.monotonic() - began:.0f} s")
    results: dict[str, dict[str, Any]] = {}
    trees = {m: ast.parse((ROOT / m).read_text(encoding="utf-8")) for m in {mutant.module for mutant in chosen}}
    waiting, running = list(chosen), {}
    while waiting or running:
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            waiting = []
        while waiting and len(running) < args.jobs:
            mutant = waiting.pop(0)
            tests = _tests_of(mutant, record)
            if not tests:
                results[mutant.id] = _result(mutant, "survived", "no test executes it", 0, 0.0)
                continue
            killer = args.out / f"{mutant.id}.killer"
            killer.unlink(missing_ok=True)
            child = _start(mutant, trees[mutant.module], tests, killer)
            limit = 60 + 8 * sum(tests.values())  # of wall time, on cores that others use too
            running[child] = (mutant, tests, killer, time.monotonic(), limit)
        for child, (mutant, tests, killer, start, limit) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - start
            if not done and seconds < limit:
                continue
            if not done:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                verdict, by = "caught", "time limit"
            elif os.WIFSIGNALED(status):
                verdict, by = "caught", f"signal {os.WTERMSIG(status)}"
            else:
                code = os.WEXITSTATUS(status)
                verdict = "survived" if code == 0 else "caught"
                by = killer.read_text() if killer.exists() else ("" if code == 0 else f"pytest exit {code}")
            killer.unlink(missing_ok=True)
            killer.with_suffix(".log").unlink(missing_ok=True)
            del running[child]
            results[mutant.id] = _result(mutant, verdict, by, len(tests), seconds)
            _save(results, args)
            mark = "." if verdict == "caught" else f"\nsurvived {mutant.id} {_where(mutant)}\n"
            print(mark, end="", flush=True)
        time.sleep(0.02)
    _save(results, args)
    _report(list(results.values()), args, time.monotonic() - began)
    return 0


def _baseline(out: Path, modules: set[str]) -> dict[str, Any]:
    """One run of the tests without a mutant, in a child, so that this process stays without the project's modules."""
    file = out / "baseline.json"
    file.unlink(missing_ok=True)

    def work() -> int:
        recorder = _Recorder(modules)
        code = _pytest([name for name in TESTS if (ROOT / name).exists()], recorder)
        outer = sorted(name for name in sys.modules if name.partition(".")[0] not in (*OURS, "__main__"))
        found = {
            "lines": {place: sorted(tests) for place, tests in recorder.lines.items()},
            "seconds": recorder.seconds,
            "failed": sorted(recorder.failed),
            "imported": outer,
        }
        file.write_text(json.dumps(found))
        return code

    os.waitpid(_fork(work, out / "baseline.log"), 0)
    if not file.exists():
        raise SystemExit(f"the tests did not run; see {out / 'baseline.log'}")
    record: dict[str, Any] = json.loads(file.read_text())
    record["failed"] = set(record["failed"])
    by_file: dict[str, list[str]] = {}
    for test in record["seconds"]:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    record["by_file"] = by_file
    return record


def _tests_of(mutant: Mutant, record: dict[str, Any]) -> dict[str, float]:
    """Tests that execute the changed statement, or for what runs at import, all beside one that uses the module."""
    first, last = mutant.lines
    if mutant.in_function:
        places = [f"{mutant.module}:{line}" for line in range(first, last + 1)]
    else:
        places = [place for place in record["lines"] if place.startswith(f"{mutant.module}:")]
    names = {name for place in places for name in record["lines"].get(place, ())}
    if not mutant.in_function:
        names = {name.partition("::")[0] for name in names}
    tests = {test for name in names for test in ([name] if "::" in name else record["by_file"].get(name, ()))}
    seconds = {test: record["seconds"][test] for test in tests if test in record["seconds"]}
    seconds = {test: taken for test, taken in seconds.items() if test not in record["failed"]}
    return {test: taken for test, taken in seconds.items() if taken < SLOWEST_S}


def _start(mutant: Mutant, tree: ast.Module, tests: dict[str, float], killer: Path) -> int:
    def work() -> int:
        sys.meta_path.insert(0, _Finder(mutant, tree))
        files = sorted({test.partition("::")[0] for test in tests})
        return _pytest(["-x", *files], _Selection(tests, killer))

    return _fork(work, killer.with_suffix(".log"))


def _where(mutant: Mutant) -> str:
    return f"{mutant.module}:{mutant.lines[0]} [{mutant.operator}] {mutant.change}"


def _result(mutant: Mutant, verdict: str, by: str, tests: int, seconds: float) -> dict[str, Any]:
    return {
        "id": mutant.id,
        "module": mutant.module,
        "line": mutant.line,
        "number": mutant.lines[0],
        "operator": mutant.operator,
        "change": key(mutant)[2],
        "verdict": verdict,
        "by": by,
        "tests": tests,
        "seconds": round(seconds, 2),
    }


def _save(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    content = {"seed": args.seed, "results": list(results.values())}
    (args.out / "mutants.json").write_text(json.dumps(content, indent=1) + "\n")


def _report(results: list[dict[str, Any]], args: argparse.Namespace, seconds: float) -> None:
    count = Counter((result["module"], result["verdict"]) for result in results)
    print(f"\n\n{'module':32} {'mutants':>8} {'caught':>7} {'share':>7}")
    for module in (*sorted({module for module, _ in count}), "all"):
        caught, left = (
            sum(number for (name, kind), number in count.items() if kind == verdict and module in (name, "all"))
            for verdict in ("caught", "survived")
        )
        if caught + left:
            print(f"{module:32} {caught + left:8} {caught:7} {caught / (caught + left):7.1%}")
    for result in results:
        if result["verdict"] == "survived":
            place = f"{result['module']}:{result['number']} [{result['operator']}]"
            print(f"survived {result['id']} {place} {result['line']}\n         {result['change']}   {result['by']}")
    print(f"{seconds:.0f} s; {args.out / 'mutants.json'}")


if __name__ == "__main__":
    raise SystemExit(main())
