# The server in a container. No key is built in: give keys in DUOLOGUE_API_KEYS, or as a file with --keys.
#
#   docker build -t duologue .
#   docker run -p 8000:8000 -e DUOLOGUE_API_KEYS="$(openssl rand -hex 16)" duologue
#
# On an NVIDIA GPU. BASE may be any Debian or Ubuntu image with Python 3.11 or newer:
#
#   docker build -t duologue-cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
#   docker run --gpus all -p 8000:8000 -e DUOLOGUE_API_KEYS=... duologue-cuda --device cuda
ARG BASE=python:3.11-slim
FROM ${BASE}

# libsndfile comes with the soundfile wheel. A CUDA base has no Python; the versions of its packages belong to the base.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null || ! python3 -c "import venv, ensurepip" 2>/dev/null; then \
        apt-get update && \
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv && \
        rm -rf /var/lib/apt/lists/*; \
    fi

# A volume for stored conversations takes the owner of its folder.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin duologue && \
    install --directory --owner=10001 --mode=0700 /home/duologue/sessions && \
    python3 -m venv /opt/duologue
ENV PATH=/opt/duologue/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 OMP_WAIT_POLICY=PASSIVE

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# TORCH_INDEX is the address of a package index with other builds of torch, such as the smaller ones for CPUs alone.
ARG TORCH_INDEX=
# Cells on Kubernetes need EXTRAS=serve,scale,redis; see deploy/kuberay.yaml.
ARG EXTRAS=serve
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} ".[${EXTRAS}]"

USER 10001
WORKDIR /home/duologue
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]

# Another host than the loopback one needs keys: without them the server ends with one sentence that says so.
ENTRYPOINT ["duologue", "serve", "--host", "0.0.0.0", "--port", "8000"]
