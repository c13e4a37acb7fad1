"""The types of the two kinds, FineTune and BatchInference: the one source of the CRDs, the reference page and local validation."""

from kubepeft.types.objects import API_VERSION, GROUP, KINDS, VERSION, BatchInference, FineTune, Object

__all__ = ["API_VERSION", "GROUP", "KINDS", "VERSION", "BatchInference", "FineTune", "Object"]
