"""What a PostgreSQL table has by itself: defaults, sequences, and reasons against it as a target.

These modules look at a table of the user's and know nothing of our gate.
"""
