"""One run, from a configuration to a record: data, model, optimization, the loop and the run directory."""
