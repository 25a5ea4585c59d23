"""Submits, queries, follows and stops jobs through Ray's job API, the one behind `ray job submit`."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import urlsplit

from echox.config.load import find_recipe
from echox.config.paths import cache_dir, is_url, project_root
from echox.errors import LaunchError
from launch.client.address import LOOPBACK, api_address, on_this_machine, without_variables
from launch.client.job_environment import JobEnvironment, parse_table
from launch.job.environment import passed_on
from launch.paths import HOME, RESOLVED
from launch.recipe import load_job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from echox.config.run_recipe import RunRecipe

STOP_WAIT_S = 120
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
log = logging.getLogger("launch")


def token_header() -> dict[str, str]:
    """The header that carries Ray's token, from $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        with contextlib.suppress(OSError):
            token = path.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


class Job(TypedDict):
    """One job of a cluster.

    Attributes:
        id: submission id.
        run: name of the run it trains, or the id where it is none of ours.
        user: who submitted it; empty where it is none of ours.
        attempt: how often the run had been submitted.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's words on it.
        exit_code: of its entry process, once that has ended.
        folder: of the run, where that is known; else empty.
        start, end: Unix time; 0 and None before.
    """

    id: str
    run: str
    user: str
    attempt: int
    status: str
    message: str
    exit_code: int | None
    folder: str
    start: float
    end: float | None


