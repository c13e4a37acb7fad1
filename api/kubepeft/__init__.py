"""kubepeft: fine-tune language models in batch, on Kubernetes or on one machine."""

__version__ = "0.1.0"
