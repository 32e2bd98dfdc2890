"""Every sampler, by any of its names, compiled to a plan."""

from latentrt.runtime.sampling.catalogue import own_sampler, sampler_names
from latentrt.runtime.sampling.make import make_plan

__all__ = ["make_plan", "own_sampler", "sampler_names"]
