"""A family at a URL on a small cluster, a process of its own: where its replicas run, and what came to the node.

    python -m tests.integration.placed URL SCRATCH

Three nodes on this machine: a head that takes no work, one with an accelerator, one without. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fettle.config import MonitorConfig, PlacementConfig, ReplicaConfig, ServeConfig, StoreConfig

FOUND = "found: "


def main() -> None:
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from deployments.app import build
    from deployments.placement import ACCELERATOR_LABEL

    url, scratch = sys.argv[1], Path(sys.argv[2])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=16, num_gpus=1, labels={ACCELERATOR_LABEL: "L4", "kind": "gpu"})
    cluster.add_node(num_cpus=8, labels={"kind": "cpu", "zone": "a"})
    ray.init(address=cluster.address, log_to_driver=False)
    config = ServeConfig.model_validate(
        {
            "family": url,
            "replicas": ReplicaConfig(min_replicas=2, max_replicas=2),
            # Ray gives a card to the fake engine, which does not use it.
            "placement": {
                "big": PlacementConfig(device="cuda", gpus=0.5, min_replicas=1, max_replicas=1),
                "zoned": PlacementConfig(labels={"zone": "a"}, min_replicas=1, max_replicas=1),
            },
            "monitor": MonitorConfig(directory=str(scratch / "evidence")),
            "store": StoreConfig(cache=str(scratch / "cache")),
            "router_cpus": 0.5,
        }
    )
    serve.start(http_options={"host": "127.0.0.1", "port": 0, "location": "HeadOnly"})
    serve.run(build(config), name="fettle", route_prefix="/")
    kinds = {node["NodeID"]: node["Labels"].get("kind", "head") for node in ray.nodes()}
    details = serve.context._get_global_client().get_serve_details()["applications"]["fettle"]["deployments"]
    where = {
        name.partition("@")[0]: sorted(kinds[replica["node_id"]] for replica in found["replicas"])
        for name, found in details.items()
        if "@" in name
    }
    copies = [str(path.relative_to(scratch)) for path in (scratch / "cache").rglob("weights.bin")]
    print(FOUND + json.dumps({"where": where, "copies": copies}), flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
