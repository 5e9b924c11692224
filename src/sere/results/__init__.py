"""What every result records: where it was measured, and the pieces of unfinished work.

For every room that measures; imports the core only.
"""
