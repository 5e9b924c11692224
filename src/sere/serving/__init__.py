"""Serving: re-routing inside vLLM. `symbols` and `engine` are the only modules of the project that
import vllm; everything they decide with lives in the modules beside them, testable without it.
For vLLM's plug-in loader and for what starts an engine; imports the core only.
"""
