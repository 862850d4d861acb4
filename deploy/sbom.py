"""Write what the image adds to its base, as CycloneDX: ``make sbom``, into build/sbom.json.

The image adds one wheel without dependencies. The base image is named as the component that it
is installed into; its own contents are its publisher's to list.
"""

import argparse
import hashlib
import json
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any


def wheel_metadata(wheel: Path) -> dict[str, str]:
    """Return name, version, licence and summary from a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
    if required := fields.get_all("Requires-Dist"):
        plain = [one for one in required if "extra ==" not in one]
        if plain:
            raise SystemExit(f"sbom: {wheel.name} depends on {', '.join(plain)}, must add nothing")
    return {
        "name": fields["Name"], "version": fields["Version"],
        "licence": fields["License-Expression"], "summary": fields["Summary"],
    }  # fmt: skip


def sbom(wheel: Path, base: str) -> dict[str, Any]:
    """Return the bill of materials of an image.

    Args:
        wheel: what is installed.
        base: the base image, with its digest where that is known.
    """
    about = wheel_metadata(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    name, _, tag = base.partition("@")[0].rpartition(":")
    package = f"pkg:pypi/{about['name']}@{about['version']}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {
            "type": "container", "bom-ref": "image", "name": "s2o-vllm",
            "version": about["version"],
        }},
        "components": [
            {
                "type": "library", "bom-ref": package, "name": about["name"],
                "version": about["version"], "description": about["summary"], "purl": package,
                "licenses": [{"expression": about["licence"]}],
                "hashes": [{"alg": "SHA-256", "content": digest}],
            },
            {"type": "container", "bom-ref": "base", "name": name, "version": tag},
        ],
        "dependencies": [
            {"ref": "image", "dependsOn": [package, "base"]},
            {"ref": package, "dependsOn": []},
        ],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="that the image installs")
    parser.add_argument("--base", required=True, help="the base image: name:tag or name:tag@digest")
    parser.add_argument("--out", type=Path, default=Path("build/sbom.json"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(sbom(options.wheel, options.base), indent=1) + "\n")
    print(f"{options.out}: {options.wheel.name} on {options.base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
