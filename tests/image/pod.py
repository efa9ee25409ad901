"""Read the rendered manifests from standard input and print the ConfigMap and the Deployment for `podman kube play`.

    kubectl kustomize k8s | python pod.py IMAGE REGISTRY_PORT POD_PORT

Changed are the image, the model version, the registry's address (this machine, as the pod sees it) and the host's port.
The API key is in the ConfigMap, because versions of podman differ in how they read a Secret.
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
