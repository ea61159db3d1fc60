"""What all stores share: their interface, types, key ranges, and how a PostgreSQL table is read.

Nothing here knows a kind of store. The order of the statements that run against a gated table is data here, because the model
runs it too.
"""
