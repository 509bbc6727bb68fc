#!/usr/bin/env bash
# Sets up the virtual environment of a clone; does nothing if it is complete.
#
#   scripts/setup.sh [--gl] [extra ...]      extras of setup.py, besides policy, sim and train
#
#   --gl              also make sure that MuJoCo can render
#   libero            also let LIBERO find its folders (~/.libero/config.yaml) and meshes; with --gl, render one task
#   VENV              folder of the environment (.venv)
#   PYTHON            interpreter to use instead of searching for one, or the version to search for: 3.12 or 3.13
#   UV_TORCH_BACKEND  "cpu" installs the small build of torch, where its index can be reached
#   CEED_VLA_INSTALL_GL=1  install missing GL libraries, and the browser of the tests, with apt-get (root only)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
WANTED="Python 3.12 or 3.13"
GL_PACKAGES="libegl1 libegl-mesa0 libgl1-mesa-dri libgl1"
DISK_GB=7 # of a complete environment with the CUDA build of torch

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# ---- Python --------------------------------------------------------------------------------------------------------

# Prints the version of interpreter $1; fails unless it runs (shims may not) and its version is supported.
supported() {
    "$1" -c 'import sys, sysconfig
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))' \
        2>/dev/null </dev/null
}

# Interpreters in the order in which they are tried, one path per line.
pythons() {
    local name
    for name in python3.12 python3.13 python3 python; do type -aP "$name" || true; done
    ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23]*/bin/python 2>/dev/null || true
    ls -d "${HOME:-}"/.local/share/uv/python/cpython-3.1[23]*/bin/python3 2>/dev/null || true
    ls -d /usr/bin/python3.1[32] /usr/local/bin/python3.1[32] /opt/homebrew/bin/python3.1[32] 2>/dev/null || true
}

find_python() {
    local candidate version second="" tried="" only="" wanted=3.12 # the version of constraints.txt
    case ${PYTHON:-} in
    3.12 | 3.13) wanted=$PYTHON PYTHON= only=1 ;;
    esac
    if [ -n "${PYTHON:-}" ]; then
        version=$(supported "$PYTHON") || die "PYTHON=$PYTHON is ${version:-no interpreter that runs}; $WANTED is needed."
        printf '%s\n' "$PYTHON"
        return
    fi
    while read -r candidate; do
        if version=$(supported "$candidate"); then
            case $version in
            $wanted.*) printf '%s\n' "$candidate" && return ;;
            *) second=${second:-$candidate} ;;
            esac
        else
            tried="$tried
setup:   $candidate (${version:-does not run})"
        fi
    done < <(pythons | awk '!seen[$0]++')
    [ -z "$second" ] || [ -n "$only" ] || { printf '%s\n' "$second" && return; }
    die "$WANTED was not found. Tried on PATH, under pyenv, uv, /usr/bin and /usr/local/bin:${tried:-
