# Makes .venv with the pinned dependencies. Sourced by scripts/run and scripts/test; nothing to do takes no time.
#
#   setup run      what fedpress needs          setup test     and what its tests need
#
# FEDPRESS_TORCH_INDEX  another package index for torch alone. On Linux the default torch brings 3 GB of CUDA libraries;
#                       https://download.pytorch.org/whl/cpu has it without.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

say() { printf '%s\n' "$*" >&2; } # standard output belongs to fedpress: it may be JSON

die() {
    say "$1"
    exit 2
}

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$name"
            return
        fi
    done
    die "fedpress needs Python 3.11 or newer, found $(python3 --version 2>/dev/null || printf none); run: sudo apt-get install python3 python3-venv"
}

make_venv() {
    if "$venv/bin/python" -c 'import pip' 2>/dev/null; then return; fi
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments; run: sudo apt-get install $(basename "$python")-venv"
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

# What the installed packages depend on: the two lists, the interpreter, and where the repository lies.
fingerprint() {
    {
        cat -- "$root/pyproject.toml" "$root/constraints.txt"
        "$venv/bin/python" --version
        printf '%s\n' "$root" "${FEDPRESS_TORCH_INDEX:-}"
    } | sha256sum | cut -d ' ' -f 1
}

pip_install() {
    local quiet=(--quiet)
    if [[ -t 2 ]]; then quiet=(); fi
    "$venv/bin/python" -m pip install --disable-pip-version-check "${quiet[@]}" -c "$root/constraints.txt" "$@" >&2 ||
        die "The installation stopped; look at the lines above, then run the same command again (what is installed stays)"
}

setup() {
    local kind=$1 stamp=$venv/fedpress-$1.stamp target=$root
    make_venv
    local wanted
    wanted=$(fingerprint)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
    say "Installing fedpress and its pinned dependencies into $venv (once; a few minutes)"
    if [[ $kind == test ]]; then target="$root[test]"; fi
    if [[ -n ${FEDPRESS_TORCH_INDEX:-} ]]; then
        pip_install --index-url "$FEDPRESS_TORCH_INDEX" "$(grep '^torch==' "$root/constraints.txt")"
    fi
    pip_install hatchling editables # the build tools, pinned too: hence no build isolation
    pip_install --no-build-isolation --editable "$target"
    printf '%s\n' "$wanted" >"$stamp"
}
