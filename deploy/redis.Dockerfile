# Redis from Debian's packages, so that the stack needs no image registry.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o redis -g redis -m 700 /data
VOLUME /data
USER redis
EXPOSE 6379
ENTRYPOINT ["/bin/sh", "-c", "exec redis-server --bind 0.0.0.0 --dir /data --appendonly yes --save '' --maxmemory-policy noeviction --requirepass \"$REDIS_PASSWORD\""]
