"""Google Cloud for `ray up`, with on-demand machines where there are no spot ones; its API client is needed."""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

logger = logging.getLogger(__name__)
_SPOT_ONLY = ("provisioningModel", "instanceTerminationAction")


class SpotFirst(GCPNodeProvider):
    """Ray's own provider, but what Google refuses as spot is asked for on demand, at once."""

    def create_node(self, base_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Starts `count` machines; what they are and cost is said in the autoscaler's log.

        Raises:
            Exception: Google has no on-demand ones either.
        """
        scheduling = base_config.get("scheduling", {})
        if scheduling.get("provisioningModel") != "SPOT":
            return super().create_node(base_config, tags, count)
        on_demand = base_config | {
            "scheduling": {key: value for key, value in scheduling.items() if key not in _SPOT_ONLY}
        }
        nodes: dict[str, Any] = {}
        for _ in range(count):  # each of its own: where one of several fails, Ray does not say which
            try:
                nodes |= super().create_node(base_config, tags, 1)
            except Exception as error:  # Ray raises nothing more precise when Google has none left
                logger.warning("no spot machine, so one on demand: %s", error)
                nodes |= super().create_node(on_demand, tags, 1)
        return nodes
