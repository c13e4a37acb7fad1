"""The prepare stage: data files in, tokenized Arrow files and a report out; no torch, flat memory.

`pipeline.prepare` is the entry. This file imports nothing, because every worker process loads it.
"""
