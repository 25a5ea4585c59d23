"""What other schedulers get, against Kubernetes' and Ray's own schemas, KubeRay's documented fields, and shellcheck."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from dockerfile_parse import DockerfileParser

from echox.cli import main
from echox.config.load import load_recipe
from echox.errors import LaunchError
from launch.client.job_environment import EXCLUDES
from launch.deploy.kuberay import GRACE_S, STOP_WAIT_S, PodOptions, ray_cluster
from launch.deploy.plan import plan_of

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "launch" / "deploy"
# Of KubeRay's API reference, ray.io/v1.
JOB = {"activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
       "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
       "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
       "shutdownAfterJobFinishes", "suspend"}  # fmt: skip
CLUSTER = {"suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
           "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs"}  # fmt: skip
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams", "template",
         "scaleStrategy", "numOfHosts", "suspend"}  # fmt: skip


def submit(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **template}


def check_cluster(spec: dict[str, Any]) -> None:
    assert set(spec) <= CLUSTER and spec["rayVersion"] == ray.__version__
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert set(group) <= GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        kubernetes_validate.validate(as_pod(group["template"]), kubernetes_validate.latest_version(), strict=True)
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == GRACE_S > STOP_WAIT_S
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_ray_job_has_the_nodes_of_its_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["8b/s2t", "storage=/shared/runs", "scaling.workers=[8,16]", "--cluster", "kuberay", "--image", "r/echox:1"]
    text = submit(capsys, *words, "--secret", "one", "--secret", "two", "--namespace", "voices", "--memory", "800Gi")
    assert "&id" not in text, "kubectl's users read it"
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("ray.io/v1", "RayJob", "8b-s2t")
    spec = job["spec"]
    assert set(spec) <= JOB and job["metadata"]["namespace"] == "voices"
    entry = shlex.split(spec["entrypoint"])
    assert entry == ["python", "-m", "launch.train", "8b/s2t", "storage=/shared/runs", "scaling.workers=[8,16]"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"
    check_cluster(spec["rayClusterSpec"])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 2, 2)
    (worker,) = group["template"]["spec"]["containers"]
    scaling = load_recipe("8b/s2t").scaling
    asked = {"cpu": str(int(8 * scaling.cpus_per_worker)), "memory": "800Gi", "nvidia.com/gpu": "8"}
    assert worker["resources"] == {"requests": asked, "limits": asked}
    assert worker["envFrom"] == [{"secretRef": {"name": "one"}}, {"secretRef": {"name": "two"}}]


def test_a_cluster_that_stays_and_shares_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["3b/s2t", "storage=s3://bucket/runs", "--cluster", "kuberay", "--image", "r/echox:1", "--claim", ""]
    cluster = yaml.safe_load(submit(capsys, *words, "--standing", "--secret", "bucket"))
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    check_cluster(cluster["spec"])
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"name": "shared", "emptyDir": {}} in pod["volumes"] and "persistentVolumeClaim" not in str(pod)
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    job = yaml.safe_load(submit(capsys, *words))
    assert job["kind"] == "RayJob" and "storage=s3://bucket/runs" in job["spec"]["entrypoint"]


def test_a_schema_notices_what_is_wrong() -> None:
    cluster = ray_cluster(plan_of(load_recipe("3b/s2t"), ["3b/s2t"]), PodOptions(image="i"))
    assert cluster["kind"] == "RayCluster"
    check_cluster(cluster["spec"])
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        check_cluster(cluster["spec"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["3b/s2t", "--cluster", "kuberay"], "a RayJob needs --image"),
        (["3b/s2t"], "--dry-run prints what a scheduler would get"),
        (
            ["3b/s2t", "--cluster", "kuberay", "--image", "i", "--claim", ""],
            "without a claim the pods do not share storage=runs",
        ),
        (
            ["3b/s2t", "scaling.workers=12", "--cluster", "slurm"],
            "12 workers do not fill nodes of 8",
        ),
    ],
)
def test_what_cannot_be_described_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words, "--dry-run"]) == LaunchError.exit_code
    assert said in capsys.readouterr().err


def test_a_batch_script_is_sound_for_shellcheck_and_asks_for_its_nodes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["8b/s2t", "storage=/shared/my runs", "scaling.workers=[8,16]", "--cluster", "slurm", "--partition", "gpu"]
    words += ["--account", "speech", "--time", "12:00:00", "--setup", ". /shared/venv/bin/activate"]
    script = submit(capsys, *words)
    path = tmp_path / "run.sh"
    path.write_text(script)
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([checker, "--exclude=SC1091", path], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.MULTILINE))
    assert (asked["nodes"], asked["gpus-per-node"], asked["partition"]) == ("1-2", "8", "gpu")
    assert (asked["account"], asked["time"], asked["signal"]) == ("speech", "12:00:00", "B:TERM@240")
    assert "python -m launch.train 8b/s2t 'storage=/shared/my runs' 'scaling.workers=[8,16]'" in script


def test_manifest_and_script_are_handed_to_what_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "demo/s2t", "--image", "i"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*words, "--cluster", "kuberay"]) == LaunchError.exit_code
    assert "kubectl cannot be run here: No such file or directory" in capsys.readouterr().err
    for name, line in (
        ("kubectl", f'/bin/cat > {tmp_path}/got; echo "rayjob created: $*"'),
        ("sbatch", "echo no; exit 3"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    assert main([*words, "--cluster", "kuberay"]) == 0
    assert capsys.readouterr().out == "rayjob created: create -f -\n"
    assert yaml.safe_load((tmp_path / "got").read_text())["metadata"]["name"] == "demo-s2t"
    assert main([*words, "--cluster", "slurm"]) == LaunchError.exit_code
    assert "sbatch refuses the run: no" in capsys.readouterr().err


def test_the_cluster_launchers_file_fits_rays_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    described = yaml.safe_load((DEPLOY / "aws.yaml").read_text())
    jsonschema.validate(described, schema)
    assert described["head_node_type"] in described["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**described, "worker_count": 3}, schema)


def test_the_dockerfile_copies_what_there_is_and_what_may_be_sent() -> None:
    parser = DockerfileParser(str(DEPLOY / "Dockerfile"), cache_content=True)
    steps = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
    assert {name for name, _ in steps} <= {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    copied = [word for name, value in steps if name == "COPY" for word in value.split()[:-1]]
    assert {"echox", "launch", "shards", "ds_configs", "requirements.lock"} <= set(copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in copied:
        assert (ROOT / name).exists() and name in allowed, name
    assert ("USER", "ray") in steps and parser.baseimage == "ubuntu:24.04"
    makefile = (ROOT / "Makefile").read_text()
    (uv,) = re.findall(r"UV_VERSION := (\S+)", makefile)
    assert f"uv=={uv}" in (DEPLOY / "Dockerfile").read_text()


def test_ray_job_submit_leaves_at_home_what_echox_submit_leaves(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "p"
    travels = ["echox/a.py", "launch/recipes/demo/s2t.yaml", "echox/data/x.py"]
    stays = ["data/a.jsonl", ".env", ".env.local", "echox/secret.pem", "tests/t.py", "runs/x/log", ".netrc"]
    stays += ["a/model.safetensors", "launch/credentials.json"]
    for name in [*travels, *stays]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    shutil.copy(ROOT / ".rayignore", project)
    for excludes in (None, list(EXCLUDES)):
        package = tmp_path / f"{excludes is None}.zip"
        create_package(str(project), package, include_gitignore=True, excludes=excludes)
        names = set(zipfile.ZipFile(package).namelist())
        assert not {name for name in stays if name in names}, names
        assert set(travels) <= names
        (project / ".rayignore").unlink(missing_ok=True)
