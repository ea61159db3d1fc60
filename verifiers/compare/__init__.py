"""The comparison of two states of a table: every key of either side gets exactly one class.

Values are compared by their types and by no digest. A proof of coverage shows that no key range and no row was left out.
"""
