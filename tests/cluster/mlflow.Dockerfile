# The MLflow server for tests/cluster, in the version that requirements-dev.txt pins.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
WORKDIR /data
COPY requirements.txt .
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.txt
USER 10001:10001
ENTRYPOINT ["mlflow"]
