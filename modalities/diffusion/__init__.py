"""Few-step diffusion: so far its convention and the steps of its samplers (`flow`)."""
