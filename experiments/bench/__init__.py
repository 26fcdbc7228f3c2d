"""What `experiments.work_precision` is made of: what runs, what it makes, how it is shown."""
