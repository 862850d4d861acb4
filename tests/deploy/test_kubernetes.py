"""Kubernetes and platforms on it: fields that schemas know, and parts that fit together.

Kinds of Kubernetes itself are checked by its own schemas, strictly. Kinds of others are checked by
the fields below, which their definitions have; their pods by Kubernetes' schema again.
"""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES, PLATFORMS = ROOT / "deploy/kubernetes", ROOT / "deploy/platforms"
VERSIONS = ("1.31", "1.37")  # the oldest that is checked, and the newest
ANY: dict = {}  # not looked into
POD: dict = {"pod": True}  # a pod's specification, see `pods`
TEMPLATE = {"metadata": ANY, "spec": POD}
OF_OTHERS: dict[str, Any] = {
    "ServiceMonitor": {
        "selector": {"matchLabels": ANY},
        "endpoints": [{"port": ANY, "path": ANY, "interval": ANY}],
    },
    "ScaledObject": {
        "scaleTargetRef": {"apiVersion": ANY, "kind": ANY, "name": ANY},
        "minReplicaCount": ANY, "maxReplicaCount": ANY, "pollingInterval": ANY,
        "cooldownPeriod": ANY, "fallback": {"failureThreshold": ANY, "replicas": ANY},
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {
            "stabilizationWindowSeconds": ANY,
            "policies": [{"type": ANY, "value": ANY, "periodSeconds": ANY}],
        }}}},
        "triggers": [{
            "type": ANY, "metricType": ANY,
            "metadata": {"serverAddress": ANY, "query": ANY, "threshold": ANY},
        }],
    },
    "LeaderWorkerSet": {
        "replicas": ANY, "startupPolicy": ANY,
        "leaderWorkerTemplate": {
            "size": ANY, "restartPolicy": ANY, "leaderTemplate": TEMPLATE,
            "workerTemplate": TEMPLATE, "volumeClaimTemplates": ANY,
        },
    },
    "InferenceService": {"predictor": {"minReplicas": ANY, "maxReplicas": ANY} | POD},
}  # fmt: skip
# Fields of the charts' values, and of Ray Serve's applications.
VALUES: dict[str, Any] = {
    "production-stack": {
        "servingEngineSpec": {
            "enableEngine": ANY, "vllmApiKey": {"secretName": ANY, "secretKey": ANY},
            "serviceMonitor": {"enabled": ANY, "interval": ANY}, "tolerations": ANY,
            "modelSpec": [{
                "name": ANY, "repository": ANY, "tag": ANY, "modelURL": ANY,
                "hf_token": {"secretName": ANY, "secretKey": ANY}, "replicaCount": ANY,
                "requestCPU": ANY, "requestMemory": ANY, "requestGPU": ANY, "pvcStorage": ANY,
                "pvcAccessMode": ANY, "vllmConfig": {
                    "enablePrefixCaching": ANY, "maxModelLen": ANY, "extraArgs": ANY,
                },
            }],
        },
        "routerSpec": {"enableRouter": ANY, "routingLogic": ANY, "sessionKey": ANY},
    },
    "llm-d": {
        "modelArtifacts": {
            "name": ANY, "uri": ANY, "size": ANY, "authSecretName": ANY, "labels": ANY,
        },
        "routing": {"servicePort": ANY, "proxy": {"enabled": ANY}},
        "decode": {
            "create": ANY, "replicas": ANY, "parallelism": {"tensor": ANY},
            "containers": [{
                "name": ANY, "image": ANY, "modelCommand": ANY, "args": ANY, "env": ANY,
                "ports": ANY, "resources": ANY, "mountModelVolume": ANY,
            }],
            "monitoring": {"podmonitor": {
                "enabled": ANY, "portName": ANY, "path": ANY, "interval": ANY,
            }},
        },
        "prefill": {"create": ANY},
    },
    "ray-serve": {
        "applications": [{
            "name": ANY, "route_prefix": ANY, "import_path": ANY,
            "args": {"llm_configs": [{
                "model_loading_config": {"model_id": ANY}, "accelerator_type": ANY,
                "deployment_config": {"autoscaling_config": {
                    "min_replicas": ANY, "max_replicas": ANY, "target_ongoing_requests": ANY,
                }},
                "engine_kwargs": {
                    "max_model_len": ANY, "attention_backend": ANY, "additional_config": ANY,
                },
            }]},
        }],
    },
}  # fmt: skip
PARSE = """
import json, sys
from s2o_vllm.config import FLAGS
from s2o_vllm.plugin import register
register()
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for command in json.loads(sys.argv[1]):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    print("PARSED", json.dumps([args.additional_config[FLAGS], args.shutdown_timeout]))
"""


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / "deploy" / path).read_text())


