"""On-policy distillation on Lightning."""
