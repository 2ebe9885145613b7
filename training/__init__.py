"""What runs an experiment: data, the loop, records and tables."""
