"""What a job is given: the project's code, variables, packages or an image, and room for its entry process.

Nothing of it is a secret. Whoever may ask the job API, or see its dashboard, reads all of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from echox.config.load import parse_yaml
from echox.config.locations import is_secret
from echox.errors import LaunchError
from echox.files import read_text

EXCLUDES = (
    *("/.git", "/.venv", "/venv", "/runs", "/mlruns", "/caches", "/dist", "/build", "/tests"),
    *("**/__pycache__", "**/*.pyc", "**/.mypy_cache", "**/.ruff_cache", "**/.pytest_cache", "**/*.egg-info"),
    *("**/*.tar", "**/*.safetensors", "**/*.bin", "**/*.pt", "**/*.onnx", "**/*.wav", "**/*.flac", "**/*.db"),
    *("/data", "**/.env", "**/.env.*", "**/*.pem", "**/*.key", "**/.netrc", "**/.pgpass", "**/credentials*"),
)
"""What is not code does not travel: Ray ships the folder as one message with a size limit."""


@dataclass(frozen=True, kw_only=True)
class EntryResources:
    """What Ray reserves for a job's entry process, which otherwise runs on the head without asking for anything."""

    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None
    named: Mapping[str, float] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """As Ray's client takes them."""
        given = {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": self.memory, "resources": dict(self.named)}
        return {f"entrypoint_{name}": value for name, value in given.items() if value}


@dataclass(frozen=True, kw_only=True)
class JobEnvironment:
    """What a user wants a job to have beside what it needs.

    Attributes:
        variables: environment variables; they win over those of `described`, and these over our own.
        described: a runtime environment as Ray has it, such as `{"pip": [...]}`.
        image: container image in place of the nodes' own Python; the project is then the image's, and does not travel.
        resources: of the entry process.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)
    image: str = ""
    resources: EntryResources = field(default_factory=EntryResources)

    @property
    def in_image(self) -> bool:
        """Whether the job runs in a container image."""
        return bool(self.image or self.described.get("image_uri") or self.described.get("container"))

    def runtime_env(self, root: Path, variables: Mapping[str, str]) -> dict[str, Any]:
        """The runtime environment of a job.

        Args:
            root: the project's folder, which travels.
            variables: our own.

        Raises:
            LaunchError: a variable holds a secret, or Ray knows no such environment.
        """
        wanted = dict(self.described)
        own = wanted.pop("env_vars", None) or {}
        excludes = wanted.pop("excludes", None) or []
        if not isinstance(own, Mapping) or not isinstance(excludes, list):
            raise LaunchError("env_vars is no table of names and values, or excludes no list", where="--runtime-env")
        named = {str(name): str(value) for name, value in {**own, **self.variables}.items()}
        refuse_secrets(named)
        if self.image:
            wanted["image_uri"] = self.image
        if not self.in_image:
            wanted.setdefault("working_dir", str(root))
            wanted["excludes"] = [*EXCLUDES, *excludes]
        wanted["env_vars"] = {**variables, **named}
        return _checked(wanted)


def refuse_secrets(variables: Mapping[str, str]) -> None:
    """Raise `LaunchError` for a variable whose name or value says that it is a secret."""
    for name, value in variables.items():
        if is_secret(name, value):
            raise LaunchError(
                f"{name} holds a secret, and a job's variables can be read by all who may ask the job API",
                fix="set it in the nodes' own environment, as by a Secret of Kubernetes, or in a file of theirs",
            )


def parse_variables(words: list[str]) -> dict[str, str]:
    """`NAME=VALUE` each; a name alone takes the value that it has here.

    Raises:
        LaunchError: one is neither.
    """
    found: dict[str, str] = {}
    for word in words:
        name, given, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not (given or name in os.environ):
            shown = name if given else word
            raise LaunchError(f"--env {shown} is no NAME=VALUE, and no variable here", fix="write --env NAME=VALUE")
        found[name] = value if given else os.environ[name]
    return found


def read_runtime_env(path: Path) -> dict[str, Any]:
    """A runtime environment of a YAML or JSON file.

    Raises:
        LaunchError: there is none in it.
    """
    try:
        found = parse_yaml(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or str(error).splitlines()[0]
        raise LaunchError(f"the runtime environment cannot be read: {reason}", where=str(path)) from error
    if not isinstance(found, dict):
        raise LaunchError("the file describes no runtime environment", where=str(path), fix="write pip: [...] or such")
    return found


def parse_table(words: str | None, option: str) -> dict[str, Any]:
    """The JSON object of an option; empty without one.

    Raises:
        LaunchError: it is something else; its value is not shown, for it may be a secret.
    """
    try:
        found = json.loads(words) if words else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LaunchError(f"{option} is no JSON object", fix='write \'{"name": "value"}\'')
    return found


def _checked(wanted: dict[str, Any]) -> dict[str, Any]:
    from ray.runtime_env import RuntimeEnv

    unknown = sorted(set(wanted) - RuntimeEnv.known_fields)
    try:
        if unknown:
            raise ValueError(f"unknown field {unknown[0]}")
        RuntimeEnv(**wanted)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise LaunchError(f"Ray knows no such runtime environment: {reason[:300]}", where="--runtime-env") from error
    return wanted
