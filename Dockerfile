# Two images of one file: `--target operator` (no torch, no S3 client) and `--target jobs` (what runs in the pods).
#
#   docker build --target operator -t kubepeft/operator:0.1.0 .
#   docker build --target jobs     -t kubepeft/jobs:0.1.0 .
#
# BASE is any glibc image with Python 3.11 or newer as `python3`; what runs needs no shell in it. The packages come from uv.lock and lie in a
# layer of their own, so a change of code makes only the last layer anew.

ARG BASE=python:3.13-slim
ARG UV=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV} AS uv

# The user has no entry in /etc/passwd, and libraries that ask for its name look at USER first. /tmp is a volume in the cluster.
FROM ${BASE} AS runtime
ENV PATH=/opt/kubepeft/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=kubepeft
# Where the packages' cache is, for builders that mount one of their own.
ARG UV_CACHE_DIR=/root/.cache/uv
ENV UV_CACHE_DIR=${UV_CACHE_DIR} UV_SYSTEM_CERTS=1 UV_PROJECT_ENVIRONMENT=/opt/kubepeft UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON=python3 UV_PYTHON_DOWNLOADS=never
COPY pyproject.toml uv.lock /build/

FROM runtime AS operator-packages
# The operator holds no S3 credentials and talks to no S3, so boto3 and its 30 MB of service descriptions stay out.
RUN --mount=type=bind,from=uv,source=/,target=/mnt/uv --mount=type=cache,target=/root/.cache/uv ["/mnt/uv/uv", "sync", "--project", "/build", \
  "--quiet", "--locked", "--no-dev", "--no-install-project", "--extra", "operator", \
  "--no-install-package", "boto3", "--no-install-package", "botocore", "--no-install-package", "s3transfer"]
# Of the Kubernetes client the operator takes the transport alone; its typed objects, 100 MB of them, are loaded only when asked for.
RUN ["find", "/opt/kubepeft", "-path", "*/site-packages/kubernetes/*", "(", "-path", "*/aio/*", "-o", "-path", "*/client/api/*", "-o", "-path", "*/client/models/*", ")", \
  "-type", "f", "-not", "-name", "__init__*", "-delete"]

FROM runtime AS operator-code
COPY api/kubepeft /app/kubepeft
COPY operator/kubepeft_operator /app/kubepeft_operator
RUN ["python3", "-m", "compileall", "-q", "/app"]

FROM runtime AS jobs-code
COPY api/kubepeft /app/kubepeft
COPY jobs/kubepeft_jobs /app/kubepeft_jobs
RUN ["python3", "-m", "compileall", "-q", "/app"]

FROM runtime AS operator
COPY --from=operator-packages /opt/kubepeft /opt/kubepeft
COPY --from=operator-code /app /app
USER 65532:65532
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kubepeft operator" \
  org.opencontainers.image.description="Watches FineTunes and BatchInferences and makes their Jobs" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["python", "-m", "kubepeft_operator"]
CMD ["--config", "/etc/kubepeft/config.yaml"]

FROM runtime AS jobs
# Installed where they stay: copied from another stage, the 6 GB would lie on the builder's disk twice.
RUN --mount=type=bind,from=uv,source=/,target=/mnt/uv --mount=type=cache,target=/root/.cache/uv ["/mnt/uv/uv", "sync", "--project", "/build", \
  "--quiet", "--locked", "--no-dev", "--no-install-project", "--extra", "jobs", "--extra", "trackers"]
COPY --from=jobs-code /app /app
USER 65532:65532
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kubepeft jobs" \
  org.opencontainers.image.description="Prepares data, trains PEFT adapters, answers prompts in batch" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["python", "-m", "kubepeft_jobs"]
