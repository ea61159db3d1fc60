"""The router: what the application's processes import to read and write while its table moves.

It needs the base install alone. A direct write bears the epoch of its tenant, and a store without authority refuses it.
"""
