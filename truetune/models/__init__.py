"""One face for every causal language model: hidden states of a ragged batch, and a measured head."""
