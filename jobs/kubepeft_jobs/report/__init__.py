"""report.html: one page, without anything from outside, that says how a training run went."""
