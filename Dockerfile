# Two images from one file:
#
#     docker build --target operator -t sae-operator/operator .
#     docker build --target job      -t sae-operator/job .
#
# Both run as user 65532 with a read-only root file system; neither holds a compiler or pip's cache.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/sae-operator
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY operator operator
COPY jobimage jobimage

FROM build AS build-operator
RUN /opt/sae-operator/bin/pip install --constraint constraints.txt . \
    && /opt/sae-operator/bin/python -m compileall -q /opt/sae-operator \
    && /opt/sae-operator/bin/pip uninstall --yes pip

FROM build AS build-job
# The wheel of torch that the base image's platform gets from this index; set it for CPU-only images, say.
ARG TORCH_INDEX_URL=
RUN if [ -n "${TORCH_INDEX_URL}" ]; then /opt/sae-operator/bin/pip install --index-url "${TORCH_INDEX_URL}" torch; fi \
    && /opt/sae-operator/bin/pip install --constraint constraints.txt ".[job,transformerlens,wandb]" \
    && /opt/sae-operator/bin/pip uninstall --yes pip
# Triton calls the driver through a small C module, which it would compile in the pod: it is compiled here instead.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && /opt/sae-operator/bin/python -m sae_job.saes.kernels.triton_driver

FROM ${PYTHON} AS base
RUN groupadd --gid 65532 job && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /home/job --shell /usr/sbin/nologin job
ENV PATH=/opt/sae-operator/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /

FROM base AS operator
# Few threads, few arenas: 15 MiB less.
ENV MALLOC_ARENA_MAX=2
COPY --from=build-operator /opt/sae-operator /opt/sae-operator
ENTRYPOINT ["sae-operator"]

FROM base AS job
COPY --from=build-job /opt/sae-operator /opt/sae-operator
ENTRYPOINT ["sae-job"]
