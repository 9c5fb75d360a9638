"""scripts/kubernetes.yaml: Kubernetes accepts it, and handles the exit codes of the program as meant."""

import importlib.util
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import mnist_jax
from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.cli import ExitCode

FILE = Path(__file__).parents[1] / "scripts" / "kubernetes.yaml"
SERVICE, POLICY, JOB = yaml.safe_load_all(FILE.read_text())
SPEC, POD = JOB["spec"], JOB["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
RETRIED, FINAL = (69, 70, 73, 74, 134, 137, 139, 143), (1, 2, 65)
VERSIONS = [re.search(r"Kubernetes (1\.\d+) or newer", FILE.read_text())[1], kubernetes_validate.latest_version()]


def config(index: int) -> configs.Config:
    """Return the settings of a process."""
    return cli.parse_config([arg.replace("$(JOB_COMPLETION_INDEX)", str(index)) for arg in CONTAINER["args"]])


def action(code: int, *, conditions: tuple[tuple[str, str], ...] = ()) -> str:
    """Return what the Job controller does with a failed pod: the first rule that matches."""
    for rule in SPEC["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["operator"] == "In"
            matches = code in rule["onExitCodes"]["values"]
        else:
            matches = any((p["type"], p["status"]) in conditions for p in rule["onPodConditions"])
        if matches:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("version", VERSIONS)
def test_oldest_and_newest_kubernetes_accept_it(version):
    for document in (SERVICE, POLICY, JOB):
        assert kubernetes_validate.validate(document, version, strict=True) == ".".join(version.split(".")[:2])
    misspelt = {**JOB, "spec": {**SPEC, "backOffLimit": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="backOffLimit"):
        kubernetes_validate.validate(misspelt, version, strict=True)
    # The API server checks these; its schema does not.
    assert POD["restartPolicy"] == "Never"
    assert (SPEC["podReplacementPolicy"], SPEC["completionMode"]) == ("Failed", "Indexed")
    for rule in SPEC["podFailurePolicy"]["rules"]:
        values = rule.get("onExitCodes", {"values": [1]})["values"]
        assert values == sorted(set(values))
        assert 0 not in values


def test_exit_codes_are_restarted_or_final():
    preempted = config(0).preempted_exit_code
    assert action(preempted) == "Ignore"
    assert preempted not in (0, *RETRIED, *FINAL)
    assert {action(code) for code in FINAL} == {"FailJob"}
    assert {action(code) for code in RETRIED} == {"Count"}
    assert SPEC["backoffLimit"] > 0
    assert set(ExitCode) - {ExitCode.OK} <= {*RETRIED, *FINAL}
    for code in (preempted, *RETRIED, *FINAL):
        assert action(code, conditions=(("DisruptionTarget", "True"),)) == "Ignore"
    assert SPEC["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


def test_command_and_image_are_ours():
    assert CONTAINER["command"] == ["python", "-m", "mnist_jax.train"]
    assert importlib.util.find_spec(CONTAINER["command"][-1])
    assert CONTAINER["image"].partition(":")[2] == mnist_jax.__version__


def test_processes_reach_the_coordinator():
    indices = range(SPEC["completions"])
    assert SPEC["parallelism"] == len(indices)
    assert [(config(i).process_id, config(i).num_processes) for i in indices] == [(i, len(indices)) for i in indices]
    host, port = config(0).coordinator.split(":")
    assert host == f"{JOB['metadata']['name']}-0.{POD['subdomain']}"
    assert 1024 <= int(port) < 32768  # neither for root alone nor for outgoing connections
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}
    assert (SERVICE["spec"]["clusterIP"], SERVICE["spec"]["publishNotReadyAddresses"]) == ("None", True)


def test_only_the_pods_of_the_job_are_connected():
    pods = {"matchLabels": SERVICE["spec"]["selector"]}
    assert POLICY["spec"] == {"podSelector": pods, "ingress": [{"from": [{"podSelector": pods}]}]}
    assert POD["automountServiceAccountToken"] is False


def test_run_is_on_the_shared_volume():
    claims = {volume["name"] for volume in POD["volumes"] if "persistentVolumeClaim" in volume}
    mounts = {Path(m["mountPath"]) for m in CONTAINER["volumeMounts"] if m["name"] in claims}
    assert mounts & set(config(0).workdir.parents)  # not the mount itself, which --fresh could not move
