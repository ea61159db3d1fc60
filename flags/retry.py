"""Retry: which refusals of a server are tried again, how often, and after how long.

Nothing was done in such a transaction. A caller's unit goes by it, and a worker of a mirror. Pure.
"""

from __future__ import annotations

import random

RETRIED = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock: nothing was done, and the same again may work."""

TRIES = 3
RETRY_SECONDS = 0.05


def before_retry(tries: int) -> float:
    """Return the seconds to wait: at once, the loser of a deadlock may overtake its winner and meet it again.

    Args:
        tries: How often it was tried.

    Returns:
        The seconds.
    """
    return RETRY_SECONDS * tries * random.uniform(0.5, 1.0)
