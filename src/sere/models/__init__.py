"""Any transformers model, seen as its experts: load it, find its MoE layers, run and re-route them.

For calibration, evaluation and what runs engines of its own; imports the core.
"""
