"""Rows of a data set: their formats, their tokens, and the ragged batches made of them."""
