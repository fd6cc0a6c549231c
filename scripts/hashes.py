"""pip's report of an installation -> requirements with the hash of every file: `pip install --require-hashes -r`.

In: the JSON that `pip install --dry-run --report` writes, the name of the file and its extras. Out, on stdout:
one requirement a line, of this platform. With --versions instead of a name the head and the hashes are left out: lines
of a constraints file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = """\
# What `.[{extras}]` needs (no engine, no tools), with the hash of each file: for an image, as
#   pip install --require-hashes --no-deps -r {file} && pip install --no-deps .
# Python 3.11, Linux x86-64. Written by `make lock`, at the versions of constraints.txt. Do not edit by hand.
"""


def main(report: str, file: str, extras: str = "") -> None:
    lines = []
    for item in json.loads(Path(report).read_text())["install"]:
        archive = item["download_info"].get("archive_info")
        if archive is None:  # the project's own folder
            continue
        name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
        lines.append(
            f"{name}=={version.partition('+')[0]}"  # 2.13.0 is that of every build
            if file == "--versions"
            else f"{name}=={version} --hash=sha256:{archive['hashes']['sha256']}"
        )
    head = "" if file == "--versions" else HEAD.format(file=file, extras=extras)
    print(head + "\n".join(sorted(lines)))


if __name__ == "__main__":
    main(*sys.argv[1:])
