"""Writes the pages of the site: docs/, and pages that are at home elsewhere in the repository.

    python scripts/site_pages.py build/docs

In: Markdown whose relative links are right in the repository. Out: Markdown whose links are right in the site.
A link to a file that is no page becomes the file's path; with KVCACHE_REPOSITORY_URL it leads there.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
ELSEWHERE: Final = {
    "cluster.md": "cluster/README.md",
    "examples.md": "examples/README.md",
    "security.md": "SECURITY.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site -> the file that it is made of."""

LINK: Final = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_FENCE: Final = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def copy(destination: Path) -> None:
    """Writes the site's pages: docs/, and those of ELSEWHERE."""
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(DOCS, destination)
    for page in [*(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")), *ELSEWHERE]:
        text = source(page).read_text()
        (destination / page).write_text(within_the_site(text, page, os.environ.get("KVCACHE_REPOSITORY_URL", "")))


def source(page: str) -> Path:
    """Of a page of the site: the file in the repository."""
    return ROOT / ELSEWHERE[page] if page in ELSEWHERE else DOCS / page


def within_the_site(markdown: str, page: str, repository: str = "") -> str:
    """Args: page: path below docs/. repository: URL of its front page; empty: there is none."""
    parts = _FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda found: _link(found, page, repository), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], page: str, repository: str) -> str:
    text, (target, hash_sign, anchor) = found[1], found[2].partition("#")
    if not target or ":" in target:
        return found[0]
    path = Path(os.path.normpath(source(page).parent / target))
    pages = {ROOT / file: DOCS / name for name, file in ELSEWHERE.items()} | {ROOT / "README.md": DOCS / "index.md"}
    path = pages.get(path, path)
    if path.is_relative_to(DOCS):
        return f"[{text}]({os.path.relpath(path, (DOCS / page).parent)}{hash_sign}{anchor})"
    name = str(path.relative_to(ROOT))
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{name}{hash_sign}{anchor})"
    return text if text.strip("`").rstrip("/") == name else f"{text} (`{name}`)"


if __name__ == "__main__":
    copy(Path(sys.argv[1]))
