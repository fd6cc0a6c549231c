"""Examples that are a config: each is the one that is tested with real engines, and differs from the plain one so."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import RouterSettings

ROOT = Path(__file__).parents[2]
EXAMPLES, CONFIGS = ROOT / "examples", ROOT / "configs"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_every_folder_is_in_the_table_and_has_a_readme() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert set(re.findall(r"^\| \[(.+?)\]\((?:.+?)/\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == folders
    assert all((EXAMPLES / folder / "README.md").exists() for folder in folders)


def test_links_lead_somewhere() -> None:
    for readme in EXAMPLES.rglob("README.md"):
        for target in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
            assert target.startswith("https://") or (readme.parent / target).exists(), f"{readme}: {target}"


class TestRayServeDropIn:
    FOLDER = EXAMPLES / "ray-serve-drop-in"

    def added(self) -> list[str]:
        before, after = ((self.FOLDER / f"{name}.yaml").read_text().splitlines()[1:] for name in ("before", "after"))
        changes = [line for line in difflib.ndiff(before, after) if line[:1] in "+-"]
        assert all(line.startswith("+ ") for line in changes)
        return [line[2:] for line in changes]

    def test_three_settings_are_all_that_changes(self) -> None:
        added = self.added()
        assert re.findall(r"# (\d):", "\n".join(added)) == ["1", "2", "3"]
        assert len(added) == 4  # the second is of two lines
        shown = [line[1:].strip() for line in (self.FOLDER / "README.md").read_text().splitlines() if line[:1] == "+"]
        assert shown == [line.strip() for line in added]

    def test_it_is_the_config_that_is_tested_with_real_engines(self) -> None:
        assert load(self.FOLDER / "after.yaml") == load(CONFIGS / "serve-llm-drop-in.yaml")


class TestLMCacheSharedTier:
    FOLDER = EXAMPLES / "lmcache-shared-tier"

    def test_it_is_the_config_that_is_tested_with_real_engines(self) -> None:
        assert load(self.FOLDER / "serve.yaml") == load(CONFIGS / "quickstart-lmcache.yaml")

    def test_it_is_the_quickstart_with_the_section_that_the_readme_shows(self) -> None:
        (shown,) = re.findall(r"```yaml\n(.+?)```", (self.FOLDER / "README.md").read_text(), re.DOTALL)
        (graph, llm), (plain_graph, plain_llm) = (
            load(path)["applications"] for path in (self.FOLDER / "serve.yaml", CONFIGS / "quickstart.yaml")
        )
        assert graph == plain_graph
        assert {"lmcache": llm["args"].pop("lmcache")} == yaml.safe_load(shown)
        assert llm["args"]["llm"] == plain_llm["args"]["llm"]
        routing, plain_routing = (RouterSettings(model="m", **one["args"]["routing"]) for one in (llm, plain_llm))
        assert routing == plain_routing  # the quickstart writes defaults out
