"""`kvcache config`: the configs that this package brings, by name. A Serve config from a name or a path.

quickstart              serve_app/configs/quickstart.yaml
service/score           serve_app/configs/service/score.yaml
direct.env              serve_app/configs/direct.env
./mine.yaml             a path: whatever is no name of the above
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.commands.console import JsonOption, print_json, say
from serve_app.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "configs"
QUICKSTART = FOLDER / "quickstart.yaml"
_SENTENCE = re.compile(r"(.+?[.])(\s|$)")

NameArgument = Annotated[str, typer.Argument(help="As `kvcache config list` shows it.")]

app = typer.Typer(no_args_is_help=True, help="Configs that come with this package.")


def shipped() -> dict[str, Path]:
    """Name -> file."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.suffix in {".yaml", ".env"})
    return {path.relative_to(FOLDER).as_posix().removesuffix(".yaml"): path for path in paths}


def find(name_or_path: str) -> Path:
    """A config that comes with this package, else the file of that path.

    Raises:
        ConfigError: it is neither.
    """
    if (known := shipped().get(name_or_path)) is not None:
        return known
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"{name_or_path!r} is no file, and no config of this package: {', '.join(shipped())}")
    return path


def load_config(path: Path, port: int | None = None) -> dict[str, Any]:
    """A Serve YAML, with the port put in.

    Raises:
        ConfigError: there is no such file, or it is not a Serve config.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, dict) or "applications" not in config:
        raise ConfigError(f"{path} is not a Serve config: it has no `applications`")
    if port is not None:
        options = config.get("http_options")
        config["http_options"] = {**(options if isinstance(options, dict) else {}), "port": port}
    return config


def description(path: Path) -> str:
    """The first sentence of the comment that the file begins with."""
    lines = (line for line in path.read_text().splitlines() if line.strip("# "))
    comment = " ".join(line.strip("# ") for line in lines if line.startswith("#"))
    found = _SENTENCE.match(comment)
    return found[1] if found else ""


@app.command("list", epilog="Example: kvcache config list --json")
def list_configs(as_json: JsonOption = False) -> None:
    """Show each config's name and what it is."""
    about = {name: description(path) for name, path in shipped().items()}
    if as_json:
        print_json([{"name": name, "about": text, "path": str(shipped()[name])} for name, text in about.items()])
        return
    table = Table("name", "what it is")
    for name, text in about.items():
        table.add_row(name, text)
    Console().print(table)


@app.command(epilog="Example: kvcache config show quickstart")
def show(name: NameArgument) -> None:
    """Print a config."""
    print(_known(name).read_text(), end="")


@app.command(epilog="Example: kvcache config copy gpu my-fleet.yaml")
def copy(
    name: NameArgument,
    to: Annotated[Path, typer.Argument(help="File or folder.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a config, to change it."""
    source = _known(name)
    target = to / source.name if to.is_dir() else to
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already: give another name, or --force")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    say(f"wrote {target}")


def _known(name: str) -> Path:
    path = shipped().get(name)
    if path is None:
        raise ConfigError(f"there is no config {name!r}; there are {', '.join(shipped())}")
    return path
