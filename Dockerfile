# SPDX-License-Identifier: Apache-2.0
# irem-bids as an image.  From the folder of the project:
#
#   docker build -t irem-bids .                                   # with CUDA
#   docker build -t irem-bids --build-arg TORCH=cpu \
#       --build-arg PIP_EXTRA_INDEX_URL=<index with torch's CPU wheels> .
#
# The base can be any Debian-like image with Python 3.11 or later and its venv module.
# BUILD_IMAGE may hold pip's configuration, wheels or certificates of a closed network;
# nothing of it but /opt reaches the result, so its Python must be that of BASE_IMAGE.
ARG BASE_IMAGE=python:3.11-slim
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
ARG TORCH=cuda
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements.lock docker/cpu.lock docker/cuda.lock docker/sbom ./
RUN python3 -m venv /opt/irem-bids \
    && /opt/irem-bids/bin/pip install -r requirements.lock -r "${TORCH}.lock"
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY docker/slim docker/selftest ./
COPY irem_bids irem_bids
RUN /opt/irem-bids/bin/pip install --no-deps --no-build-isolation . \
    && mkdir -p /opt/templateflow \
    && export NO_ET=1 TEMPLATEFLOW_HOME=/opt/templateflow TEMPLATEFLOW_AUTOUPDATE=0 \
    && /opt/irem-bids/bin/python -W ignore -c 'import templateflow.conf' \
    && /opt/irem-bids/bin/python sbom /opt/irem-bids/sbom.cdx.json \
    && sh slim /opt/irem-bids selftest \
    && chmod -R a+rX /opt
COPY docker/entrypoint docker/selftest /opt/irem-bids/bin/

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="irem-bids" \
      org.opencontainers.image.description="Isotropic MR images from stacks of thick slices, as a BIDS App" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt /opt
# Any uid may run it, with a root file system that is read-only and /tmp writable: what
# packages want to write goes to /tmp, and a user without a name still has one.
RUN useradd --uid 1000 --create-home --home-dir /home/irem --shell /bin/sh irem \
    && chmod a+rx /home/irem
ENV PATH=/opt/irem-bids/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/home/irem \
    USER=irem \
    LOGNAME=irem \
    LANG=C.UTF-8 \
    IREM_BIDS_CONTAINER=docker:irem-bids:${VERSION} \
    NO_ET=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TEMPLATEFLOW_HOME=/opt/templateflow \
    TEMPLATEFLOW_AUTOUPDATE=0 \
    MPLCONFIGDIR=/tmp/irem-bids/matplotlib \
    NIPYPE_CONFIG_DIR=/tmp/irem-bids/nipype \
    NUMBA_CACHE_DIR=/tmp/irem-bids/numba \
    XDG_CACHE_HOME=/tmp/irem-bids/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /tmp
HEALTHCHECK NONE
ENTRYPOINT ["/opt/irem-bids/bin/entrypoint"]
CMD ["--help"]
