"""The ledger: what this migration knows for certain, beside the tables that it guards.

Every step reads here what is done and records what it did. Who may do what by it is stated as pure functions, which the model
runs too.
"""