setup:   nothing called python there}" \
        "Install one, for example with \`apt-get install python3 python3-venv\` (Debian 13, Ubuntu 24.04)," \
        "\`pyenv install 3.12\` or \`uv python install 3.12\`, or name one with PYTHON=/path/to/python."
}

# ---- uv and the environment ----------------------------------------------------------------------------------------

uv_requirement() { sed -n 's/^\(uv==.*\)$/\1/p' constraints.txt; }

# Prints the path of a uv outside the environment: an installed one, or one that the pip of any available Python installs
# into folder $1.
borrow_uv() {
    local candidate
    while read -r candidate; do
        if "$candidate" --version >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done < <({ type -aP uv; ls "${HOME:-}"/.local/bin/uv "${HOME:-}"/.cargo/bin/uv; } 2>/dev/null)
    while read -r candidate; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 </dev/null || continue
        "$candidate" -m pip --version >/dev/null 2>&1 </dev/null || continue
        say "installing uv with the pip of $candidate"
        if "$candidate" -m pip install --quiet --target "$1" "$(uv_requirement)" </dev/null >&2; then
            printf '%s\n' "$1/bin/uv"
            return
        fi
    done < <({ printf '%s\n' "$PYTHON_FOUND"; pythons; ls "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3*/bin/python; } \
        2>/dev/null | awk '!seen[$0]++')
    die "cannot install uv: $PYTHON_FOUND has neither ensurepip nor pip, and no other Python here could get it." \
        "Either the network is down, or install one of them: \`apt-get install python3-venv python3-pip\`."
}

has_pip() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

make_environment() {
    local version
    if [ -e "$VENV" ] && version=$(supported "$VENV/bin/python"); then
        case ${PYTHON:-} in
        3.12 | 3.13) [ "${version%.*}" = "$PYTHON" ] || die "$VENV has Python $version, and PYTHON is $PYTHON. Remove it, or choose another folder with VENV=..." ;;
        esac
    elif [ -x "$VENV/bin/python" ] && [ -n "${version:-}" ]; then
        die "$VENV has Python $version; $WANTED is needed. Remove it, or choose another folder with VENV=..."
    else
        if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
            die "$VENV exists and is not a virtual environment; choose another folder with VENV=..."
        fi
        PYTHON_FOUND=$(find_python)
        say "making $VENV with $PYTHON_FOUND ($(supported "$PYTHON_FOUND"))"
        if "$PYTHON_FOUND" -c 'import ensurepip, venv' 2>/dev/null; then
            "$PYTHON_FOUND" -m venv --clear "$VENV"
        else
            BORROWED=$(borrow_uv "$SCRATCH")
            "$BORROWED" venv --quiet --clear --python "$PYTHON_FOUND" "$VENV"
        fi
    fi
    [ -x "$VENV/bin/uv" ] && return
    if has_pip; then
        say "installing uv"
        "$VENV/bin/python" -m pip install --quiet "$(uv_requirement)" ||
            die "pip could not install uv (above); without a package index nothing can be installed." \
                "Check the network and HTTPS_PROXY, or set PIP_INDEX_URL to a mirror."
    else
        PYTHON_FOUND=$VENV/bin/python
        BORROWED=${BORROWED:-$(borrow_uv "$SCRATCH")}
        "$BORROWED" pip install --quiet --python "$VENV/bin/python" "$(uv_requirement)"
    fi
}

# ---- packages ------------------------------------------------------------------------------------------------------

# Checksum of the inputs of an installation, which is repeated when they change.
fingerprint() {
    {
        printf '%s\n' "$PWD" "$@" ./*/__init__.py
        cat setup.py setup.cfg pyproject.toml constraints.txt overrides.txt lerobot_policy_ceed_vla/pyproject.toml
    } | cksum
}

free_gb() { df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }'; }

uv_install() {
    local extras
    extras=$(IFS=,; printf '%s' "$*")
    "$VENV/bin/uv" pip install --python "$VENV/bin/python" --constraints constraints.txt --overrides overrides.txt \
        --build-constraints constraints.txt $DRY_RUN --editable ".[$extras]" --editable ./lerobot_policy_ceed_vla
}

# Prints why an installation failed, as far as that is known.
explain_failure() {
    local output
    [ "$(free_gb)" -ge 1 ] || die "the disk is full: an environment takes up to $DISK_GB GB here and in uv's cache." \
        "Free some, or move the cache with UV_CACHE_DIR."
    DRY_RUN=--dry-run
    output=$(uv_install "$@" 2>&1) || true
    case $output in
    *"dns error"* | *"error sending request"* | *"Failed to fetch"* | *"timed out"* | *"onnection"*)
        die "the package index cannot be reached. Check the network and HTTPS_PROXY, or set UV_DEFAULT_INDEX to a mirror." ;;
    *) die "the installation failed; uv's message above says why. The next run continues where this one stopped." ;;
    esac
}

install_packages() {
    local stamp
    stamp=$VENV/.installed-$(IFS=-; printf '%s' "$*")
    DRY_RUN=
    [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint "$@")" ] && return
    if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        export UV_DEFAULT_INDEX=$PIP_INDEX_URL
    fi
    [ "$(free_gb)" -ge "$DISK_GB" ] || say "only $(free_gb) GB are free; a complete installation takes up to $DISK_GB GB"
    say "installing ceed_vla with $* into $VENV (the first time downloads up to 3 GB)"
    uv_install "$@" || explain_failure "$@"
    fingerprint "$@" >"$stamp"
}

# Links the folders that install inside ceed_vla, as setup.py does; `git clean` removes the links.
link_folders() {
    local name
    for name in training sim ros_nodes; do
        [ -e "ceed_vla/$name" ] || ln -sfn "../$name" "ceed_vla/$name"
    done
}

# ---- rendering -----------------------------------------------------------------------------------------------------

# Fails, with the reason, unless the rendering test of `ceed-vla doctor` passes.
renders() {
    "$VENV/bin/python" -c 'from ceed_vla import doctor
(finding,) = doctor._rendering(doctor._run_probe(doctor._PROBES["gl"]))
raise SystemExit(f"setup: {finding.found}" if finding.remedy else 0)'
}

check_gl() {
    local stamp=$VENV/.renders-with-${MUJOCO_GL:-egl}
    [ -e "$stamp" ] && return
    [ "$(uname)" != Linux ] || export MUJOCO_GL=${MUJOCO_GL-egl}
    if ! renders; then
        if [ "${CEED_VLA_INSTALL_GL:-}" = 1 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            say "installing $GL_PACKAGES"
            apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $GL_PACKAGES
            renders || die "MuJoCo still cannot render; see the message above."
        else
            die "MuJoCo cannot render here: GL is missing (message above). It needs no screen, but these libraries:" \
                "  sudo apt-get install -y $GL_PACKAGES" \
                "Elsewhere install Mesa's EGL, or choose another backend, e.g. MUJOCO_GL=osmesa."
        fi
    fi
    touch "$stamp"
}

# Tests of the report page need a browser; without it they are skipped.
check_browser() {
    ! command -v chromium >/dev/null || return 0
    if [ "${CEED_VLA_INSTALL_GL:-}" = 1 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing chromium"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } ||
            say "chromium could not be installed: tests of the report page will be skipped"
    else
        say "chromium is not installed: tests of the report page will be skipped (Debian: apt-get install chromium)"
    fi
}

# Lets LIBERO find its folders and its meshes in other programs too, such as LeRobot's own `libero`. With $1 = check it also
# renders one task, once per environment.
set_up_libero() {
    [ "$(uname)" = Linux ] || return 0
    local stamp=$VENV/.libero-renders
    [ ! -e "$stamp" ] || set --
    MUJOCO_GL=${MUJOCO_GL-egl} "$VENV/bin/python" -W ignore -m ceed_vla.sim.libero.set_up "$@" >&2 || exit 1
    [ $# = 0 ] || touch "$stamp"
}

main() {
    local gl=0
    if [ "${1:-}" = --gl ]; then
        gl=1
        shift
    fi
    # Two set-ups at once must not share a folder: the lock is on this file, and ends with this process.
    if command -v flock >/dev/null; then
        exec 9<scripts/setup.sh
        flock -n 9 || { say "waiting for another set-up" && flock 9; }
    fi
    SCRATCH=$(mktemp -d)
    trap 'rm -rf "$SCRATCH"' EXIT
    make_environment
    install_packages policy sim train "$@"
    link_folders
    [ "$gl" = 0 ] || check_gl
    case " $* " in
    *" test "*) check_browser ;;
    esac
    case "$gl $* " in
    "0 "*" libero "*) set_up_libero ;;
    *" libero "*) set_up_libero check ;;
    esac
}

main "$@"
