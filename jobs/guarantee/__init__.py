"""What the guarantee takes for granted, and the moments at which each assumption is asked.

A gap in the stream stops its tables for good. What can be made good again ends the run with a sentence.
"""
