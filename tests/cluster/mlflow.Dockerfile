# MLflow's server, as the development lock has it, for the test in a cluster.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
WORKDIR /data
COPY requirements.txt .
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.txt
USER 10001:10001
ENTRYPOINT ["mlflow"]
