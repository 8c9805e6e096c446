"""What papers on on-policy distillation claim, in miniature: ``make claims`` writes docs/claims.md."""
