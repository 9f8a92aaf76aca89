"""Engines that run the same ServerApp and ClientApp: in this process, or through Flower."""
