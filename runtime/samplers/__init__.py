"""Every sampler, by any of its names, compiled to a plan."""

from latentrt.runtime.samplers.make import make_plan
from latentrt.runtime.samplers.names import default_sampler, sampler_names

__all__ = ["default_sampler", "make_plan", "sampler_names"]
