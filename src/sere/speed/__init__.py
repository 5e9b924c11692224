"""How fast vLLM decodes, stock and re-routed, beside what the step must cost.

For the command line; imports step_cost, serving, results and the core.
"""
