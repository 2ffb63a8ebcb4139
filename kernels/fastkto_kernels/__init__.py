"""Kernels of fastkto: Triton kernels with their launchers, and the same steps in PyTorch.

Importing the package imports nothing: only the modules that hold Triton kernels
(`tile_steps_triton`, `fused_scan`, `row_steps_triton`) need Triton, and they are imported when a
backend asks for them.
"""
