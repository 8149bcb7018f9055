#!/bin/sh
# Install or update `turbojet` on a Jetson from a folder of wheels, without network and without root.
# Usage: sh install.sh [--wheelhouse DIR] [--prefix DIR] [--python PYTHON]
#   --wheelhouse DIR  what build-wheelhouse made (default: the folder of this script)
#   --prefix DIR      where it goes (default $XDG_DATA_HOME/turbojet or ~/.local/share/turbojet)
#   --python PYTHON   interpreter, 3.10 or newer (default: the first that fits of python3, python3.12, ...,
#                     else the one that the wheelhouse brings)
# Every release gets a folder of its own under PREFIX/runtime; `current` is switched at the end by one
# rename, so a broken or interrupted run leaves the old release working. Running it again is harmless.
set -eu
# What others want of the user's Python and pip is not for ours: ROS, for one, sets PYTHONPATH.
unset PYTHONPATH PYTHONHOME
export PIP_CONFIG_FILE=/dev/null

say() { echo "install.sh: $1" >&2; }
fail() {
    say "$1"
    exit "${2:-2}"
}

here=$(cd "$(dirname "$0")" && pwd)
wheelhouse=$here
prefix=${XDG_DATA_HOME:-${HOME:?}/.local/share}/turbojet
bin=${HOME:?}/.local/bin
python=
tegra_release=${TURBOJET_TEGRA_RELEASE:-/etc/nv_tegra_release}
while [ $# -gt 0 ]; do
    case $1 in
    --wheelhouse) wheelhouse=${2:?} && shift 2 ;;
    --prefix) prefix=${2:?} && shift 2 ;;
    --python) python=${2:?} && shift 2 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) fail "unknown argument $1, see --help" ;;
    esac
done
# Links lead there, so that it must not depend on where this runs.
case $prefix in
/*) ;;
*) prefix=$PWD/$prefix ;;
esac

# --- the board, in words -------------------------------------------------------------------------
l4t=$(sed -n 's/^# R\([0-9]*\) .*REVISION: *\([0-9.]*\).*/\1.\2/p' "$tegra_release" 2>/dev/null || true)
brings=
case $l4t in
"") board="this is no Jetson ($tegra_release is not there)" ;;
3[45].*) board="JetPack 5 (L4T $l4t)" && brings=", which brings Python 3.8: build-wheelhouse --interpreter takes a newer one along" ;;
36.*) board="JetPack 6 (L4T $l4t)" && brings=", which brings Python 3.10" ;;
3[89].*) board="JetPack 7 (L4T $l4t)" && brings=", which brings Python 3.12" ;;
*) board="L4T $l4t" ;;
esac

# --- a wheelhouse that is whole ------------------------------------------------------------------
[ -f "$wheelhouse/SHA256SUMS" ] || fail "$wheelhouse is no wheelhouse, it has no SHA256SUMS" 3
(cd "$wheelhouse" && sha256sum --check --quiet SHA256SUMS) >&2 ||
    fail "$wheelhouse is damaged, copy it again" 3

# --- a Python that fits --------------------------------------------------------------------------
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
tag_of() { "$1" -c 'import sys; print("cp%d%d" % sys.version_info[:2])'; }
bundle=$(echo "$wheelhouse"/cpython-3.*.tar.gz)
[ -f "$bundle" ] && [ -z "$python" ] || bundle= # who names a Python means that one
if [ -n "$python" ]; then
    command -v "$python" >/dev/null || fail "there is no $python"
    is_new_enough "$python" || fail "$("$python" --version 2>&1) is too old, 3.10 or newer is needed; $board$brings"
else
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        command -v "$candidate" >/dev/null || continue
        is_new_enough "$candidate" || continue
        [ -n "$python" ] || python=$candidate
        [ -f "$wheelhouse/$(tag_of "$candidate").txt" ] || continue
        python=$candidate
        break
    done
fi
if [ -n "$python" ] && { [ -f "$wheelhouse/$(tag_of "$python").txt" ] || [ -z "$bundle" ]; }; then
    tag=$(tag_of "$python")
    bundle=
elif [ -n "$bundle" ]; then
    tag=cp3$(basename "$bundle" | sed 's/^cpython-3\.\([0-9]*\).*/\1/')
else
    fail "found no Python 3.10 or newer, name one with --python; $board$brings"
