"""The causal autoencoder of video: model, streaming, tiles, losses and its training."""
