"""latentrt: the deployment runtime for Stable Diffusion.

`latentrt.export` turns a checkpoint into a bundle (needs torch), `latentrt.engines` builds and runs what is
in the bundle on one kind of device, `latentrt.runtime` draws pictures from it (NumPy, no torch).
"""

__version__ = "0.1.0"
