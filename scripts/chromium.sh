#!/usr/bin/env bash
# Chromium, for the test that looks at the live page: the one that is there, or the distribution's (apt).
#
#   scripts/chromium.sh          install it, if there is none
#   scripts/chromium.sh --path   say where it is; status 1: nowhere
set -euo pipefail

readonly PACKAGES=(chromium-headless-shell chromium) # the first is a fifth smaller; not every distribution has it

die() {
    printf 'Chromium cannot be installed: %s\n' "$1" >&2
    printf '  %s\n' "without it the test of the live page is skipped; install a package chromium, or Google Chrome, by hand" >&2
    exit 1
}

find_chromium() {
    local name
    for name in "${PACKAGES[@]}" google-chrome; do
        if command -v "$name"; then return; fi
    done
    return 1
}

install_chromium() {
    local started=$SECONDS package as_root=()
    command -v apt-get >/dev/null || die "there is no apt-get here"
    if ((EUID)); then
        sudo -n true 2>/dev/null || die "it takes root's rights (sudo apt-get install chromium)"
        as_root=(sudo -n)
    fi
    printf '==> installing Chromium for the test of the live page (100 MB)\n'
    "${as_root[@]}" apt-get update -qq || die "apt-get update failed"
    for package in "${PACKAGES[@]}"; do
        apt-cache show "$package" >/dev/null 2>&1 || continue
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$package" >/dev/null \
            || die "apt-get install $package failed"
        printf '    done in %s s\n' "$((SECONDS - started))"
        return
    done
    die "apt knows none of: ${PACKAGES[*]}"
}

case "${1:-}" in
    --path) find_chromium ;;
    "") find_chromium >/dev/null || install_chromium ;;
    *) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
