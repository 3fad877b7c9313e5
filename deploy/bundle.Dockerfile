# The bundle: a worker with all that it needs, to be carried into any Linux image of the same architecture (docs/fargate.md).
# The image holds it below /bundle; run, it copies that to /millrace, where a volume is to be mounted.
# The wheels were fetched beforehand, by their hashes, so building this needs the network for Debian's packages only.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS made
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        busybox-static ca-certificates git patchelf python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY build/compose/wheels /tmp/wheels
COPY requirements/runtime.txt /tmp/runtime.txt
COPY build/compose/dist /tmp/dist
RUN python3 -m venv /opt/millrace \
    && /opt/millrace/bin/pip install --no-cache-dir --no-index --find-links /tmp/wheels --require-hashes -r /tmp/runtime.txt \
    && /opt/millrace/bin/pip install --no-cache-dir --no-index --no-deps /tmp/dist/*.whl
COPY deploy/bundle /tmp/bundle
RUN /bin/sh /tmp/bundle/assemble && /millrace/millrace --version && mv /millrace /bundle

FROM scratch
COPY --from=made /bin/busybox /bin/busybox
COPY --from=made /bundle /bundle
LABEL org.opencontainers.image.title="Millrace bundle" \
      org.opencontainers.image.description="A worker of a Millrace farm, to be carried into the image of a build" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/bin/busybox", "cp", "-a", "/bundle/.", "/millrace/"]
