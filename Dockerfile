# syntax=docker/dockerfile:1
# The official vLLM image with this plug-in added and nothing else changed. Docker, podman and
# buildah build it alike: every step is POSIX shell, for images in OCI format have no SHELL. That
# format has no HEALTHCHECK either; `--format docker` keeps it.
#
#   make image            (docker build -t s2o-vllm . works as well, and knows no revision)
#   docker run --gpus all --ipc=host -p 8000:8000 -v s2o-cache:/home/vllm/.cache -e HF_TOKEN \
#       s2o-vllm --model meta-llama/Llama-3.1-8B-Instruct --max-model-len 131072 \
#       --attention-backend s2o --s2o-sparsity-budget 0.1

ARG VLLM_VERSION=0.32.0
ARG BASE_IMAGE=docker.io/vllm/vllm-openai:v${VLLM_VERSION}
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY benchmarks benchmarks
COPY s2o_vllm s2o_vllm
COPY deploy/loadtest deploy/loadtest
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE_IMAGE}
USER 0

# Adds one distribution; the build fails if any other appears, moves or disappears.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    set -eu; \
    export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1; \
    freeze() { python3 -m pip freeze --all --exclude s2o-vllm; }; \
    before=$(freeze); \
    python3 -m pip install --no-cache-dir --no-deps --no-index /dist/s2o_vllm-*.whl; \
    after=$(freeze); \
    if [ "$before" != "$after" ]; then \
        printf 'Other distributions moved. Before:\n%s\nAfter:\n%s\n' "$before" "$after" >&2; \
        exit 1; \
    fi

# Fails if the plug-in would not load in this vLLM, or does not support its version.
RUN python3 -c 'import importlib.metadata as m, sys; from s2o_vllm.compat import unsupported_version; m.entry_points(group="vllm.general_plugins")["s2o"].load(); sys.exit(unsupported_version())'

# The official image carries this user; older ones do not. Everybody may write below its home: a
# platform may choose any user and group (OpenShift: a random user of group 0).
RUN set -eu; \
    id vllm >/dev/null 2>&1 \
        || useradd --no-log-init --uid 2000 --gid 0 --create-home --shell /bin/bash vllm; \
    mkdir -p /home/vllm/.cache; \
    chown -R 2000:0 /home/vllm; \
    chmod -R a+rwX /home/vllm

# Weights, compiled graphs and kernels all land in one folder: mount a volume there.
ENV HOME=/home/vllm \
    USER=vllm \
    TRITON_CACHE_DIR=/home/vllm/.cache/triton \
    CUDA_CACHE_PATH=/home/vllm/.cache/nv
WORKDIR /home/vllm
USER 2000:0

# Inside the container the port stays 8000; choose another outside with -p.
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m --retries=3 \
    CMD ["curl", "--fail", "--silent", "--show-error", "http://127.0.0.1:8000/health"]

# As in the official image, so that every vLLM flag works unchanged.
ENTRYPOINT ["vllm", "serve"]

# Last, so that another revision does not build the layers again. `make image` gives all three.
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="s2o-vllm" \
      org.opencontainers.image.description="Stock vLLM with S2O sparse prefill attention" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
