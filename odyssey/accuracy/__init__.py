"""Accuracy: perplexity by the standard protocol, lm-eval tasks."""
