"""Text and a model become a table of how alike the experts are, and may that table be trusted.

For the command line and for what measures a table; imports models, results and the core.
"""
