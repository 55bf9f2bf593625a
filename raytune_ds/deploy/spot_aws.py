"""AWS for `ray up`, with on-demand machines where there are no spot ones; boto3 is needed."""

from __future__ import annotations

import logging
from typing import Any

from botocore.exceptions import ClientError
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

logger = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):
    """Ray's own provider, but what AWS refuses as spot is asked for on demand, at once."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Starts `count` machines; what they are and cost is said in the autoscaler's log.

        Raises:
            NodeLaunchException: AWS has no on-demand ones either.
        """
        if "InstanceMarketOptions" not in node_config:
            return super().create_node(node_config, tags, count)
        try:
            nodes = super().create_node(node_config, tags, count)
        except (NodeLaunchException, ClientError) as error:
            logger.warning("no spot machine: %s", error)
            nodes = {}
        # AWS may start fewer than it was asked for.
        if missing := count - len(nodes):
            logger.warning("%d of %d machines are taken on demand", missing, count)
            on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
            nodes = nodes | super().create_node(on_demand, tags, missing)
        return nodes
