"""What a scenario file declares: model, workload, load, system, and limits."""
