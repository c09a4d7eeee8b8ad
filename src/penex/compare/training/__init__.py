"""Training: one run, its tuning, and the devices and machines that share the work."""
