"""Places that a recipe may not name, and what is shown of those that hold a secret."""

from __future__ import annotations

import pytest

from echox.config.load import load_recipe
from echox.config.locations import without_secret_variables, without_secrets
from echox.errors import EchoXError

SECRET = "s3cr3t-9f"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"tracking.uri=https://me:{SECRET}@mlflow.example", "MLFLOW_TRACKING_PASSWORD"),
        (f"tracking.uri=https://{SECRET}@mlflow.example", "MLFLOW_TRACKING_PASSWORD"),
        (f"tracking.uri=postgresql://me:{SECRET}@db/mlflow", "PGPASSWORD"),
        (f"data.train.0.path=https://me:{SECRET}@host/set", "~/.netrc"),
        (f"data.train.0.path=s3://me:{SECRET}@bucket/set", "its own credentials"),
        (f"data.valid.0.path=https://host/set?X-Amz-Signature={SECRET}&X-Amz-Date=1", "its own credentials"),
        (f"data.valid.0.path=https://host/set?a=1&access_token={SECRET}", "its own credentials"),
        (f"storage=https://me:{SECRET}@host/runs", "a folder that every node sees"),
        (f"storage=s3://me:{SECRET}@bucket/runs", "its own credentials"),
        (f"storage=s3://bucket/runs?X-Amz-Credential={SECRET}", "its own credentials"),
    ],
)
def test_a_recipe_with_an_unfit_place_is_refused_and_its_secret_is_not_said(override: str, said: str) -> None:
    with pytest.raises(EchoXError) as refused:
        load_recipe("demo/t2c", [override])
    assert said in str(refused.value) and override.partition("=")[0] in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=postgresql://me@db/mlflow",
        "tracking.uri=https://mlflow.example:5000/sub",
        "tracking.uri=sqlite:////shared/mlflow.db",
        "data.train.0.path=https://host/monkeys=1/set",
        "data.train.0.path=s3://bucket/set",
        "storage=/shared/runs@home",
        "storage=s3://bucket/runs",
        "storage=gs://bucket/deep/runs/",
    ],
)
def test_a_place_without_a_secret_is_taken(override: str) -> None:
    assert load_recipe("demo/t2c", [override])


def test_texts_are_shown_without_their_secrets() -> None:
    text = f"GET https://me:{SECRET}@host/a?Signature={SECRET}&part=2 and s3://b/c?X-Amz-Credential={SECRET}"
    shown = without_secrets(text)
    assert SECRET not in shown and "https://***@host/a" in shown and "part=2" in shown and "s3://b/c" in shown
    assert without_secrets("mail me@host, key point = 3") == "mail me@host, key point = 3"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", SECRET),
        ("HF_ACCESS_KEY_ID", SECRET),
        ("HF_WEBHOOK", f"https://hooks.example/{SECRET}"),
        ("HF_WEBHOOK_URL", f"https://hooks.example/{SECRET}"),
        ("HF_ENDPOINT", f"https://me:{SECRET}@hub"),
        ("HF_ENDPOINT", f"https://{SECRET}@hub"),
    ],
)
def test_variables_are_passed_on_without_secrets(name: str, value: str) -> None:
    environment = {"MLFLOW_KEYS": "2", "HF_HOME": "/hf", "HF_DB": "postgresql://me@db/x", "OTHER": "x", name: value}
    shared, secret = without_secret_variables(environment, ("HF_", "MLFLOW_"))
    assert shared == {"MLFLOW_KEYS": "2", "HF_HOME": "/hf", "HF_DB": "postgresql://me@db/x"} and secret == [name]
