"""Kernels of fastkto: Triton kernels with their launchers, and the same steps in PyTorch.

Importing the package imports nothing: only the modules that hold Triton kernels
(`linear_logprob`, `kto_loss`) need Triton, and they are imported when a backend asks for them.
"""
