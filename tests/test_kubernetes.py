"""scripts/kubernetes.yaml: what Kubernetes takes, and what it makes of the exit codes of the program."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import mnist_jax
from mnist_jax import config as configs
from mnist_jax.cli import ExitCode

FILE = Path(__file__).parents[1] / "scripts" / "kubernetes.yaml"
SERVICE, POLICY, JOB = yaml.safe_load_all(FILE.read_text())
POD = JOB["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
RULES = JOB["spec"]["podFailurePolicy"]["rules"]
INDICES = range(JOB["spec"]["completions"])


def config(index: int) -> configs.Config:
    """The settings of one of the processes, by the program's own parser."""
    return configs.parse([arg.replace("$(JOB_COMPLETION_INDEX)", str(index)) for arg in CONTAINER["args"]])


def fate(code: int, *, conditions: tuple[tuple[str, str], ...] = ()) -> str:
    """What the Job controller does about a pod whose only container ended with this code: the first rule that fits."""
    if code == 0:
        return "Complete"  # Such a pod has not failed. No rule is asked.
    for rule in RULES:
        if "onExitCodes" in rule:
            is_in = code in rule["onExitCodes"]["values"]
            fits = is_in if rule["onExitCodes"]["operator"] == "In" else not is_in
        else:
            fits = any((p["type"], p["status"]) in conditions for p in rule["onPodConditions"])
        if fits:
            return rule["action"]
    return "Count"


# What Kubernetes takes

VERSIONS = [re.search(r"Kubernetes (1\.\d+) or newer", FILE.read_text())[1], kubernetes_validate.latest_version()]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", [SERVICE, POLICY, JOB], ids=["Service", "NetworkPolicy", "Job"])
def test_the_oldest_and_the_newest_kubernetes_know_each_field(document: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(document, version, strict=True) == ".".join(version.split(".")[:2])


def test_a_field_that_kubernetes_does_not_know_would_be_found() -> None:
    misspelt = {**JOB, "spec": {**JOB["spec"], "backOffLimit": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="backOffLimit"):
        kubernetes_validate.validate(misspelt, VERSIONS[-1], strict=True)


def test_the_rules_meet_the_conditions_under_which_kubernetes_takes_them() -> None:
    # The API server checks these; its schema does not say them.
    assert POD["restartPolicy"] == "Never"
    assert JOB["spec"]["podReplacementPolicy"] == "Failed"
    assert JOB["spec"]["completionMode"] == "Indexed"  # for the success policy
    for rule in RULES:
        assert rule["action"] in ("Ignore", "FailJob", "Count")
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["operator"] in ("In", "NotIn")
            assert codes["values"] == sorted(set(codes["values"]))
            assert 0 not in codes["values"]
            assert codes.get("containerName", CONTAINER["name"]) == CONTAINER["name"]


# What becomes of a process that ends

[PREEMPTED] = [int(arg.split("=")[1]) for arg in CONTAINER["args"] if arg.startswith("--preempted-exit-code=")]
AGAIN, NEVER = (69, 70, 73, 74, 134, 137, 139, 143), (1, 2, 65)


def test_a_process_that_was_stopped_and_saved_is_started_again_and_not_counted() -> None:
    assert config(0).preempted_exit_code == PREEMPTED != 0  # With 0 the Job would take it for finished.
    assert PREEMPTED not in (*AGAIN, *NEVER)
    assert fate(PREEMPTED) == "Ignore"


@pytest.mark.parametrize("code", NEVER)
def test_what_would_happen_again_ends_the_job(code: int) -> None:
    assert fate(code) == "FailJob"


@pytest.mark.parametrize("code", AGAIN)
def test_what_may_not_happen_again_is_tried_again_a_limited_number_of_times(code: int) -> None:
    assert fate(code) == "Count"
    assert JOB["spec"]["backoffLimit"] > 0


def test_each_error_of_the_program_has_its_place() -> None:
    assert set(ExitCode) - {ExitCode.OK} <= {*AGAIN, *NEVER}


@pytest.mark.parametrize("code", [PREEMPTED, *AGAIN, *NEVER])
def test_a_pod_that_kubernetes_itself_ends_is_not_counted(code: int) -> None:
    assert fate(code, conditions=(("Ready", "False"), ("DisruptionTarget", "True"))) == "Ignore"


def test_the_job_is_done_when_process_0_has_finished() -> None:
    assert fate(0) == "Complete"
    assert JOB["spec"]["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


# What is started


def test_the_command_is_the_training() -> None:
    assert CONTAINER["command"] == ["python", "-m", "mnist_jax.train"]
    assert importlib.util.find_spec(CONTAINER["command"][-1])


def test_the_image_is_of_this_version() -> None:
    assert CONTAINER["image"].partition(":")[2] == mnist_jax.__version__


def test_as_many_processes_are_started_as_are_told_of_and_each_knows_which_it_is() -> None:
    assert JOB["spec"]["parallelism"] == len(INDICES)  # They wait for one another.
    assert [(config(i).process_id, config(i).num_processes) for i in INDICES] == [(i, len(INDICES)) for i in INDICES]


def test_the_coordinator_is_the_pod_of_process_0_by_the_name_that_the_service_gives_it() -> None:
    host, port = config(0).coordinator.split(":")
    assert host == f"{JOB['metadata']['name']}-0.{POD['subdomain']}"
    assert 1024 <= int(port) < 32768  # neither for root alone nor for outgoing connections
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["metadata"].get("namespace") == JOB["metadata"].get("namespace")


def test_the_service_finds_the_pods_before_they_are_ready() -> None:
    labels = JOB["spec"]["template"].get("metadata", {}).get("labels", {})
    labels |= {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}  # Kubernetes adds it.
    assert SERVICE["spec"]["selector"].items() <= labels.items()
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True


def test_only_the_pods_of_the_job_reach_each_other() -> None:
    pods = {"matchLabels": SERVICE["spec"]["selector"]}
    assert POLICY["spec"] == {"podSelector": pods, "ingress": [{"from": [{"podSelector": pods}]}]}
    assert POLICY["metadata"].get("namespace") == JOB["metadata"].get("namespace")


def test_the_run_lies_within_the_claim_that_all_pods_share() -> None:
    claims = {volume["name"] for volume in POD["volumes"] if "persistentVolumeClaim" in volume}
    mounts = {Path(m["mountPath"]) for m in CONTAINER["volumeMounts"] if m["name"] in claims}
    # Not at its very top: --fresh moves the directory of a run aside, and a mount cannot be moved.
    assert mounts & set(config(0).workdir.parents)


def test_a_pod_has_no_key_to_the_cluster() -> None:
    assert POD["automountServiceAccountToken"] is False
