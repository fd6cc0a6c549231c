"""Pods that do not answer as they should: frozen, cut off, or far too slow.

In: by how much what each pod owes is overdue (the first token of its oldest request, the report that it makes every
second). Out: seconds that choosing it costs. They grow with the square, so that a pod that is a little late still gets
some requests, and one that is silent gets none; and they end with the pod's next sign of life.

    overdue   a 0, b 0, c 6 s     ->     a 0, b 0, c 42 s
    overdue   a 3, b 3, c 5 s     ->     a 0, b 0, c 6 s       the whole fleet is late: only what is beyond counts
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from serve_app.types import PodId


def suspicion(overdue_s: Mapping[PodId, float], pods: int) -> dict[PodId, float]:
    """Cost of each pod, in seconds; the pods that are not suspected are left out.

    Args:
        overdue_s: of those of the `pods` with which anything is.
    """
    if not overdue_s:
        return {}
    usual_s = statistics.median_low([*overdue_s.values(), *[0.0] * (pods - len(overdue_s))])
    beyond = {pod: late_s - usual_s for pod, late_s in overdue_s.items() if late_s > usual_s}
    return {pod: late_s * (1 + late_s) for pod, late_s in beyond.items()}
