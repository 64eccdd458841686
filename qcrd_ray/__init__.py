"""qcrd_ray: quality-guided contrastive rationale distillation on Ray."""
