"""Says what a cluster has too little of, for Ray would wait for it without a message."""

from __future__ import annotations

import os
from collections.abc import Mapping


def lacking(needs: Mapping[str, float]) -> str:
    """What of the needs the cluster could never hold, such as "1 GPU (0)"; nothing where it adds nodes on demand.

    Args:
        needs: resource of Ray to its amount.
    """
    import ray

    if os.environ.get("ECHOX_AUTOSCALED"):
        return ""
    has = ray.cluster_resources()
    return ", ".join(
        f"{need:g} {name} ({has.get(name, 0):g})" for name, need in needs.items() if need > has.get(name, 0)
    )
