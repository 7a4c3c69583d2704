"""Models: where checkpoints come from, reading them tensor by tensor, and the architectures that are known."""
