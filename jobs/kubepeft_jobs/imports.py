"""Importing torch, transformers and peft takes most of a stage's start; this takes a third off it."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Any, NoReturn


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """For the imports of a stage.

    What an import makes stays, so the garbage collector, which otherwise goes through all of it again and again, rests meanwhile. And
    bitsandbytes, which peft imports wherever it is installed, may not hand its fallback kernels to torch.compile: that loads all of
    inductor, and bitsandbytes runs them as they are without. Nor does it tell of kernels that it would have liked to fetch from the hub.
    """
    gc.disable()
    try:
        _import_bitsandbytes()
        yield
    finally:
        gc.enable()


def _import_bitsandbytes() -> None:
    import torch

    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    compile, torch.compile = torch.compile, _refuse
    try:
        with contextlib.suppress(ImportError):
            import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile
        logger.setLevel(level)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("not while it is imported")
