# Millrace itself: API, scheduler and worker are one image with different commands.
# The wheels were fetched beforehand, by their hashes, so building this needs the network for Debian's packages only.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates git openssh-client python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY build/compose/wheels /tmp/wheels
COPY requirements/runtime.txt /tmp/runtime.txt
RUN python3 -m venv /opt/millrace \
    && /opt/millrace/bin/pip install --no-cache-dir --no-index --find-links /tmp/wheels --require-hashes -r /tmp/runtime.txt \
    && rm -rf /tmp/wheels
COPY build/compose/dist /tmp/dist
RUN /opt/millrace/bin/pip install --no-cache-dir --no-index --no-deps /tmp/dist/*.whl && rm -rf /tmp/dist
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 MILLRACE_DATA_DIR=/var/lib/millrace MILLRACE_LOG_FORMAT=json
ENTRYPOINT ["millrace"]
