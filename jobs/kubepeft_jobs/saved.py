"""How a stage says that it was asked to stop and did.

In a module of its own: the worker runs as `__main__`, and what a stage raised would be another class than the one it catches.
"""

from __future__ import annotations

from typing import Any


class Saved(Exception):
    """The stage has saved what it had; `fields` are those of kubepeft.stage.Result."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.fields = fields
