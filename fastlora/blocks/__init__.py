"""Several linears as one step: projections that share x, and the gated MLP."""
