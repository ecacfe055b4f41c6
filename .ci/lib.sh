# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the stages with engines share.  Everything they make lies under $CACHE.

CACHE="${CACHE:-$PWD/.ci/cache}"
VENV="${VENV:-.venv}"
ENGINE="$CACHE/engine"
export DOCKER_HOST="unix://$ENGINE/docker.sock"
BASE_TAG=irem-bids-ci-base:1
BUILD_TAG=irem-bids-ci-build:1
export IMAGE=irem-bids:ci

skip() {
    echo "SKIPPED: $*"
    exit 77
}

# Start a docker engine of our own, without networking of its own, unless it runs.
start_docker() {
    [ "$(id -u)" = 0 ] || skip "a docker engine needs root"
    command -v dockerd >/dev/null || skip "dockerd is not installed"
    docker info >/dev/null 2>&1 && return 0
    mkdir -p "$ENGINE/data" "$ENGINE/exec"
    rm -f "$ENGINE/docker.pid"
    setsid dockerd --iptables=false --ip6tables=false --ip-forward=false --bridge=none \
        --data-root "$ENGINE/data" --exec-root "$ENGINE/exec" --pidfile "$ENGINE/docker.pid" \
        -H "$DOCKER_HOST" >"$ENGINE/docker.log" 2>&1 </dev/null &
    for _ in $(seq 60); do
        docker info >/dev/null 2>&1 && return 0
        sleep 0.5
    done
    tail -n 20 "$ENGINE/docker.log"
    echo "dockerd did not start"
    return 1
}

stop_docker() {
    [ -s "$ENGINE/docker.pid" ] || return 0
    local pid
    pid=$(cat "$ENGINE/docker.pid")
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 60); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.5
    done
}

# A stand-in for the base image, from Debian's packages; no image registry is asked.
make_base() {
    docker image inspect "$BASE_TAG" >/dev/null 2>&1 && return 0
    command -v debootstrap >/dev/null || skip "debootstrap is not installed"
    local root="$CACHE/base"
    rm -rf "$root"
    debootstrap --variant=minbase --include=python3,python3-venv bookworm "$root" \
        >"$CACHE/debootstrap.log" 2>&1 || {
        tail -n 20 "$CACHE/debootstrap.log"
        return 1
    }
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
    tar -C "$root" -c . | docker import - "$BASE_TAG" >/dev/null
    rm -rf "$root"
}

# The wheels of the locks, fetched by this machine's pip as it is set up here.
make_wheels() {
    local stamp="$CACHE/wheels/.stamp"
    if ! cmp -s requirements.lock "$stamp"; then
        rm -rf "$CACHE/wheels"
        "$VENV/bin/python" -m pip wheel -q -r requirements.lock -w "$CACHE/wheels" 2>&1 |
            grep -v "is ignored: it is neither" || true
        cp requirements.lock "$stamp"
    fi
}

# The image in which the app is built: the base, those wheels and strip.
make_build_image() {
    local id
    docker image inspect "$BUILD_TAG" >/dev/null 2>&1 &&
        [ "$(docker image inspect -f '{{index .Config.Labels "lock"}}' "$BUILD_TAG")" = \
            "$(sha256sum <requirements.lock | cut -c1-16)" ] && return 0
    id=$(docker create --network host -v "$CACHE/wheels:/mnt:ro" "$BASE_TAG" sh -euc '
        cp -r /mnt /wheels
        printf "[global]\nno-index = true\nfind-links = /wheels\n" >/etc/pip.conf
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends binutils >/dev/null')
    docker start -a "$id"
    docker commit -c "LABEL lock=$(sha256sum <requirements.lock | cut -c1-16)" "$id" \
        "$BUILD_TAG" >/dev/null
    docker rm "$id" >/dev/null
}
