"""What `powerflow_lit.evaluate` does: benchmarks, samplers and scores, kept as the work goes on."""
