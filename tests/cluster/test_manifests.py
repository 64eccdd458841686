"""The cluster files, held against what Ray, AWS, Kubernetes, KubeRay and Docker publish about them.

No cloud is asked. Where a schema comes with a package that is not installed, or from a cluster, the test is skipped
and says what it lacked.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml

from qcrd_ray.config import load_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_FILES = ["cluster.yaml", "cluster/gcp.yaml", "cluster/on-premise.yaml"]
CLOUD_FILES = LAUNCHER_FILES[:2]
KUBERAY_FILES = ["cluster/kuberay/raycluster.yaml", "cluster/kuberay/rayjob.yaml"]
KUBERAY_CRDS = "https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/helm-chart/kuberay-operator/crds"
POOLS = {"trainer": "train", "sampler": "sample"}
IMAGE = "rayproject/ray:2.60.0-py311-cu130"


def read(file: str) -> Any:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def ray_clusters(file: str) -> list[dict[str, Any]]:
    """The RayCluster specs of a KubeRay manifest."""
    found = []
    for document in yaml.safe_load_all((ROOT / file).read_text(encoding="utf-8")):
        if document and document["kind"] == "RayCluster":
            found.append(document["spec"])
        if document and document["kind"] == "RayJob":
            found.append(document["spec"]["rayClusterSpec"])
    assert found
    return found


def problems(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Fields that a schema does not have, and fields that it requires and that are missing.

    An API server drops an unknown field without a word where the schema is a structural one (KubeRay's), and
    jsonschema lets it pass.
    """
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (f"{at}.{name}: missing" for name in schema.get("required", []) if name not in value)
        for name, child in value.items():
            if name in known:
                yield from problems(child, known[name], f"{at}.{name}")
            elif isinstance(rest, dict):
                yield from problems(child, rest, f"{at}.{name}")
            elif not rest:
                yield f"{at}.{name}: unknown"
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from problems(child, schema.get("items", {}), f"{at}[{index}]")


# The launcher


def ray_schema() -> dict[str, Any]:
    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("file", LAUNCHER_FILES)
def test_a_launcher_file_fits_rays_published_schema(file: str) -> None:
    config = read(file)
    # prepare_config moves min_workers of an on-premise file before Ray itself looks at the schema.
    config.pop("min_workers", None)
    jsonschema.validate(config, ray_schema())


def test_the_published_schema_refuses_a_misspelt_key_of_a_node_type() -> None:
    config = read("cluster.yaml")
    config["available_node_types"]["sampler"]["lables"] = {"pool": "sample"}
    with pytest.raises(jsonschema.ValidationError, match="lables"):
        jsonschema.validate(config, ray_schema())


@pytest.mark.parametrize("file", LAUNCHER_FILES)
def test_ray_prepares_and_validates_a_launcher_file(file: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(file))
    validate_config(config)
    types = config["available_node_types"]
    assert sum(each["min_workers"] for each in types.values()) <= config["max_workers"]
    if file in CLOUD_FILES:
        assert types[config["head_node_type"]]["max_workers"] == 0
        assert all(0 < types[name]["max_workers"] <= config["max_workers"] for name in POOLS)


