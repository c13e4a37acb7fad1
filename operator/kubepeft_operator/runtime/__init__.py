"""A small level-triggered controller runtime. It knows Kubernetes, and nothing of FineTune or of anything else that it is used for."""
