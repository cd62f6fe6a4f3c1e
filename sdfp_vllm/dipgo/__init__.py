"""DiP-GO: finds and skips the block x timestep work a frozen diffusion model hardly needs."""
