"""Every sampler, by name, compiled to a plan."""

from latentrt.runtime.samplers.catalogue import make_plan, sampler_names

__all__ = ["make_plan", "sampler_names"]
