"""The live page is in the wheel: nothing builds it, and nothing else brings it."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

PAGE = Path("serve_app/service/page")


def test_every_file_of_the_page_is_in_the_wheel(wheel: Path) -> None:
    root = Path(__file__).parents[2]
    files = {path.relative_to(root).as_posix() for path in (root / PAGE).iterdir()}
    assert {f"{PAGE}/{name}" for name in ("index.html", "page.css", "app.js", "icon.svg")} <= files
    assert files <= set(ZipFile(wheel).namelist())
