"""Who writes rollouts in place of the compiled sampler, and how old its weights are."""
