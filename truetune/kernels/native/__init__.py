"""Kernels in C++ that are compiled on the machine that runs them, on first use; nothing here is needed to work."""
