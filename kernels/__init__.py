"""Triton kernels and their launchers (installed as `speedk.kernels`); `speedk.ops` chooses among them."""
