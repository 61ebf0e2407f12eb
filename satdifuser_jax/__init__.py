"""SatDiFuser: a frozen diffusion model as a discriminative backbone for Earth observation."""
