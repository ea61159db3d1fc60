"""A PostgreSQL store as a source: its catalogue, its snapshot, and its change stream.

The old store is read by these modules, and so is the new one once it has authority.
"""
