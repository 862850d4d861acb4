"""Compose and Kubernetes: they parse, agree with the image, and use flags that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMMAND = re.compile(r"s2o-vllm (--model .*?--s2o-sparsity-budget \S+)", re.S)

PARSE = """
import json, sys
from s2o_vllm.config import FLAGS
from s2o_vllm.plugin import register
register()
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for command in json.loads(sys.argv[1]):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    given = args.additional_config[FLAGS]
    found = [args.model, args.max_model_len, str(args.attention_backend), given["sparsity_budget"]]
    print("PARSED", json.dumps(found))
"""


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def compose() -> dict[str, Any]:
    return load("compose.yaml")["services"]


def container() -> dict[str, Any]:
    (container,) = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]["containers"]
    return container


def documented(path: Path) -> list[str]:
    text = COMMAND.search(path.read_text())
    assert text, f"{path.name} does not show the documented command"
    return re.sub(r"\\\n#?", " ", text[1]).split()


def with_defaults(text: str) -> str:
    """Fill in compose's variables as if none was set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def commands() -> dict[str, list[str]]:
    return {
        "Dockerfile": documented(ROOT / "Dockerfile"),
        "README": documented(DEPLOY / "README.md"),
        "compose": [with_defaults(part) for part in compose()["server"]["command"]],
        "kubernetes": container()["args"],
    }


def test_the_documented_command_is_the_same_everywhere():
    expected = commands()["Dockerfile"]
    assert commands() == dict.fromkeys(commands(), expected)


def test_vllm_accepts_the_documented_command():
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps([commands()["Dockerfile"]])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PARSED")]
    model, context, backend, budget = json.loads(line.removeprefix("PARSED "))
    assert (model, context, budget) == ("meta-llama/Llama-3.1-8B-Instruct", 131072, 0.1)
    assert "CUSTOM" in backend or backend.upper() == "S2O"


def test_every_compose_service_is_checked_and_pinned():
    for name, service in compose().items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_compose_opens_nothing_to_other_hosts_by_default():
    ports = [port for service in compose().values() for port in service["ports"]]
    assert ports
    for port in ports:
        assert with_defaults(port).startswith("127.0.0.1:")


def test_compose_reserves_a_gpu_and_keeps_the_model_cache():
    server = compose()["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "model-cache:/home/vllm/.cache" in server["volumes"]
    assert "model-cache" in load("compose.yaml")["volumes"]
    assert "HF_TOKEN" in server["environment"], "passed on by name, never written down"


def test_compose_mounts_exist():
    for service in compose().values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source


def test_prometheus_scrapes_the_compose_server():
    (job,) = load("prometheus/prometheus.yml")["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    (target,) = job["static_configs"][0]["targets"]
    service, port = target.split(":")
    assert service in compose()
    assert compose()[service]["ports"][0].endswith(f":{port}:{port}")


def test_grafana_is_provisioned_from_what_is_mounted():
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load("grafana/provisioning/dashboards/s2o.yaml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in compose()["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = compose()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana/dashboards" / Path(home).name).exists()
    assert Path(home).parent == Path(provider["options"]["path"])


def test_kustomization_names_every_manifest():
    kustomization = load("kubernetes/kustomization.yaml")
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    optional = {"kustomization.yaml", "podmonitor.yaml"}
    assert set(kustomization["resources"]) == files - optional
    assert kustomization["images"][0]["name"] == container()["image"]


def test_the_pod_is_not_root_and_has_one_gpu():
    pod = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    user = (ROOT / "Dockerfile").read_text().rpartition("\nUSER ")[2].split(":")[0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert container()["securityContext"]["allowPrivilegeEscalation"] is False
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_the_servers_health(probe: str):
    ports = {port["name"] for port in container()["ports"]}
    get = container()[probe]["httpGet"]
    assert get["path"] == "/health"
    assert get["port"] in ports


def test_startup_has_time_to_load_and_compile():
    probe = container()["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 20 * 60


def test_kubernetes_selectors_volumes_and_ports_fit_together():
    deployment = load("kubernetes/deployment.yaml")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    service = load("kubernetes/service.yaml")["spec"]
    monitor = load("kubernetes/podmonitor.yaml")["spec"]
    ports = {port["name"] for port in container()["ports"]}
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["selector"].items() <= labels.items()
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert {port["targetPort"] for port in service["ports"]} <= ports
    assert {end["port"] for end in monitor["podMetricsEndpoints"]} <= ports
    volumes = {volume["name"] for volume in deployment["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert set(mounts) == volumes
    assert mounts["cache"] == "/home/vllm/.cache"
    claim = deployment["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == load("kubernetes/cache.yaml")["metadata"]["name"]


def test_secrets_are_only_referred_to():
    (token,) = container()["env"]
    assert token["name"] == "HF_TOKEN"
    assert "value" not in token
    assert token["valueFrom"]["secretKeyRef"]["optional"] is True
