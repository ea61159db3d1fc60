"""The load of one table into one target, from the kept snapshot.

A chunk that is marked is not repeated, and one that was written but not marked is not written twice.
"""
