"""Keeps secrets out of recipes and jobs, and refuses places in a recipe that nothing can be written to.

A resolved recipe is logged, stored beside the run and shown by the tracking server; variables of a job and of its
workers are shown by Ray's dashboard. Neither must hold a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

_SIGNED = re.compile(
    r"([?&][^=&\s]*(?:signature|credential|token|secret|password|sig|key)[^=&\s]*=)[^&\s]*", re.IGNORECASE
)
_SECRET_NAME = re.compile(r"((TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIALS?)(_ID)?|WEBHOOK(_URL)?)$", re.IGNORECASE)
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs")
"""Schemes of object stores that runs may lie in."""
_DATABASE_LOGIN = "write postgresql://USER@HOST/DB and put the password into PGPASSWORD or ~/.pgpass of every node"
_TRACKING_LOGIN = "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on every node"
DATA_LOGIN = "leave it out and let every node have its own credentials, as in ~/.netrc or the store's usual variables"


class Unfit(NamedTuple):
    """A place that a recipe may not name: its key, what is wrong, and the fix; the secret is in none of them."""

    key: str
    rule: str
    fix: str


def without_secrets(text: str) -> str:
    """A URL, or a text with URLs, without logins and signatures."""
    text = re.sub(r"(://)[^/\s@]*@", r"\1***@", text)
    return _SIGNED.sub(r"\1***", text)


def unfit_places(storage: str, tracking_uri: str | None, data: Mapping[str, str]) -> Iterator[Unfit]:
    """Every place of a recipe that is unfit.

    Args:
        storage: folder of runs, or its URL.
        tracking_uri: where runs are tracked.
        data: key to dataset.
    """
    scheme, found, _ = storage.partition("://")
    if found and scheme not in OBJECT_STORES:
        rule = f"storage={without_secrets(storage)} is neither a folder nor an object store"
        yield Unfit("storage", rule, f"name a folder that every node sees, or {'://, '.join(OBJECT_STORES)}://")
    elif found and (has_password(storage) or _SIGNED.search(storage)):
        yield Unfit("storage", f"storage={without_secrets(storage)} holds a secret", DATA_LOGIN)
    uri = tracking_uri or ""
    if has_password(uri):
        fix = _TRACKING_LOGIN if uri.startswith("http") else _DATABASE_LOGIN
        yield Unfit("tracking.uri", f"tracking.uri={without_secrets(uri)} holds a password", fix)
    for key, place in data.items():
        if holds_secret(place):
            yield Unfit(key, f"{key}={without_secrets(place)} holds a secret", DATA_LOGIN)


def holds_secret(place: str) -> bool:
    """Whether a place of data has a login or a signature in it."""
    return has_password(place) or (place.startswith("http") and _SIGNED.search(place) is not None)


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, by its name or its value."""
    return bool(_SECRET_NAME.search(name)) or has_password(value)


def without_secret_variables(
    environment: Mapping[str, str], prefixes: tuple[str, ...]
) -> tuple[dict[str, str], list[str]]:
    """Variables whose names begin so and that hold no secret, and the sorted names of those that do."""
    named = {name: value for name, value in environment.items() if name.startswith(prefixes)}
    secret = sorted(name for name, value in named.items() if is_secret(name, value))
    return {name: value for name, value in named.items() if name not in secret}, secret


def has_password(place: str) -> bool:
    """Whether a URL has a login that is a secret."""
    try:
        parts = urlsplit(place)
        # A user alone is a name in a database's URI, and a token for a web server.
        return parts.password is not None or (parts.scheme in ("http", "https") and parts.username is not None)
    except ValueError:
        return False