def bootstrapped(file: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All that `ray up` does before it starts the head."""
    from ray.autoscaler._private.commands import _bootstrap_config

    monkeypatch.setattr(tempfile, "tempdir", str(cache))  # where the launcher keeps what it has resolved
    return _bootstrap_config(read(file), no_config_cache=True)


def test_ray_up_bootstraps_the_on_premise_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = read("cluster/on-premise.yaml")
    config = bootstrapped("cluster/on-premise.yaml", tmp_path, monkeypatch)
    only = config["available_node_types"]["local.cluster.node"]
    assert only["min_workers"] == only["max_workers"] == len(given["provider"]["worker_ips"])


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An AWS account of this process, with the two instance profiles that docs/cluster.md makes."""
    moto = pytest.importorskip("moto", reason="moto is not installed: no AWS to bootstrap against")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher keeps the new private key in ~/.ssh
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        iam = boto3.client("iam", region_name="us-west-2")
        for profile in ("qcrd-head", "qcrd-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        yield boto3


def test_ray_up_bootstraps_and_starts_every_node_type_on_aws(
    aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `ray up` does up to ssh: key pair, subnets, security group, and the calls that start the nodes."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    config = bootstrapped("cluster.yaml", tmp_path, monkeypatch)
    ec2 = aws.client("ec2", region_name="us-west-2")
    assert Path(config["auth"]["ssh_private_key"]).is_file()
    types = config["available_node_types"]
    offered = {
        each["InstanceType"]: each
        for each in ec2.describe_instance_types(
            InstanceTypes=sorted({each["node_config"]["InstanceType"] for each in types.values()})
        )["InstanceTypes"]
    }
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, each in types.items():
        machine = offered[each["node_config"]["InstanceType"]]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert each["resources"].get("GPU", 0) == gpus
        assert each["resources"]["CPU"] == (0 if name == "head" else machine["VCpuInfo"]["DefaultVCpus"])
        kind = "head" if name == "head" else "worker"
        # The name of an image is looked up by EC2 itself, which is not here.
        node = {**each["node_config"], "ImageId": "ami-12345678"}
        provider.create_node(node, {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name}, 1)
    spot = {}
    for reservation in ec2.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            spot[tags[TAG_RAY_USER_NODE_TYPE]] = instance.get("InstanceLifecycle") == "spot"
            assert instance["SecurityGroups"]
            assert instance["IamInstanceProfile"]["Arn"].endswith(
                "qcrd-head" if tags[TAG_RAY_NODE_KIND] == "head" else "qcrd-worker"
            )
    assert spot == {"head": False, "trainer": False, "sampler": True, "trial": True}


def test_nodes_on_google_cloud_fit_the_published_compute_api() -> None:
    pytest.importorskip(
        "googleapiclient", reason="google-api-python-client is not installed: it ships the schema of Compute Engine"
    )
    from googleapiclient.discovery_cache import DISCOVERY_DOC_DIR

    schemas = json.loads((Path(DISCOVERY_DOC_DIR) / "compute.v1.json").read_text(encoding="utf-8"))["schemas"]

    def resolved(schema: Any) -> Any:
        if isinstance(schema, dict) and "$ref" in schema:
            return resolved(schemas[schema["$ref"]])
        return schema

    def check(value: Any, schema: Any, at: str) -> Iterator[str]:
        schema = resolved(schema)
        kind = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer"}[type(value)]
        if kind != schema["type"] and not (kind == "integer" and schema.get("format") == "int64"):
            yield f"{at}: {schema['type']} expected"
        elif "enum" in schema and value not in schema["enum"]:
            yield f"{at}: {value} is none of {schema['enum']}"
        elif kind == "object":
            for name, child in value.items():
                if name in schema["properties"]:
                    yield from check(child, schema["properties"][name], f"{at}.{name}")
                else:
                    yield f"{at}.{name}: unknown"
        elif kind == "array":
            for child in value:
                yield from check(child, schema["items"], at)

    for name, each in read("cluster/gcp.yaml")["available_node_types"].items():
        assert list(check(each["node_config"], {"$ref": "Instance"}, name)) == []
    assert list(check({"scheduling": {"preemptable": True}}, {"$ref": "Instance"}, "x")) == [
        "x.scheduling.preemptable: unknown"
    ]


def scheduled(file: str, overrides: list[str]) -> Any:
    """What Ray's own autoscaler does for the placement group of a run, on a cluster that has only its head."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    if file in CLOUD_FILES:
        raw = prepare_config(read(file))
    else:
        metadata = {"name": "qcrd", "namespace": "default"}
        raw = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": ray_clusters(file)[0]})
    cluster = AutoscalingConfig(raw, skip_content_hash=True)
    config = load_config(None, overrides)

    def bundle(cpus: float, gpus: float, labels: dict[str, str]) -> Any:
        within = LabelSelectorOperator.Value("LABEL_OPERATOR_IN")
        selector = [(key, within, [value]) for key, value in labels.items()]
        return ResourceRequestUtil.make({"CPU": cpus, "GPU": gpus}, None, [selector])

    train, sampler = config.train, config.sampler
    bundles = [bundle(train.cpus_per_worker, train.gpus_per_worker, train.node_labels)] * train.workers
    bundles += [bundle(sampler.cpus, sampler.gpus, sampler.node_labels)] * sampler.actors
    return ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=cluster.get_node_type_configs(),
            max_num_nodes=cluster.get_max_num_nodes(),
            gang_resource_requests=[GangResourceRequest(requests=bundles)],
        )
    )


def launched(file: str, overrides: list[str]) -> dict[str, int]:
    """Nodes that the autoscaler starts for a run."""
    reply = scheduled(file, overrides)
    assert not reply.infeasible_gang_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("file", [*CLOUD_FILES, *KUBERAY_FILES])
def test_the_autoscaler_starts_the_nodes_whose_labels_a_run_asks_for(file: str) -> None:
    asked = ["train.gpus_per_worker=1", "train.cpus_per_worker=4", "sampler.gpus=1", "sampler.cpus=4"]
    asked += ["train.node_labels={pool: train}", "sampler.node_labels={pool: sample}"]
    assert launched(file, [*asked, "train.workers=4", "sampler.actors=2"]) == {"trainer": 1, "sampler": 2}
    assert launched(file, [*asked, "train.workers=16", "sampler.actors=8"]) == {"trainer": 4, "sampler": 8}
    more = scheduled(file, [*asked, "train.workers=17", "sampler.actors=8"])
    assert len(more.infeasible_gang_resource_requests) == 1, "the file's own limit does not hold"


@pytest.mark.parametrize("file", LAUNCHER_FILES)
def test_the_shell_reads_every_command(file: str) -> None:
    config = read(file)
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config.get(key, []):
            checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=10)
            assert checked.returncode == 0, (command, checked.stderr)


@pytest.mark.parametrize("file", LAUNCHER_FILES)
def test_ray_knows_every_option_of_the_start_commands(file: str) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = [each for each in read(file)[key] if "ray start" in each]
        options = set(re.findall(r"--[a-z-]+", command.split("ray start", 1)[1]))
        assert options and options <= known
        if key.startswith("head"):
            assert {"--head", "--autoscaling-config", "--dashboard-host"} <= options


@pytest.mark.parametrize(
    ("addresses", "pool"),
    [("10.0.0.11", "train"), ("10.0.0.12 172.17.0.1", "train"), ("10.0.0.21", "sample"), ("10.0.0.111", "sample")],
)
def test_a_machine_on_premise_takes_its_label_from_its_address(tmp_path: Path, addresses: str, pool: str) -> None:
    for name, text in (("hostname", f"echo {addresses}"), ("ray", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = read("cluster/on-premise.yaml")["worker_start_ray_commands"][-1].replace("ulimit -n 65536;", "")
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.10"}
    ran = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=10)
    words = ["start", "--address=10.0.0.10:6379", "--object-manager-port=8076", f"--labels=pool={pool}"]
    assert ran.stdout.split() == words


# KubeRay


@pytest.mark.parametrize("file", KUBERAY_FILES)
def test_rays_autoscaler_reads_a_kuberay_manifest(file: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    for spec in ray_clusters(file):
        metadata = {"name": "qcrd", "namespace": "default"}
        types = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0 and types["headgroup"]["max_workers"] == 0
        for name, pool in POOLS.items():
            assert types[name]["labels"] == {"pool": pool}
            assert types[name]["resources"]["GPU"] == {"trainer": 4, "sampler": 1}[name]
            assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        # KubeRay refuses labels that are given to `ray start` and not in the field of their own.
        groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        assert not any("labels" in group["rayStartParams"] for group in groups)


def pod_templates(file: str) -> list[dict[str, Any]]:
    spec = ray_clusters(file)[0]
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_pods_and_volume_fit_the_schemas_of_kubernetes() -> None:
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed: it ships the schemas of Kubernetes"
    )
    version = kubernetes.latest_version()
    kubernetes.validate(read("cluster/kuberay/runs.yaml"), version, strict=True)
    data = read("cluster/kuberay/data.yaml")
    kubernetes.validate(data, version, strict=True)
    for file in KUBERAY_FILES:  # what it writes, they read: the same volume, at the same path, as the same user
        pod = pod_templates(file)[0]["spec"]
        assert data["spec"]["securityContext"] == pod["securityContext"]
        assert data["spec"]["volumes"][0] in pod["volumes"]
        assert data["spec"]["containers"][0]["volumeMounts"][0] in pod["containers"][0]["volumeMounts"]
    for file in KUBERAY_FILES:
        for template in pod_templates(file):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            kubernetes.validate(pod, version, strict=True)
            pod["spec"] = {**pod["spec"], "toleration": []}
            with pytest.raises(kubernetes.ValidationError, match="toleration"):
                kubernetes.validate(pod, version, strict=True)


def test_a_manifest_has_no_field_that_kuberay_would_drop() -> None:
    """Fields of KubeRay's API, v1, that are known to be right; the operator drops others without a word."""
    group = {"labels", "rayStartParams", "template"}
    worker = group | {"groupName", "minReplicas", "maxReplicas"}
    cluster = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"}
    job = {"entrypoint", "runtimeEnvYAML", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    job |= {"backoffLimit", "activeDeadlineSeconds", "rayClusterSpec"}
    assert set(read("cluster/kuberay/rayjob.yaml")["spec"]) == job
    for file in KUBERAY_FILES:
        (spec,) = ray_clusters(file)
        assert set(spec) == cluster | {"workerGroupSpecs"}
        assert set(spec["autoscalerOptions"]) == {"version", "upscalingMode", "idleTimeoutSeconds", "resources"}
        assert spec["authOptions"] == {"mode": "token"}
        assert set(spec["headGroupSpec"]) == group
        assert all(set(each) == worker for each in spec["workerGroupSpecs"])


def published_crd(name: str) -> str:
    """A file of KubeRay's chart, too large to keep here: of the folder QCRD_KUBERAY_CRDS, else of its repository."""
    if folder := os.environ.get("QCRD_KUBERAY_CRDS"):
        return (Path(folder) / name).read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(f"{KUBERAY_CRDS}/{name}", timeout=10) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError:  # the repository answers, and has no such file
        raise
    except OSError as error:
        pytest.skip(f"KubeRay's schema cannot be had ({error}), and QCRD_KUBERAY_CRDS names no folder that has it")


@pytest.mark.parametrize(
    ("file", "crd"),
    [
        ("cluster/kuberay/raycluster.yaml", "ray.io_rayclusters.yaml"),
        ("cluster/kuberay/rayjob.yaml", "ray.io_rayjobs.yaml"),
    ],
)
def test_a_manifest_fits_kuberays_published_schema(file: str, crd: str) -> None:
    definition = yaml.load(published_crd(crd), Loader=yaml.CSafeLoader)
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    manifest = read(file)
    assert (manifest["kind"], manifest["apiVersion"]) == (definition["spec"]["names"]["kind"], "ray.io/v1")
    schema["properties"]["metadata"]["properties"] = {"name": {"type": "string"}}
    jsonschema.Draft7Validator(schema).validate(manifest)
    assert list(problems(manifest, schema)) == []
    manifest["spec"]["rayVersoin"] = "2.60.0"
    assert list(problems(manifest, schema)) == [".spec.rayVersoin: unknown"]


def test_the_job_asks_for_what_its_cluster_has() -> None:
    job = read("cluster/kuberay/rayjob.yaml")["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["python", "/home/ray/qcrd_ray/jobs/train.py"]
    config_file = ROOT / words[3].removeprefix("/home/ray/qcrd_ray/")
    config = load_config(config_file, words[4:])
    assert launched("cluster/kuberay/rayjob.yaml", words[4:]) == {"trainer": 1, "sampler": 2}
    assert config.run.storage_path == "/runs" and job["shutdownAfterJobFinishes"] is True
    assert isinstance(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"], dict)
    assert job["submissionMode"] == "K8sJobMode"


def test_both_manifests_describe_the_same_cluster() -> None:
    first, second = (ray_clusters(file)[0] for file in KUBERAY_FILES)
    assert first == second


@pytest.mark.parametrize("file", KUBERAY_FILES)
def test_head_and_trainers_keep_off_spot_nodes_and_samplers_seek_them(file: str) -> None:
    spec = ray_clusters(file)[0]
    pods = {"head": spec["headGroupSpec"]["template"]["spec"]}
    pods |= {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    spot = "cloud.google.com/gke-spot"
    assert pods["sampler"]["nodeSelector"] == {spot: "true"}
    assert spot in {toleration["key"] for toleration in pods["sampler"]["tolerations"]}
    for name in ("head", "trainer"):
        required = pods[name]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert {"key": spot, "operator": "DoesNotExist"} in required["nodeSelectorTerms"][0]["matchExpressions"]
        assert spot not in {toleration["key"] for toleration in pods[name].get("tolerations", [])}
    for pod in pods.values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= volumes
        limits, requests = (pod["containers"][0]["resources"][key] for key in ("limits", "requests"))
        assert limits == requests


# What the files have in common


@pytest.mark.parametrize("file", CLOUD_FILES)
def test_only_samplers_and_trials_are_spot(file: str) -> None:
    config = read(file)
    spot = {
        name
        for name, each in config["available_node_types"].items()
        if "InstanceMarketOptions" in each["node_config"]
        or {"SPOT", True} & set(each["node_config"].get("scheduling", {}).values())
    }
    assert spot == {"sampler", "trial"}
    assert config["head_node_type"] not in spot
    for name, pool in POOLS.items():
        assert config["available_node_types"][name]["labels"] == {"pool": pool}


def test_every_file_names_the_ray_that_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pinned,) = [re.search(r"==([\d.]+)", each)[1] for each in project["dependencies"] if each.startswith("ray[")]
    python = project["requires-python"].removeprefix(">=").replace(".", "")
    assert pinned == ray.__version__
    assert f"rayproject/ray:{pinned}-py{python}-cu130" == IMAGE
    assert all(read(file)["docker"]["image"] == IMAGE for file in CLOUD_FILES)
    assert re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.M) == [IMAGE]
    assert "python3.11 -m venv" in (ROOT / "cluster/on-premise.yaml").read_text()
    for file in KUBERAY_FILES:
        assert [spec["rayVersion"] for spec in ray_clusters(file)] == [pinned]
        images = {template["spec"]["containers"][0]["image"] for template in pod_templates(file)}
        assert images == {f"REGISTRY/qcrd_ray:{project['version']}"}


def test_every_install_command_takes_the_extras_that_the_project_has() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for file in (*LAUNCHER_FILES, "Dockerfile"):
        (asked,) = re.findall(r"\[(gpu[a-z,]*)\]", (ROOT / file).read_text())
        assert set(asked.split(",")) == set(extras) - {"dev"}


@pytest.mark.parametrize("file", LAUNCHER_FILES)
def test_a_rebuilt_wheel_of_the_same_version_is_installed(file: str, tmp_path: Path) -> None:
    """The commands are run, with a file in pip's place that keeps what it was asked for."""
    asked = tmp_path / "asked"
    dist = tmp_path / "qcrd" / "dist"
    dist.mkdir(parents=True)
    for age, name in enumerate(("qcrd_ray-0.2.0-py3-none-any.whl", "qcrd_ray-0.1.0-py3-none-any.whl")):
        (dist / name).touch()
        os.utime(dist / name, (1000 + age, 1000 + age))
    for python in (tmp_path / "bin" / "python", tmp_path / "qcrd_venv" / "bin" / "python"):
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
        python.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    for command in read(file)["setup_commands"]:
        if "pip install" in command:
            command = command.replace("/home/ray/", f"{tmp_path}/")
            subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=10)
    newest = dist / "qcrd_ray-0.1.0-py3-none-any.whl"
    lines = asked.read_text().splitlines()
    assert f"{newest}[gpu," in lines[0]
    assert lines[-1] == f"-m pip install -q --no-deps --force-reinstall {newest}"


def test_the_guide_places_by_the_labels_of_the_files_and_its_commands_are_configs() -> None:
    guide = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    pools = set(re.findall(r"(train|sampler)\.node_labels=\{pool: (\w+)\}", guide))
    assert pools == {("train", "train"), ("sampler", "sample")}
    blocks = re.findall(r"(?:^    .*\n)+", guide, re.M)
    commands = [block.replace("\\\n", " ") for block in blocks if "jobs/train.py" in block]
    assert commands
    for command in commands:
        words = shlex.split(command.split("jobs/train.py", 1)[1].split("\n")[0])
        assert words[0] == "--config"
        load_config(ROOT / words[1], words[2:])
    for file in (*LAUNCHER_FILES, *KUBERAY_FILES, "Dockerfile"):
        assert file in guide


# The image


def test_every_file_that_the_image_copies_is_there_and_is_sent_to_the_builder() -> None:
    dockerfile_parse = pytest.importorskip("dockerfile_parse", reason="dockerfile-parse is not installed")
    parser = dockerfile_parse.DockerfileParser(path=str(ROOT / "Dockerfile"), cache_content=True)
    instructions = [each for each in parser.structure if each["instruction"] != "COMMENT"]
    assert instructions[0]["instruction"] == "FROM"
    assert {each["instruction"] for each in instructions} <= {"FROM", "WORKDIR", "COPY", "RUN", "USER"}
    assert [each["value"] for each in instructions if each["instruction"] == "USER"][-1] == "ray"
    sent = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for each in instructions:
        if each["instruction"] == "COPY":
            *sources, target = [word for word in each["value"].split() if not word.startswith("--")]
            assert sources and target.endswith("/")
            for source in sources:
                assert (ROOT / source).exists(), source
                assert Path(source).parts[0] in sent, source


def test_the_builder_finds_nothing_to_say_about_the_dockerfile() -> None:
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    if subprocess.run(["docker", "info"], capture_output=True, timeout=20).returncode != 0:
        pytest.skip("no docker engine answers")
    checked = subprocess.run(["docker", "build", "--check", "."], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stderr
