"""An environment with what an extra installs and nothing else, in a second and without a network.

In: the project's wheel, and the distributions that the tests themselves run with. Out: a virtual environment whose
site-packages links to the files of those that the wheel's metadata asks for, and of those that they ask for.
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "kvcache-manager"


@dataclass(frozen=True, slots=True)
class Environment:
    folder: Path
    names: frozenset[str]  # of the distributions in it, canonical

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Python with these arguments, in the environment alone.

        Args:
            more: environment variables.
        """
        return subprocess.run(
            [self.folder / "bin" / "python", "-I", *arguments],
            cwd=self.folder,  # where no checkout is
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **more},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def kvcache(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "serve_app.cli", *arguments)


def make(folder: Path, wheel: Path, extra: str = "") -> Environment:
    """Args: extra: "" is the base installation."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    needed = closure(wheel, extra)
    for each in needed.values():
        _link(each, site)
    return Environment(folder, frozenset(needed))


def requirements(wheel: Path, extra: str = "") -> list[Requirement]:
    """What the wheel asks for, with the extras of its own that an extra is made of."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requires = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    found: list[Requirement] = []
    extras = list(dict.fromkeys(("", extra)))
    for each in extras:  # grows while it is walked
        for one in _of_extra(requires, each):
            if canonicalize_name(one.name) == PROJECT:
                extras.extend(one.extras - set(extras))
            else:
                found.append(one)
    return found


def closure(wheel: Path, extra: str = "") -> Mapping[str, Distribution]:
    """Canonical name -> all that `pip install "WHEEL[extra]"` would install beside the project, as it is here."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(each.name, one) for each in requirements(wheel, extra) for one in ("", *each.extras)]
    while left:
        name, wanted = canonicalize_name(left[-1][0]), left.pop()[1]
        if (name, wanted) not in seen:
            seen.add((name, wanted))
            found[name] = _installed(name)
            for each in _of_extra(found[name].requires or [], wanted):
                left.extend((each.name, one) for one in ("", *each.extras))
    return found


def _of_extra(requires: Iterable[str], extra: str) -> Iterator[Requirement]:
    """Those that this extra adds, or "" has, on this platform."""
    for each in map(Requirement, requires):
        if each.marker is None or each.marker.evaluate({"extra": extra}):
            yield each


def _installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise AssertionError(f"{name} is in pyproject.toml and not installed here: run `make setup`") from None


def _link(each: Distribution, site: Path) -> None:
    """Whole packages where no other distribution has a part in them, else file by file."""
    for file in each.files or ():
        if ".." in file.parts:  # a command, beside site-packages
            continue
        name = file.parts[0] if file.parts[0] in _of_one() else str(file)
        link = site / name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(str(each.locate_file(name)))


@cache
def _of_one() -> frozenset[str]:
    """Top-level packages that one distribution alone has files of."""
    return frozenset(name for name, owners in packages_distributions().items() if len(set(owners)) == 1)
