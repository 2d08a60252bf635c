"""Inner loops over a batch of tasks and their adjoints."""
