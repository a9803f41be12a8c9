"""The benchmark laboratory: simulated engines, workloads, measurements and reports."""
