"""jaxalign: language models from raw text to aligned behaviour, as pure functions over pytrees in JAX.

Nothing is imported here, so that ``import jaxalign.data`` never pulls in jax.
"""

__version__ = "0.1.0"
