"""Turn a checkpoint into a bundle. The only folder that imports torch."""

INSTALL = "pip install 'latentrt[export]'"