def manifests() -> dict[str, dict[str, Any]]:
    paths = [*KUBERNETES.rglob("*.yaml"), PLATFORMS / "kserve.yaml"]
    found = {str(path.relative_to(ROOT / "deploy")): yaml.safe_load(path.read_text())
             for path in sorted(paths)}  # fmt: skip
    return {name: one for name, one in found.items() if "kustomize" not in one["apiVersion"]}


def unknown(found: Any, known: Any, where: str = "") -> list[str]:
    """Return the fields that are not known; a pod's are left to its own schema."""
    if known is ANY:
        return []
    if isinstance(known, list):
        return [one for each in found for one in unknown(each, known[0], where + "[]")]
    if known.get("pod"):
        return []
    fields = [f"{where}.{key}" for key in found if key not in known]
    inner = [unknown(found[key], known[key], f"{where}.{key}") for key in found if key in known]
    return fields + [one for each in inner for one in each]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the specifications of a manifest's pods."""
    spec = manifest["spec"]
    if manifest["kind"] == "StatefulSet":
        return [spec["template"]["spec"]]
    if manifest["kind"] == "LeaderWorkerSet":
        both = spec["leaderWorkerTemplate"]
        return [both["leaderTemplate"]["spec"], both["workerTemplate"]["spec"]]
    if manifest["kind"] == "InferenceService":
        own = OF_OTHERS["InferenceService"]["predictor"]
        return [{key: value for key, value in spec["predictor"].items() if key not in own}]
    return []


def servers() -> dict[str, dict[str, Any]]:
    """Return every container that serves, by manifest and place."""
    return {
        f"{name} {number}": pod["containers"][0] | {"pod": pod}
        for name, manifest in manifests().items()
        for number, pod in enumerate(pods(manifest))
    }


