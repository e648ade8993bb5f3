#!/usr/bin/env bash
# Installs what ci/apt.txt lists and this machine lacks: nothing else, and nothing when nothing is missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

missing=()
while read -r package; do
    case $package in '' | '#'*) continue ;; esac
    # libclang-rt carries clang's version in its name; take the one that belongs to the clang that this Debian has.
    if [[ $package == libclang-rt-*-dev ]] && ! apt-cache show "$package" >/dev/null 2>&1; then
        version=$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p' | head -n 1)
        package=libclang-rt-${version:-14}-dev
    fi
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done <"$here/apt.txt"

[ ${#missing[@]} -eq 0 ] && exit 0
sudo=
[ "$(id -u)" -eq 0 ] || sudo=sudo
echo "installing: ${missing[*]}"
$sudo apt-get update -qq
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
