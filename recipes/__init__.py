"""Ready recipes and the small checkpoints that they use."""
