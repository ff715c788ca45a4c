# MLflow's tracking server with the driver for PostgreSQL, in the versions of requirements.lock.
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm
FROM ${BASE_IMAGE}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /build
COPY deploy/mlflow.lock ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=certificates,target=/run/certificates.crt \
    python3 -m pip install --require-hashes --only-binary :all: --requirement mlflow.lock && install -d -o 10001 -g 10001 /artifacts
COPY deploy/mlflow-server.sh /usr/local/bin/mlflow-server
USER 10001:10001
WORKDIR /artifacts
VOLUME /artifacts
EXPOSE 5000
ENTRYPOINT ["/bin/sh", "/usr/local/bin/mlflow-server"]