def value(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", manifests())
def test_schemas_know_every_field(name: str, version: str):
    manifest = manifests()[name]
    own = OF_OTHERS.get(manifest["kind"])
    if own is None:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    assert unknown(manifest["spec"], own) == []
    for pod in pods(manifest):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        kubernetes_validate.validate(whole, version, strict=True)


def test_schemas_refuse_what_they_do_not_know():
    manifest = copy.deepcopy(manifests()["kubernetes/statefulset.yaml"])
    manifest["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[1], strict=True)
    spec = {"endpoints": [{"port": "http", "paths": "/"}]}
    assert unknown(spec, OF_OTHERS["ServiceMonitor"]) == [".endpoints[].paths"]


@pytest.mark.parametrize("name", VALUES)
def test_values_are_fields_of_their_charts(name: str):
    assert unknown(load(f"platforms/{name}.yaml"), VALUES[name]) == []
    assert {path.stem for path in PLATFORMS.glob("*.yaml")} == {*VALUES, "kserve"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
@pytest.mark.parametrize(("folder", "kinds"), [
    (".", ["NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"]),
    ("multinode", ["LeaderWorkerSet", "Service"]),
])  # fmt: skip
def test_kustomize_renders(folder: str, kinds: list[str]):
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert sorted(one["kind"] for one in rendered) == kinds
    assert "image: s2o-vllm:0.1.0" in done.stdout


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
def test_components_add_monitoring_and_autoscaling(tmp_path: Path):
    shutil.copytree(KUBERNETES, tmp_path / "own")
    path = tmp_path / "own/kustomization.yaml"
    path.write_text(path.read_text().replace("# components", "components").replace("#   -", "  -"))
    done = subprocess.run(
        ["kubectl", "kustomize", str(path.parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = {one["kind"] for one in yaml.safe_load_all(done.stdout)}
    assert kinds >= {"ServiceMonitor", "ScaledObject", "StatefulSet"}


def test_every_manifest_is_a_resource_of_a_kustomization():
    for path in KUBERNETES.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        files = {one.name for one in path.parent.glob("*.yaml")} - {path.name}
        assert set(kustomization["resources"]) == files, path
        for image in kustomization.get("images", []):
            assert image["name"] == "s2o-vllm"


def test_the_version_is_the_packages():
    version = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version")
    )
    tags = [image["newTag"] for path in ("kubernetes", "kubernetes/multinode")
            for image in load(f"{path}/kustomization.yaml")["images"]]  # fmt: skip
    assert tags == [version, version]
    stack = load("platforms/production-stack.yaml")["servingEngineSpec"]["modelSpec"][0]
    assert stack["tag"] == version
    images = [load("platforms/llm-d.yaml")["decode"]["containers"][0]["image"]]
    images.append(load("platforms/kserve.yaml")["spec"]["predictor"]["containers"][0]["image"])
    assert {image.rpartition(":")[2] for image in images} == {version}


def test_pods_are_not_root_and_write_to_volumes_alone():
    user = (ROOT / "Dockerfile").read_text().rpartition("\nUSER ")[2].split(":")[0]
    assert len(servers()) == 4
    for name, server in servers().items():
        pod = server["pod"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == int(user), name
        assert server["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert server["securityContext"]["readOnlyRootFilesystem"] is True, name
        assert server["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
        assert set(mounts.values()) == {"/home/vllm/.cache", "/tmp", "/dev/shm"}, name
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert set(mounts) - volumes <= {"cache"}, "which is claimed for each pod"
        assert server["resources"]["limits"]["nvidia.com/gpu"] >= 1
        assert {one["key"] for one in pod["tolerations"]} == {"nvidia.com/gpu"}


def test_a_pod_that_ends_is_forgotten_first_and_drains_within_its_grace():
    for name, server in servers().items():
        if "--headless" in server["args"]:
            continue
        seconds = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = int(value(server["args"], "--shutdown-timeout"))
        grace = server["pod"]["terminationGracePeriodSeconds"]
        assert seconds >= 10, name
        assert seconds + drain < grace, name


def test_liveness_asks_for_a_token_and_outlasts_its_own_patience():
    for name, server in servers().items():
        if "--headless" in server["args"]:
            continue
        command = server["livenessProbe"]["exec"]["command"]
        assert command[:2] == ["s2o", "probe"], name
        assert float(value(command, "--timeout")) + 10 < server["livenessProbe"]["timeoutSeconds"]
        for probe in ("startupProbe", "readinessProbe"):
            assert server[probe]["httpGet"]["path"] == "/health", name
        startup = server["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 20 * 60, name


def test_secrets_are_only_referred_to():
    environments = [server["env"] for server in servers().values()]
    environments.append(load("platforms/llm-d.yaml")["decode"]["containers"][0]["env"])
    for environment in environments:
        assert {one["name"] for one in environment} >= {"VLLM_API_KEY"}
        assert not any("value" in one for one in environment)
    stack = load("platforms/production-stack.yaml")["servingEngineSpec"]
    assert stack["vllmApiKey"] == {"secretName": "s2o-vllm", "secretKey": "api-key"}


@pytest.mark.parametrize(("folder", "kind"), [
    ("kubernetes", "statefulset"), ("kubernetes/multinode", "leaderworkerset"),
])  # fmt: skip
def test_selectors_and_ports_fit_together(folder: str, kind: str):
    spec = load(f"{folder}/{kind}.yaml")["spec"]
    template = spec.get("template") or spec["leaderWorkerTemplate"]["leaderTemplate"]
    labels = template["metadata"]["labels"]
    (server,) = template["spec"]["containers"]
    service = load(f"{folder}/service.yaml")["spec"]
    assert service["selector"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= set(ports)
    assert ports["http"] == 8000
    if kind == "leaderworkerset":
        worker = spec["leaderWorkerTemplate"]["workerTemplate"]["metadata"]["labels"]
        assert not service["selector"].items() <= worker.items(), "workers have no server"
        return
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert spec["serviceName"] == load(f"{folder}/service.yaml")["metadata"]["name"]
    budget = load(f"{folder}/poddisruptionbudget.yaml")["spec"]
    policy = load(f"{folder}/networkpolicy.yaml")["spec"]
    assert budget["selector"] == policy["podSelector"] == spec["selector"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} <= set(ports)


def test_the_operators_find_the_service_and_its_replicas():
    service = load("kubernetes/service.yaml")
    monitor = load("kubernetes/monitoring/servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {one["port"] for one in monitor["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    scaled = load("kubernetes/autoscaling/scaledobject.yaml")["spec"]
    target = load("kubernetes/statefulset.yaml")
    assert scaled["scaleTargetRef"] == {
        "apiVersion": target["apiVersion"], "kind": target["kind"],
        "name": target["metadata"]["name"],
    }  # fmt: skip
    assert scaled["minReplicaCount"] < scaled["maxReplicaCount"]
    (trigger,) = scaled["triggers"]
    assert f'service="{service["metadata"]["name"]}"' in trigger["metadata"]["query"]
    assert all(isinstance(one, str) for one in trigger["metadata"].values())


def test_leader_and_workers_agree_on_everything_but_who_answers():
    leader, worker = (
        server["args"] for name, server in servers().items() if "leaderworkerset" in name
    )
    assert leader[: leader.index("--shutdown-timeout")] == worker[: worker.index("--headless")]
    size = load("kubernetes/multinode/leaderworkerset.yaml")["spec"]["leaderWorkerTemplate"]["size"]
    assert int(value(leader, "--pipeline-parallel-size")) == size
    gpus = next(server for name, server in servers().items() if "leaderworkerset" in name)
    assert (
        int(value(leader, "--tensor-parallel-size"))
        == (gpus["resources"]["limits"]["nvidia.com/gpu"])
    )


def test_vllm_accepts_every_command():
    commands = [
        server["args"] for server in servers().values() if "--headless" not in server["args"]
    ]
    filled = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "0", "$(LWS_LEADER_ADDRESS)": "a"}
    commands = [[filled.get(word, word) for word in command] for command in commands]
    stack = load("platforms/production-stack.yaml")["servingEngineSpec"]["modelSpec"][0]
    commands.append(stack["vllmConfig"]["extraArgs"])
    commands.append(load("platforms/llm-d.yaml")["decode"]["containers"][0]["args"])
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(commands)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("PARSED")]
    parsed = [json.loads(line.removeprefix("PARSED ")) for line in lines]
    assert parsed == [[{"sparsity_budget": 0.1}, 300]] * len(commands)


def test_rays_engine_arguments_are_vllms():
    from vllm.engine.arg_utils import EngineArgs

    from s2o_vllm.config import S2OConfig

    (application,) = load("platforms/ray-serve.yaml")["applications"]
    engine = application["args"]["llm_configs"][0]["engine_kwargs"]
    assert set(engine) <= set(EngineArgs.__dataclass_fields__)
    assert engine["attention_backend"] == "CUSTOM"
    assert set(engine["additional_config"]["s2o"]) <= set(S2OConfig.__dataclass_fields__)
