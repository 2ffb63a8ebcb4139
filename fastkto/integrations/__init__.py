"""fastkto inside the tools that people train with already."""
