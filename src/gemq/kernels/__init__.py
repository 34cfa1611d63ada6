"""Packed modules and the kernels that compute with them. ``dispatch`` chooses the kernel."""
