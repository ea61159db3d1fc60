"""Access: which sessions can be had, and which rights our role and the application's roles have.

Each lack is a sentence with the least statement that gives the right. Nothing is granted that the spec does not ask for.
"""
