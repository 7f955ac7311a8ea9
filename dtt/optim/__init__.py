"""What turns gradients into updates: optimizers and learning-rate schedules."""
