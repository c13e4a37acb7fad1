"""Batch inference: input lines to requests (`requests`), requests to completions (`engine`, `decode`)."""
