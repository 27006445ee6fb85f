"""edgemoe: a Mixture-of-Experts checkpoint and a memory budget go in, the best model file that really fits comes out."""

__version__ = "0.1.0"
