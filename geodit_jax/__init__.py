"""GeoDiT: a vision-language model for remote sensing that writes by masked diffusion."""
