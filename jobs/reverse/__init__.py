"""Reverse replication: the new store's stream, by which the old store and the lakes learn what is written to it.

The path is opened in front of the first fence, and proved whole before it counts.
"""
