"""Rows in, ragged batches out: sources, formats, chat rendering, packing, the order of a run."""
