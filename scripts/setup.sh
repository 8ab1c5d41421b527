#!/usr/bin/env bash
# Install everything that Atoll needs on Debian 12: system packages, `.venv` from the lock file, the native parts.
# Does only what is missing, so a second run takes well under a second.
set -euo pipefail
cd "$(dirname "$0")/.."
export DEBIAN_FRONTEND=noninteractive
say() { printf '==> %s\n' "$*" >&2; }

if [ "$(id -u)" -ne 0 ]; then
    echo "error: Atoll makes namespaces, mounts and cgroups, and so needs root" >&2
    echo "mend: run the command again as root, e.g. with sudo" >&2
    exit 1
fi

mapfile -t wanted < <(grep -v '^#' scripts/apt-packages.txt)
missing=()
for package in "${wanted[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "system packages: ${missing[*]}"
    apt-get update -qq
    # A package of a service must not start it on the user's machine.
    guard=/usr/sbin/policy-rc.d
    if [ ! -e "$guard" ]; then
        printf '#!/bin/sh\nexit 101\n' > "$guard"
        chmod +x "$guard"
        trap 'rm -f "$guard"' EXIT
    fi
    apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
    # Nor when the machine starts again: LXC's own services make a bridge and a name server that Atoll has no use for.
    if [[ " ${missing[*]} " == *" lxc "* ]] && command -v systemctl > /dev/null; then
        systemctl disable --quiet lxc.service lxc-net.service lxc-monitord.service || true
    fi
    # Nor must the web servers of the benchmarks begin to serve then.
    for server in nginx haproxy; do
        if [[ " ${missing[*]} " == *" $server"* ]] && command -v systemctl > /dev/null; then
            systemctl disable --quiet "$server.service" || true
        fi
    done
fi

python=${PYTHON:-/usr/bin/python3}
lock=$(sha256sum requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.lock-digest 2>/dev/null)" != "$lock" ]; then
    say "Python packages into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
    printf '%s\n' "$lock" > .venv/.lock-digest
fi

make --no-print-directory -s -C src/atoll/runtimes/native

# workerd comes from npm, pinned by its lock file. Without npm, or without its registry, there are no workers; all else runs.
workerd=$(sha256sum scripts/workerd/package-lock.json | cut -d' ' -f1)
if [ "$(cat .venv/.workerd-digest 2>/dev/null)" != "$workerd" ] || [ ! -x .venv/bin/workerd ]; then
    if ! command -v npm > /dev/null; then
        say "no npm, so no workerd: isolation 'isolate' is not offered (install npm, then run this again)"
    else
        say "workerd into .venv"
        place=$(mktemp -d)
        cp scripts/workerd/package*.json "$place"
        # No script of a package is run: the program lies in the package of this machine's kind as it is.
        if npm ci --prefix "$place" --ignore-scripts --no-audit --no-fund --loglevel=error > /dev/null; then
            mv "$place"/node_modules/@cloudflare/workerd-linux-*/bin/workerd .venv/bin/workerd
            printf '%s\n' "$workerd" > .venv/.workerd-digest
        else
            say "npm could not install workerd: isolation 'isolate' is not offered"
        fi
        rm -rf "$place"
    fi
fi

# An ACME authority for the tests of certificates: built from its Go module, whose sums Go checks. Without Go those tests skip.
pebble=github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.3
if [ "$(cat .venv/.pebble-version 2>/dev/null)" != "$pebble" ] || [ ! -x .venv/bin/pebble ]; then
    if ! command -v go > /dev/null; then
        say "no Go, so no pebble: the tests of ACME skip (install Go, then run this again)"
    else
        say "pebble into .venv"
        if GOBIN="$PWD/.venv/bin" go install -trimpath "$pebble" 2> /dev/null; then
            printf '%s\n' "$pebble" > .venv/.pebble-version
        else
            say "Go could not build pebble: the tests of ACME skip"
        fi
    fi
fi
scripts/guest-kernel.sh || say "virtual machines will not be offered"
