"""A file of any shape -> texts -> token sequences, by a tokenizer that is given.

For whoever reads a user's text, the command line or an engine; imports nothing else of ours.
"""
