"""Speed of training, sampling, scoring and metrics."""
