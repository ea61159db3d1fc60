"""Sampling: which reads are compared at all, by the flag's check ratio and by a share of one's own.

A read that is left out costs its caller one random number. So the flag's ratio is not asked for each read: the thread of
comparisons asks it anew twice a second. LaunchDarkly's ratio n means one of n, 0 means none.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from random import random


class Sampling:
    """Decides for one process; `share` is its own, from 0 to 1, and `ratio` returns the flag's."""

    def __init__(self, share: float = 1.0, ratio: Callable[[], int] = lambda: 1) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"compare_share is {share}: give a share of all reads, from 0 to 1")
        self.own = share
        self.ratio = ratio
        self._left_out = count(1)
        self.left_out = 0
        """How many were left out. No lock is taken for it, so for a moment it may be behind by as many as there are threads."""
        self.refresh()

    def refresh(self) -> None:
        """Ask the flag anew."""
        ratio = self.ratio()
        self.share = self.own / ratio if ratio > 0 else 0.0

    def takes(self) -> bool:
        """Decide for one read (caller's thread).

        Returns:
            Whether it is compared.
        """
        if random() < self.share:
            return True
        self.left_out = next(self._left_out)
        return False
