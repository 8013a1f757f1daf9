"""The search over layouts of a training run, what it costs, and its report. Torch-free."""
