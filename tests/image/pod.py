"""From the rendered manifests on standard input what `podman kube play` takes: the ConfigMap and the Deployment.

Only the image, the registry's address (this machine's, seen from the pod) and the port outside are others, and the key
comes with the ConfigMap: what podman takes for a Secret differs from version to version.
"""

import sys

import yaml

image, registry_port, pod_port = sys.argv[1:]
documents = {document["kind"]: document for document in yaml.safe_load_all(sys.stdin)}
documents["ConfigMap"]["data"] |= {"API_KEYS": "k3y", "MODEL_URI": "models:/fraud-detector/1"}
documents["ConfigMap"]["data"]["MLFLOW_TRACKING_URI"] = f"http://host.containers.internal:{registry_port}"
[container] = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
container["image"] = image
del container["envFrom"][1]
container["ports"][0]["hostPort"] = int(pod_port)
yaml.safe_dump_all([documents[kind] for kind in ("ConfigMap", "Deployment")], sys.stdout)
