# The image of head and engines on CPUs, and of `docker run`. From the repository's root:
#   docker build -f deploy/docker/cpu.Dockerfile -t act-serve:cpu .
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
# The lock decides every version; the extras keep the tools of development out.
RUN uv pip install --system --no-cache --torch-backend cpu --constraint requirements.lock ".[serve,build,s3,otel]"
COPY --chown=1000:1000 abilities abilities

ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
USER 1000:1000
EXPOSE 8000

# Kubernetes has probes of its own and ignores this; it is for `docker run`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
STOPSIGNAL SIGINT
CMD ["act-serve", "serve", "--host", "0.0.0.0"]
