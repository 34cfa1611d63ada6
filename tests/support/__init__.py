"""Code that several tests share: tiny models, checkpoints, jobs, and independent readers."""
