# The image of the service. It runs as a numeric user on a read-only root and has no compiler and no package installer.
# One commit gives one image. `make image` builds it with docker or podman.
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-trixie@sha256:9d2e5553305c7c7b0097999bb17187c69b921ccd6bc9d40e4bb5ebe652c00285

# checkov:skip=CKV_DOCKER_7:PYTHON_IMAGE has a tag and a digest
FROM ${PYTHON_IMAGE} AS build
# gunicorn-h1c, gunicorn's HTTP parser in C, is the only package without a wheel. The compiler stays in this stage.
ARG BUILD_PACKAGES="gcc libc6-dev"
# hadolint ignore=DL3008,SC2086
RUN apt-get update && apt-get install --yes --no-install-recommends ${BUILD_PACKAGES}
WORKDIR /build
COPY requirements-build.txt requirements.txt ./
ARG SOURCE_DATE_EPOCH=0
# Two optional secrets, for your own package index, proxy or certificate authority: `env` has lines of NAME=value, `ca`
# the certificates. `make image` passes both.
# hadolint ignore=DL3042
RUN --mount=type=secret,id=env --mount=type=secret,id=ca \
    if test -e /run/secrets/env; then while IFS= read -r line; do export "${line?}"; done < /run/secrets/env; fi; \
    if test -e /run/secrets/ca; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi; \
    export CFLAGS=-g0 LDFLAGS=-s UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1; \
    python3 -m venv uv && uv/bin/pip install --require-hashes -r requirements-build.txt && \
    python3 -m venv --without-pip /opt/venv && \
    uv/bin/uv pip sync --python /opt/venv/bin/python --require-hashes --build-constraints requirements-build.txt \
        requirements.txt
# Remove what the service never imports: the dependencies of MLflow's Databricks client, uvicorn, tests, and boto3's
# descriptions of AWS services other than S3, STS and SSO.
WORKDIR /opt/venv/lib
RUN /build/uv/bin/uv pip uninstall --python /opt/venv/bin/python \
        google-auth pyasn1-modules pyasn1 cryptography cffi pycparser gitpython gitdb smmap uvicorn h11 && \
    find . -type d -name tests -prune -exec rm -r {} + && \
    find ./*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name sts ! -name 'sso*' -exec rm -r {} +

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
ARG COMMIT=""
LABEL org.opencontainers.image.revision=${COMMIT}
ENV PATH=/opt/venv/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOST=0.0.0.0
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY config.py fraud_api.py gunicorn.conf.py model.py openapi.json page.html server.py telemetry.py trusted_types.txt ./
# Compile every module that the service imports, those of Python too, because the root is read-only later. The bytecode
# is not checked against the times of the sources, which are all equal. The imports also prove that nothing is missing.
RUN MLFLOW_DISABLE_TELEMETRY=true python -c 'import boto3, fraud_api, gunicorn.app.wsgiapp, gunicorn.workers.gthread; \
        import opentelemetry.sdk.trace, py_compile, sys; \
        files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}; \
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH; \
        [py_compile.compile(file, doraise=True, invalidation_mode=mode) for file in sorted(files) if file[-3:] == ".py"]' \
    && rm -rf /usr/local/lib/python3.*/site-packages/* /usr/local/bin/pip*
# The answer of /version (https://github.com/mozilla-services/Dockerflow/blob/main/docs/version_object.md).
ARG SOURCE=""
ARG VERSION=""
ARG BUILD=""
RUN python -c 'import json, sys; names = "source", "version", "commit", "build"; \
    print(json.dumps(dict(zip(names, sys.argv[1:], strict=True))))' "$SOURCE" "$VERSION" "$COMMIT" "$BUILD" > version.json
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('PORT', '8000')}/health/live\", timeout=2)"]
CMD ["gunicorn"]
