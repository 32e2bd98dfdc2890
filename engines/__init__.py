"""What is in a bundle, and what builds and runs it on one kind of device."""

import logging

logging.getLogger("latentrt").addHandler(logging.NullHandler())  # silent until a program configures logging
