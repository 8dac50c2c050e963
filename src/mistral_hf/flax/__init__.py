"""The parts of the JAX port: Flax NNX modules, their cache, loading, generation and losses."""
