"""PostgreSQL as a target: the version gate, and everything that runs in a transaction beside it.

A change is taken if and only if its version is above the key's cell and above the floor. The statements of the gate decide; no
caller does.
"""
