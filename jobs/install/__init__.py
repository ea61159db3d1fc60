"""What the product makes in the two stores: stream, tables and gates; and how all of it is removed.

Each thing is on record, or found by its name, before it is there, so a kill leaves nothing that the next run does not remove.
"""
