"""The image: the official one of the supported release, with our wheel and nothing else moved."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [
        (name, rest.strip())
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def final_stage() -> list[tuple[str, str]]:
    parsed = instructions()
    start = max(i for i, (name, _) in enumerate(parsed) if name == "FROM")
    return parsed[start:]


def run_step(containing: str) -> str:
    """Return the shell text of a RUN instruction, without its mounts."""
    step = next(rest for name, rest in final_stage() if name == "RUN" and containing in rest)
    return re.sub(r"^(--mount=\S+\s+)+", "", step)


def test_base_is_the_official_image_of_the_supported_release():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned, *_ = project["optional-dependencies"]["cuda"]
    arguments = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    assert final_stage()[0] == ("FROM", "${BASE_IMAGE}")
    base = arguments["BASE_IMAGE"].replace("${VLLM_VERSION}", arguments["VLLM_VERSION"])
    assert base == "docker.io/vllm/vllm-openai:v" + pinned.removeprefix("vllm==")


def test_steps_need_no_shell_but_posix():
    """Images in OCI format have no SHELL: podman and buildah drop it, and run /bin/sh."""
    assert not [rest for name, rest in instructions() if name == "SHELL"]
    steps = [
        re.sub(r"^(--mount=\S+\s+)+", "", rest) for name, rest in instructions() if name == "RUN"
    ]
    assert len(steps) == 4
    for step in steps:
        subprocess.run(["sh", "-n", "-c", step], check=True)
        assert ";" not in step or step.startswith(("set -eu; ", "python3 ")), "all parts count"


def test_labels_name_version_revision_and_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    arguments = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    assert arguments["VERSION"] == project["version"]
    assert 'image.licenses="' + project["license"] in last("LABEL")
    make = (ROOT / "Makefile").read_text()
    for name in ("version", "revision", "source"):
        label = f'org.opencontainers.image.{name}="${{{name.upper()}}}"'
        assert label in last("LABEL")
        assert f"--build-arg {name.upper()}=" in make


def test_runs_as_a_user_that_is_not_root():
    assert re.fullmatch(r"[1-9]\d*(:\d+)?", last("USER")), "Kubernetes checks only a number"


def test_cache_is_inside_the_users_home():
    environment = dict(
        part.split("=", 1) for name, rest in final_stage() if name == "ENV" for part in rest.split()
    )
    assert environment["TRITON_CACHE_DIR"].startswith(environment["HOME"] + "/.cache/")
    step = run_step("chown")
    assert f"mkdir -p {environment['HOME']}/.cache" in step
    assert f"chown -R {last('USER')} {environment['HOME']}" in step
    assert f"chmod -R a+rwX {environment['HOME']}" in step, "whatever user a platform chooses"


def test_health_check_asks_the_port_that_is_exposed():
    check = last("HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    assert command[-1] == f"http://127.0.0.1:{last('EXPOSE')}/health"


def test_flags_go_to_vllm_serve_unchanged():
    assert json.loads(last("ENTRYPOINT")) == ["vllm", "serve"]
    assert not [rest for name, rest in final_stage() if name == "CMD"]


def test_everything_copied_exists_and_reaches_the_build_context():
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for name, rest in instructions():
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in allowed, source


def test_all_of_the_package_is_copied():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    copied = [rest.split()[0] for name, rest in instructions() if name == "COPY"]
    for folder in setuptools["package-dir"].values():
        assert any(folder == source or folder.startswith(source + "/") for source in copied)


@pytest.mark.parametrize(
    ("after", "code"),
    [
        pytest.param("torch==2.13.0\nvllm==0.32.0\n", 0, id="nothing moved"),
        pytest.param("torch==2.14.0\nvllm==0.32.0\n", 1, id="a version moved"),
        pytest.param("torch==2.13.0\nvllm==0.32.0\nsix==1.17.0\n", 1, id="one was added"),
        pytest.param("vllm==0.32.0\n", 1, id="one is gone"),
        pytest.param(None, 3, id="what is there cannot be told"),
    ],
)
def test_build_fails_if_another_distribution_moved(tmp_path: Path, after: str | None, code: int):
    """The Dockerfile's own step, with a pip that changes what `after` says."""
    (tmp_path / "frozen").write_text("torch==2.13.0\nvllm==0.32.0\n")
    if after is not None:
        (tmp_path / "after").write_text(after)
    python = tmp_path / "python3"
    python.write_text(
        "#!/bin/sh\n"
        f'if [ "$3" = freeze ]; then cat {tmp_path}/frozen || exit 3; fi\n'
        f'if [ "$3" = install ]; then echo "$@" > {tmp_path}/call; '
        f"mv {tmp_path}/frozen {tmp_path}/old; "
        f"[ ! -e {tmp_path}/after ] || cp {tmp_path}/after {tmp_path}/frozen; fi\n"
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", run_step("pip install")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "--no-deps --no-index" in (tmp_path / "call").read_text()


def test_build_checks_that_the_plugin_loads_in_this_vllm(tmp_path: Path):
    command = shlex.split(run_step("unsupported_version"))
    assert command[:2] == ["python3", "-c"]
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)


def test_the_script_of_the_image_skips_in_one_sentence_but_never_in_ci(tmp_path: Path):
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    (tmp_path / "sed").symlink_to("/usr/bin/sed")
    (tmp_path / "tr").symlink_to("/usr/bin/tr")
    for ci, code in (("", 0), ("true", 1)):
        done = subprocess.run(
            ["/bin/bash", str(ROOT / "deploy/image-test.sh")],
            env={"PATH": str(tmp_path), "CI": ci}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert done.stdout == (
            "image-test: skipped: needs Docker, or buildah, podman and runc; found no buildah\n"
        )
