"""pip's report of an installation -> requirements with the hash of every file: `pip install --require-hashes -r`.

In: the JSON that `pip install --dry-run --report` writes. Out, on stdout: one requirement a line, of this platform.
With --versions before it the hashes and the head are left out: lines of a constraints file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = """\
# What the package needs with its extras `serve` and `service` (no engine, no tools), with the hash of each file: for an
# image, as
#   pip install --require-hashes --no-deps -r requirements.lock && pip install --no-deps .
# Python 3.11, Linux x86-64. Written by `make lock`, at the versions of constraints.txt. Do not edit by hand.
"""


def main(report: str, with_hashes: bool) -> None:
    lines = []
    for item in json.loads(Path(report).read_text())["install"]:
        archive = item["download_info"].get("archive_info")
        if archive is None:  # the project's own folder
            continue
        name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
        lines.append(
            f"{name}=={version} --hash=sha256:{archive['hashes']['sha256']}"
            if with_hashes
            else f"{name}=={version.partition('+')[0]}"  # 2.13.0 is that of every build
        )
    print((HEAD if with_hashes else "") + "\n".join(sorted(lines)))


if __name__ == "__main__":
    main(sys.argv[-1], with_hashes="--versions" not in sys.argv)
