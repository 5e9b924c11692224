"""How alike the experts of a layer are: sums over rows, and what they lead to.

For whoever has experts' outputs, transformers' or an engine's; imports the core below it alone.
"""
