# Millrace itself: API, scheduler and worker are one program with different commands, and two images.
#   target farm    for the API and the scheduler; `docker run --user millrace` does, where no files of root's are mounted
#   target worker  the same, and a check of its health; for workers, in compose, on EC2, and where a fleet of containers starts them
# The wheels were fetched beforehand, by their hashes, so building this needs the network for Debian's packages only.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS made
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY build/compose/wheels /tmp/wheels
COPY requirements/runtime.txt /tmp/runtime.txt
RUN python3 -m venv /opt/millrace \
    && /opt/millrace/bin/pip install --no-cache-dir --no-index --find-links /tmp/wheels --require-hashes -r /tmp/runtime.txt \
    && rm -rf /tmp/wheels
COPY build/compose/dist /tmp/dist
RUN /opt/millrace/bin/pip install --no-cache-dir --no-index --no-deps /tmp/dist/*.whl && rm -rf /tmp/dist \
    && /opt/millrace/bin/pip uninstall --quiet --yes pip

FROM ${BASE_IMAGE} AS farm
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates git openssh-client python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 8420 --home-dir /var/lib/millrace --shell /usr/sbin/nologin millrace \
    && install -d -o millrace -g millrace -m 700 /var/lib/millrace
COPY --from=made /opt/millrace /opt/millrace
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 MILLRACE_DATA_DIR=/var/lib/millrace MILLRACE_LOG_FORMAT=json
LABEL org.opencontainers.image.title="Millrace" \
      org.opencontainers.image.description="A build farm that a team runs itself: API and scheduler" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["millrace"]

# A worker is root: it gives workspaces to the users of builds, mounts layers of caches, and its engine's socket makes whoever holds
# it root on the host anyway. What is not trusted runs in the containers that it starts, and never in this one.
FROM farm AS worker
COPY deploy/worker-health /usr/local/bin/worker-health
LABEL org.opencontainers.image.title="Millrace worker" \
      org.opencontainers.image.description="A worker of a Millrace farm; wants the socket of a Docker engine and a folder for workspaces"
HEALTHCHECK --interval=30s --timeout=10s --start-period=20s --retries=3 CMD ["worker-health"]
CMD ["worker"]
