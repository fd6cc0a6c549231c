"""A hook of MkDocs (mkdocs.yml): pages that are at home elsewhere in the repository, and links that leave docs/.

In: Markdown whose relative links are right in the repository. Out: Markdown whose links are right in the site.
A link to a file that is no page leads to `repo_url`; without one it becomes the file's path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

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
_FENCE: Final = re.compile(r"(^ *```.*?^ *```)", re.M | re.S)


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' event: adds the pages of ELSEWHERE."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs' event: a page before it is rendered."""
    del files
    return within_the_site(markdown, page.file.src_uri, config.repo_url or "")


def within_the_site(markdown: str, page: str, repository: str = "") -> str:
    """Args: page: path below docs/. repository: URL of its front page; empty: there is none."""
    parts = _FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda found: _link(found, page, repository), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], page: str, repository: str) -> str:
    text, (target, hash_sign, anchor) = found[1], found[2].partition("#")
    if not target or ":" in target:
        return found[0]
    source = ROOT / ELSEWHERE[page] if page in ELSEWHERE else DOCS / page
    path = Path(os.path.normpath(source.parent / target))
    pages = {ROOT / file: DOCS / name for name, file in ELSEWHERE.items()} | {ROOT / "README.md": DOCS / "index.md"}
    path = pages.get(path, path)
    if path.is_relative_to(DOCS):
        return f"[{text}]({os.path.relpath(path, (DOCS / page).parent)}{hash_sign}{anchor})"
    name = str(path.relative_to(ROOT))
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{name}{hash_sign}{anchor})"
    return text if text.strip("`").rstrip("/") == name else f"{text} (`{name}`)"
