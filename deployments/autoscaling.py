"""The policies that Serve's controller calls. Ray carries this module there by value; what it does is in `scaling`.

`EachDeployment` is what every deployment names, so that `fettle serve` and `serve run` have it: `serve.run` takes no
policy for an application. `Application` is for a Serve config file, as `deploy/serve.yaml` has it:

    autoscaling_policy: {policy_function: deployments.autoscaling:Application}

Both decide the same, about all deployments of an application together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.scaling import scaling_of


class EachDeployment:
    """A deployment's policy. `settings` are read where they are needed, from the deployment's own configuration."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        scaling = scaling_of(context.app_name)
        scaling.hear(context)
        return scaling.take(context.deployment_name, context.target_num_replicas), {}


class Application:
    """An application's policy, in the shape of Ray 2.60: contexts in; numbers by deployment, and what to remember, out.

    Deployments that are not named stay as they are.
    """

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        wanted: dict[Any, int] = {}
        for context in contexts.values():
            scaling_of(context.app_name).hear(context)
        for deployment, context in contexts.items():
            count = scaling_of(context.app_name).take(context.deployment_name, context.target_num_replicas)
            if count != context.target_num_replicas:
                wanted[deployment] = count
        return wanted, {}
