"""The JAX port, as Flax NNX modules."""
