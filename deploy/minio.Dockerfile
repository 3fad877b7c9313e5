# The MinIO server that scripts/minio built; its makers publish no image any more.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
COPY build/compose/minio /usr/local/bin/minio
RUN install -d -o www-data -g www-data -m 700 /data
VOLUME /data
USER www-data
ENV MINIO_BROWSER=off MINIO_UPDATE=off
EXPOSE 9000
ENTRYPOINT ["/usr/local/bin/minio", "server", "--quiet", "/data"]
