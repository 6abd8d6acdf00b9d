"""The networks themselves: transformer and autoencoder, under the names of the original checkpoints."""
