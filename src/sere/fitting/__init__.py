"""Experts as linear maps of their input: what is kept of a layer's rows, and the fit.

For whoever has experts to ask, transformers' or an engine's; imports the core below it alone.
"""
