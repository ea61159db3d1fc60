"""Delta Lake as a target: idempotent appends while a table is loaded, then gated MERGEs.

One writer merges. A task that dies appends nothing, and a chunk that is appended twice counts once.
"""
