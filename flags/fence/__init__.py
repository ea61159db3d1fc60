"""The fence: write authority moves from one store to the other.

The store that loses authority refuses writes first. Everything that it took is in the other store before that one is written.
"""
