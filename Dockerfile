# The keymesh image: Python, keymesh and the libraries that they load; no shell, nothing to install
# with. It builds without a network from a folder of wheels that `make image` prepares, each checked
# against its hash in requirements/.
#
# BASE_IMAGE is any glibc image with Python 3.11 or newer as `python3`. Only what runs is taken from it.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG SOURCE_DATE_EPOCH=0
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_REQUIRE_HASHES=1 PIP_ROOT_USER_ACTION=ignore
COPY build/image/wheels /wheels
COPY requirements/otel.txt build/image/keymesh.txt helm/image/rootfs.py /build/
RUN python3 -m venv --without-pip /opt/keymesh && \
    /opt/keymesh/bin/python "$(echo /wheels/pip-*.whl)/pip" install --quiet --no-compile --no-cache-dir --no-deps \
        -r /build/otel.txt -r /build/keymesh.txt && \
    python3 /build/rootfs.py /opt/keymesh /wheels /rootfs

FROM scratch
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="keymesh" \
      org.opencontainers.image.description="A key-management mesh: QKD relay and DSKE behind ETSI GS QKD 014 and 020" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /rootfs /
ENV PATH=/opt/keymesh/bin LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/keymesh
ENTRYPOINT ["/opt/keymesh/bin/keymesh"]
CMD ["--help"]