class Jobs:
    """The job API of one cluster.

    Args:
        address: `http://host:port` of the dashboard; None takes $RAY_ADDRESS, then Ray's default on this machine.
        headers: sent with every request, beside that of Ray's token; None takes $RAY_JOB_HEADERS.
        authority: file or folder of the certificates that the server's is checked against; None is the system's.

    Raises:
        LaunchError: the address has another form, nothing answers, or the token is missing or wrong.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        authority: Path | None = None,
    ) -> None:
        self.address = api_address(address)
        if headers is None:
            headers = parse_table(os.environ.get("RAY_JOB_HEADERS"), "RAY_JOB_HEADERS")
        self._headers = {**token_header(), **headers}
        self._authority = authority
        self._client: JobSubmissionClient = self._call(self._connect)

    def submit(
        self,
        recipe: str,
        overrides: Sequence[str] = (),
        *,
        environment: JobEnvironment | None = None,
        extra_arguments: Sequence[str] = (),
        stop_wait_s: int = STOP_WAIT_S,
    ) -> str:
        """Submit a recipe after checking it here; returns the submission id, `<run name>-a<attempt>`.

        Args:
            recipe: YAML file or short name.
            overrides: `key=value` each.
            environment: what it gets beside the project's code and the variables that are passed on.
            extra_arguments: further arguments of `launch.train`.
            stop_wait_s: seconds between the polite and the final signal when the job is stopped.

        Raises:
            RecipeError: the recipe is wrong; nothing was submitted.
            LaunchError: the run already has a job, or the cluster refuses it.
        """
        checked = load_job(recipe, overrides)
        root, environment = project_root(), environment or JobEnvironment()
        busy = [job for job in self.list(checked.name) if job["status"] not in TERMINAL]
        if busy:
            raise LaunchError(
                f"run {checked.name} already has job {busy[0]['id']} ({busy[0]['status']}), "
                "and two jobs must not write one run",
                fix=f"follow it with `echox logs {busy[0]['id']} -f`, stop it with `echox stop`, or give another name=",
            )
        attempt = 1 + max((job["attempt"] for job in self.list(checked.name)), default=0)
        shipped = recipe if environment.in_image else self._shipped(recipe, root)
        variables = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s)}
        metadata = {
            "run": checked.name,
            "folder": self._run_folder(checked),
            "stage": checked.stage,
            "scale": checked.scale,
            "recipe": str(recipe),
            "attempt": str(attempt),
            "user": user_name(),
            "git": _git_revision(root),
        }
        words = ["launch.train", shipped, *overrides, *extra_arguments]
        return self.submit_module(words, f"{checked.name}-a{attempt}", environment, metadata, variables)

    def submit_module(
        self,
        words: Sequence[str],
        job: str,
        environment: JobEnvironment,
        metadata: Mapping[str, str],
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Submit a module of the project with its arguments as a job; returns the submission id.

        Args:
            words: name of the module, and its arguments.
            job: submission id.
            environment: what the job gets.
            metadata: what others see of it.
            variables: more of ours.
        """
        python = sys.executable if self.is_local and not environment.in_image else "python"
        own = self._variables()
        if self.is_local:
            own.setdefault(HOME, os.getcwd())
        runtime_env = environment.runtime_env(project_root(), {**own, **(variables or {})})
        return str(
            self._call(
                lambda: self._client.submit_job(
                    entrypoint=shlex.join([python, "-m", *words]),
                    submission_id=job,
                    runtime_env=runtime_env,
                    metadata=dict(metadata),
                    **environment.resources.arguments(),
                )
            )
        )

    def _variables(self) -> dict[str, str]:
        """What the job gets of this process's variables."""
        named, secret = passed_on()
        if secret and not self.is_local:
            log.warning(
                "not passed on, for a job's variables are no secret: %s; set them on the nodes", ", ".join(secret)
            )
        return named

    @cached_property
    def is_local(self) -> bool:
        """Whether the cluster's head is this machine; one that does not say is not."""
        with contextlib.suppress(LaunchError, ValueError, KeyError, TypeError):
            return on_this_machine(self.address, self._call(self._nodes))
        return False

    def list(self, run: str | None = None) -> list[Job]:
        """Jobs of the cluster, oldest first."""
        found: list[Job] = []
        for job in self._call(self._client.list_jobs):
            if job.submission_id is None:
                continue
            metadata = dict(job.metadata or {})
            if (
                run is not None
                and metadata.get("run", "") != run
                and not re.fullmatch(rf"{re.escape(run)}-a\d+", job.submission_id)
            ):
                continue
            found.append(
                {
                    "id": job.submission_id,
                    "run": metadata.get("run", job.submission_id),
                    "user": metadata.get("user", ""),
                    "attempt": int(re.sub(r"\D", "", metadata.get("attempt", "")) or 0),
                    "status": _text(job.status),
                    "message": job.message or "",
                    "exit_code": job.driver_exit_code,
                    "folder": metadata.get("folder", ""),
                    "start": (job.start_time or 0) / 1000,
                    "end": job.end_time / 1000 if job.end_time else None,
                }
            )
        return sorted(found, key=lambda job: job["start"])

    def find(self, job: str) -> str:
        """The submission id behind an id or a run's name (its newest job).

        Raises:
            LaunchError: no such job.
        """
        jobs = self.list()
        for match in (
            [entry for entry in jobs if entry["id"] == job],
            [entry for entry in jobs if entry["run"] == job],
        ):
            if match:
                return str(match[-1]["id"])
        known = ", ".join(entry["id"] for entry in jobs[-5:]) or "none"
        raise LaunchError(f"no job or run named {job} at {self.address}", fix=f"the newest jobs are: {known}")

    def status(self, job: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return _text(self._call(lambda: self._client.get_job_status(job)))

    def message(self, job: str) -> str:
        """Ray's message on a job's state."""
        return str(self._call(lambda: self._client.get_job_info(job)).message or "")

    def logs(self, job: str) -> str:
        """All the job has written so far."""
        return str(self._call(lambda: self._client.get_job_logs(job)))

    def follow(self, job: str) -> Iterator[str]:
        """Pieces of the job's log as they are written, until the job ends."""
        loop = asyncio.new_event_loop()
        stream = self._client.tail_job_logs(job)
        try:
            while True:
                try:
                    yield self._call(lambda: loop.run_until_complete(anext(stream)))
                except StopAsyncIteration:
                    return
        finally:
            with contextlib.suppress(Exception):
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def failure(self, job: str) -> str:
        """One sentence on why a job failed: the driver's own error line, else the last line of its log."""
        lines = [line.strip() for line in self.logs(job).splitlines() if line.strip()]
        own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (own or lines or [self.message(job) or "it wrote nothing"])[-1]

    def wait(self, job: str, *, poll_s: float = 0.5, on_poll: Callable[[], None] | None = None) -> str:
        """Wait for the end of a job; returns its final status."""
        while (status := self.status(job)) not in TERMINAL:
            if on_poll is not None:
                on_poll()
            time.sleep(poll_s)
        return status

    def stop(self, job: str, *, force: bool = False, timeout_s: float = STOP_WAIT_S + 30) -> str:
        """Ask a job to stop and wait until it has; returns its final status.

        Args:
            job: submission id.
            force: also one that another user has submitted.
            timeout_s: how long to wait for its end.

        Raises:
            LaunchError: it is another user's.
        """
        owner = next((entry["user"] for entry in self.list() if entry["id"] == job), "")
        if owner not in ("", user_name()) and not force:
            raise LaunchError(f"job {job} is {owner}'s, and you are {user_name()}", fix="add --force to stop it anyway")
        if self.status(job) not in TERMINAL:
            self._call(lambda: self._client.stop_job(job))
        deadline = time.monotonic() + timeout_s
        while (status := self.status(job)) not in TERMINAL and time.monotonic() < deadline:
            time.sleep(0.3)
        return status

    def _connect(self) -> JobSubmissionClient:
        # With a token at hand, use it: the client sends one only in Ray's token mode.
        if "RAY_AUTH_MODE" not in os.environ and token_header():
            os.environ["RAY_AUTH_MODE"] = "token"
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they list every file that does not travel
        with without_variables():
            verify = True if self._authority is None else str(self._authority)
            return JobSubmissionClient(self.address, headers=self._headers, verify=verify)

    def _nodes(self) -> Any:
        if urlsplit(self.address).hostname not in LOOPBACK:
            return None
        return self._client._do_request("GET", "/nodes?view=summary").json()

    def _call(self, request: Callable[[], Any]) -> Any:
        """Run one request; Ray's errors come out as sentences."""
        try:
            return request()
        except (StopAsyncIteration, LaunchError):
            raise
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> LaunchError:
        text = str(error)
        if any("CERTIFICATE_VERIFY_FAILED" in str(each) for each in (error, error.__cause__, error.__context__)):
            return LaunchError(
                f"the certificate of {self.address} is not trusted here",
                fix="name that of its authority with --verify FILE, or add it to the system's",
            )
        if "Authentication required" in text or "401" in text:
            return LaunchError(
                f"the Ray cluster at {self.address} asks for a token and got none (401)",
                fix="set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, or put it in ~/.ray/auth_token; on the head node, "
                "`ray get-auth-token` shows it",
            )
        if "Authentication failed" in text or "403" in text:
            return LaunchError(
                f"the Ray cluster at {self.address} refuses this token (403)",
                fix="copy the head's token (`ray get-auth-token` there) to RAY_AUTH_TOKEN or ~/.ray/auth_token",
            )
        if isinstance(error, ConnectionError) or "Failed to connect" in text or "Connection" in type(error).__name__:
            return LaunchError(
                f"no Ray cluster answers at {self.address}",
                fix="start one with `ray start --head`, or name yours with --address or RAY_ADDRESS=http://host:8265",
            )
        lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
        return LaunchError(f"Ray's job API at {self.address} failed: {lines[0][:400]}")

    def _run_folder(self, recipe: RunRecipe) -> str:
        """The run's folder as the job will see it; empty where only the cluster knows."""
        if is_url(recipe.storage):
            return f"{recipe.storage.rstrip('/')}/{recipe.name}"
        storage = Path(recipe.storage).expanduser()
        if self.is_local:
            storage = (Path(os.environ.get(HOME) or os.getcwd()) / storage).absolute()
        return str(storage / recipe.name) if storage.is_absolute() else ""

    def _shipped(self, recipe: str, root: Path) -> str:
        """How the job names the recipe: as given if it travels with the project, absolute where the job sees it."""
        file = find_recipe(recipe).resolve()
        if file.is_relative_to(root):
            return str(file.relative_to(root))
        # A run's own folder lies in storage that every node sees.
        copied = file.is_relative_to((cache_dir() / "runs").resolve())
        if self.is_local or (file.name == RESOLVED and not copied):
            return str(file)
        raise LaunchError(
            f"recipe {recipe} lies outside the project folder, which is all that travels", fix=f"copy it below {root}"
        )


def _text(status: object) -> str:
    return str(getattr(status, "value", status))


def user_name() -> str:
    """Who works here, by the system's word."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _git_revision(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
