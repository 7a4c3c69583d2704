"""Texts for calibration and perplexity: from the hub, from local files, or embedded in Python itself."""
