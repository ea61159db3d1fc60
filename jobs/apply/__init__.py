"""The apply side: spooled changes offered to a target through its gate, and the position written down.

Any order, repetition or batching of the same changes gives the same cells.
"""
