"""Compose: it parses, agrees with the image and the pages, and uses flags that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def kubernetes() -> list[str]:
    pod = load("kubernetes/statefulset.yaml")["spec"]["template"]["spec"]
    return pod["containers"][0]["args"]


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
        "kubernetes": kubernetes()[: kubernetes().index("--shutdown-timeout")],
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