fi
pins=$wheelhouse/$tag.txt
if [ ! -f "$pins" ]; then
    tags=$(cd "$wheelhouse" && echo cp*.txt | sed 's/\.txt//g')
    fail "$wheelhouse has wheels for $tags, none for the $tag of $python; name another with --python" 3
fi
pip=$(echo "$wheelhouse"/pip-*.whl)
[ -f "$pip" ] || fail "$wheelhouse has no wheel of pip, or more than one" 3

[ ! -e "$bin/turbojet" ] || [ -L "$bin/turbojet" ] || fail "$bin/turbojet is in the way and no link of ours" 1

# --- a release of its own, then one rename -------------------------------------------------------
sum=$(sha256sum "$pins" "$wheelhouse/SHA256SUMS" | sha256sum | cut -c1-12)
runtime=$prefix/runtime
release=$runtime/$tag-$sum
mkdir -p "$runtime"
if command -v flock >/dev/null; then # one at a time
    exec 9>"$runtime/.lock"
    flock -n 9 || { say "waiting for another install.sh" && flock 9; }
fi
abandon() { # abandon REASON: give back what a half installed release takes
    rm -rf "$release"
    fail "$1" 1
}
if [ ! -f "$release/complete" ]; then
    say "installing into $release"
    rm -rf "$release"
    needed=200 # MB: what the wheels unpack to is 155, a Python of python-build-standalone as much again
    [ -z "$bundle" ] || needed=500
    free=$(df -Pk "$runtime" | sed -n '$s/.* \([0-9][0-9]*\)  *[0-9]*%.*/\1/p')
    [ -z "$free" ] || [ "$((free / 1024))" -ge "$needed" ] || # not every file system says
        fail "$runtime has $((free / 1024)) MB free, $needed are needed; name another disk with --prefix" 4
    if [ -n "$bundle" ]; then
        mkdir "$release"
        tar xzf "$bundle" -C "$release" 2>/dev/null || abandon "$bundle could not be unpacked into $release"
        python=$release/python/bin/python3
    fi
    # The wheel of pip runs as it is, so no ensurepip (Debian's python3-venv) is needed.
    "$python" -m venv --without-pip "$release" || abandon "$python could not make $release"
    "$release/bin/python" "$pip/pip" install --isolated --quiet --disable-pip-version-check --no-index \
        --no-cache-dir --no-deps --find-links "$wheelhouse" --requirement "$pins" >&2 ||
        abandon "the wheels could not be installed into $release"
    # By itself when it runs, too: pip names Python in one line, or in two where the path is long or
    # has a blank.
    sed -i '1s|^#!.*/python[0-9.]*$|& -I|; 2s|"$0"|-I "$0"|' "$release/bin/turbojet"
    # Its help needs every library, so a wheel that does not run on this board is found now.
    "$release/bin/turbojet" chat --help >/dev/null || abandon "turbojet does not start from $release"
    sync -f "$release" # a power cut must not leave it marked as complete with empty files
    : >"$release/complete"
fi
before=$(readlink "$runtime/current" || true)
switch() { # switch LINK TARGET: never a moment without a working link
    ln -s "$2" "$1.$$"
    mv -T "$1.$$" "$1"
}
switch "$runtime/current" "$(basename "$release")"
mkdir -p "$bin"
switch "$bin/turbojet" "$runtime/current/bin/turbojet"

# The release before stays: a chat that still runs from it goes on, and it is the way back.
if [ "$before" != "$(basename "$release")" ]; then
    for old in "$runtime"/cp*; do
        case $(basename "$old") in
        "$(basename "$release")" | "$before") ;;
        *) rm -rf "$old" ;;
        esac
    done
fi

# --- what next -----------------------------------------------------------------------------------
echo "turbojet is installed for $("$release/bin/python" --version 2>&1): $bin/turbojet"
echo "Board: $board"
if [ -n "$l4t" ] && [ "$(id -u)" != 0 ] && ! id -nG | grep -qw video; then
    echo "Your user is not in the group video, which the GPU needs: sudo usermod -aG video,render $(id -un)"
fi
case :$PATH: in
*":$bin:"*) ;;
*) echo "Add it to your PATH: export PATH=\"$bin:\$PATH\"" ;;
esac
echo "Next: turbojet chat MODEL.tgz"
