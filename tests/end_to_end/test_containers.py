"""launch/Dockerfile, .dockerignore and the Kubernetes files, read without docker and without a cluster."""

import json
import re
import tomllib
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from relora.config import load_config
from relora.config.derived import accumulation_steps
from tests.helpers.programs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED_BY_SETUP = {"pyproject.toml", "README.md", "LICENSE", "relora", "configs", "launch"}


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of launch/Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "launch/Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], " ".join(line.split()[1:])) for line in lines]


IMAGE = dockerfile()


def of(instruction: str) -> list[str]:
    return [rest for name, rest in IMAGE if name == instruction]


def test_the_image_runs_as_a_user_with_a_number_and_without_a_shell() -> None:
    names = [name for name, _ in IMAGE]
    assert of("USER") == ["relora"]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert any("useradd --uid 10001" in run and "relora" in run for run in of("RUN"))
    assert json.loads(of("ENTRYPOINT")[0]) == ["relora"]  # the exec form is JSON
    assert "relora" in PROJECT["scripts"]
    assert of("STOPSIGNAL") == ["SIGTERM"]


def test_the_image_is_of_a_cuda_base_that_an_argument_replaces() -> None:
    assert re.fullmatch(r"BASE=nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu24\.04", of("ARG")[0])  # it has Python 3.12
    assert of("FROM") == ["${BASE}"]


def test_the_image_copies_what_there_is_and_all_that_the_installation_reads() -> None:
    sources = [source for words in of("COPY") for source in words.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert set(sources) >= WANTED_BY_SETUP
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in ignored if not line.startswith(("#", "!"))] == ["*", "**/__pycache__"]
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == WANTED_BY_SETUP


def test_the_packages_of_the_image_are_a_layer_that_the_code_leaves_alone() -> None:
    install = [index for index, (name, rest) in enumerate(IMAGE) if name == "RUN" and "launch/setup.sh" in rest]
    assert len(install) == 2
    first, second = install
    before = {source for name, rest in IMAGE[:first] if name == "COPY" for source in rest.split()[:-1]}
    assert before == {"pyproject.toml", "launch/setup.sh", "launch/constraints.txt"}
    assert IMAGE[first][1] == 'RELORA_ONLY_DEPENDENCIES=1 bash launch/setup.sh "${EXTRAS}"'
    assert IMAGE[second][1].startswith('bash launch/setup.sh "${EXTRAS}"')
    assert "RELORA_TORCH_INDEX" in [rest for name, rest in IMAGE[:first] if name == "ARG"]


def test_the_extras_of_the_image_exist() -> None:
    [extras] = [rest.removeprefix("EXTRAS=") for rest in of("ARG") if rest.startswith("EXTRAS=")]
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "launch" / f"{name}.yaml").read_text()))


def check_pod(pod: dict[str, Any], num_pods: int, per_pod: int) -> Any:
    """The options of torchrun in the pod, which has all that its container mounts, and the user of the image."""
    [container] = pod["containers"]
    assert container["command"] == [".venv/bin/python", "launch/torchrun.py"]
    options = get_args_parser().parse_args(container["args"])
    assert (options.nproc_per_node, options.module, options.training_script) == (str(per_pod), True, "relora")
    assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == str(options.shutdown_timeout)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == per_pod
    command, config, *overrides = options.training_script_args
    assert command == "train"
    assert accumulation_steps(load_config(ROOT / config, overrides), num_pods * per_pod) >= 1
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounted["shm"] == "/dev/shm"
    assert all(
        value.startswith(mounted["data"]) for name, value in variables.items() if name in ("HF_HOME", "RELORA_CACHE")
    )
    user = pod["securityContext"]
    assert user["runAsNonRoot"] is True
    assert user["runAsUser"] == user["runAsGroup"] == user["fsGroup"] == 10001
    return options


def test_pods_of_the_operator_start_torchrun_with_what_it_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    job = read("kubernetes")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    num_pods = sum(part["replicas"] for part in replicas.values())
    per_pod = int(job["spec"]["nprocPerNode"])
    monkeypatch.setenv("PET_NNODES", str(num_pods))
    monkeypatch.setenv("PET_NPROC_PER_NODE", str(per_pod))
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PET_MASTER_ADDR", "relora-master-0")
    for part in replicas.values():
        assert part["restartPolicy"] == "OnFailure"
        pod = part["template"]["spec"]
        assert pod["containers"][0]["name"] == "pytorch"
        options = check_pod(pod, num_pods, per_pod)
        assert (options.nnodes, options.node_rank, options.master_addr) == (str(num_pods), 1, "relora-master-0")


def test_the_job_of_one_node_retries_all_but_mistakes() -> None:
    job = read("kubernetes_one_node")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy allows no other
    assert check_pod(pod, 1, 8).standalone
    disrupted, mistake = job["spec"]["podFailurePolicy"]["rules"]  # the first that fits decides
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert mistake["action"] == "FailJob"
    assert mistake["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2]}
