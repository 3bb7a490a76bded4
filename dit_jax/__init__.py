"""A Sora-style spacetime diffusion transformer in JAX/Flax: train it, sample from it."""
