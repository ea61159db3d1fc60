"""Jobs: from the exported snapshot of the old store to a new store that has caught up.

Every module here may be killed at any point and run again: what was done is in the ledger or in the spool, and nothing is
applied twice.
"""
