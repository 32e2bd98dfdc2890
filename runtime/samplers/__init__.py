"""Every sampler, by any of its names, compiled to a plan."""

from latentrt.runtime.samplers.make import make_plan
from latentrt.runtime.samplers.names import own_sampler, sampler_names

__all__ = ["make_plan", "own_sampler", "sampler_names"]
