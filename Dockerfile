# Two images from one file:
#
#     docker build --target operator -t sae-operator/operator .
#     docker build --target job      -t sae-operator/job .
#
# Both run as user 65532 with a read-only root file system; neither holds a compiler or pip. A package index of your own:
# --secret id=pip.conf,src=FILE gives pip a configuration that stays out of the images. See docs/images.md.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/sae-operator

# The dependencies are a layer of their own, large and seldom changed: a new version of the code is then a few MiB to
# build, to push and to pull.
FROM build AS requirements
COPY pyproject.toml ./
RUN python3 -c "import pathlib, tomllib; \
    project = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['project']; \
    extras = [one for name in ('job', 'transformerlens', 'wandb') for one in project['optional-dependencies'][name]]; \
    pathlib.Path('operator.txt').write_text('\n'.join(project['dependencies'])); \
    pathlib.Path('job.txt').write_text('\n'.join(project['dependencies'] + extras))"

FROM build AS operator-dependencies
COPY constraints.txt ./
COPY --from=requirements /src/operator.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/sae-operator/bin/pip install --constraint constraints.txt --requirement operator.txt \
    && /opt/sae-operator/bin/pip uninstall --yes pip

FROM build AS job-dependencies
COPY constraints.txt ./
COPY --from=requirements /src/job.txt ./
# The wheel of torch that the base image's platform gets from this index; set it for CPU-only images, say.
ARG TORCH_INDEX_URL=
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    if [ -n "${TORCH_INDEX_URL}" ]; then /opt/sae-operator/bin/pip install --constraint constraints.txt --index-url "${TORCH_INDEX_URL}" torch; fi \
    && /opt/sae-operator/bin/pip install --constraint constraints.txt --requirement job.txt \
    && /opt/sae-operator/bin/pip uninstall --yes pip

FROM build AS package
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY jobimage jobimage
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/sae-operator/bin/pip install --no-deps --prefix /package .

# Triton calls the driver through a small C module, which it would compile in the pod: it is compiled here instead. An
# image for CPUs has no Triton.
FROM job-dependencies AS driver
RUN if [ -d "$(echo /opt/sae-operator/lib/python3*/site-packages/triton)" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev; \
    fi
COPY --from=package /package /opt/sae-operator
RUN mkdir -p /opt/sae-operator/share/sae-job && /opt/sae-operator/bin/python -m sae_job.saes.kernels.triton_driver

FROM ${PYTHON} AS base
# -l: without records of logins, which would make a sparse file of megabytes for so high a number.
RUN groupadd --gid 65532 job \
    && useradd -l --uid 65532 --gid 65532 --no-create-home --home-dir /home/job --shell /usr/sbin/nologin job
ENV PATH=/opt/sae-operator/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /

FROM base AS operator
# Few threads, few arenas: 15 MiB less.
ENV MALLOC_ARENA_MAX=2
COPY --from=operator-dependencies /opt/sae-operator /opt/sae-operator
COPY --from=package /package /opt/sae-operator
ENTRYPOINT ["sae-operator"]

FROM base AS job
COPY --from=job-dependencies /opt/sae-operator /opt/sae-operator
COPY --from=driver /opt/sae-operator/share/sae-job /opt/sae-operator/share/sae-job
COPY --from=package /package /opt/sae-operator
ENTRYPOINT ["sae-job"]
