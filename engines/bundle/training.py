"""What a manifest says of a checkpoint's training: its noise, and its own scheduler."""

from __future__ import annotations

from typing import Literal

import msgspec

from latentrt.engines.spec import Document

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]
PartialStep = Literal["skipped", "taken"]


class EdmRange(Document, frozen=True, kw_only=True):
    """The noise of a model with EDM's preconditioning (arXiv:2206.00364, Table 1), which has no training timesteps.

    sigma_min, sigma_max: the least and the most noise over picture that it was trained on
    sigma_data: the standard deviation of the latents it was trained on
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float


class DynamicShift(Document, frozen=True, kw_only=True):
    """How a flow's shift grows with the picture: mu is linear in the number of its tokens.

    base_shift, max_shift: mu at base_tokens and at max_tokens
    kind: whether the shift is exp(mu) or mu itself
    """

    base_shift: float
    max_shift: float
    base_tokens: int
    max_tokens: int
    kind: Literal["exponential", "linear"] = "exponential"


class FlowShift(Document, frozen=True, kw_only=True):
    """How a flow's steps move towards the noise: sigma becomes shift * sigma / (1 + (shift - 1) * sigma).

    dynamic: in place of the shift, where it depends on the size of the picture
    terminal: what the last step's sigma is stretched to afterwards, all the others with it; None to leave it
    """

    shift: float = 1.0
    dynamic: DynamicShift | None = None
    terminal: float | None = None


class OwnSampler(Document, frozen=True, kw_only=True):
    """A checkpoint's own scheduler: one of the runtime's samplers, and what its config sets; None is the sampler's own.

    name, spacing: as in `latentrt.runtime.sampling`
    order: of a multistep solver; solver_type: how its second order is taken (UniPC: which B(h))
    lower_order_final, euler_at_final: whether the last steps have a lower order
    predicts_noise: whether UniPC extrapolates the noise, not the picture
    disable_corrector: the steps after which UniPC does not correct
    end: the ratio after the last step: none, the least of training, or the last one again
    sigma_min, sigma_max, rho: the ends and the exponent of a spacing of sigmas
    interpolation: how sigmas lie between timesteps; timestep_type: whether the model gets log(sigma) / 4
    lambda_min: timesteps whose half-log-SNR is below this are not visited
    variance: of DDPM's noise
    original_inference_steps, timestep_scaling: of consistency models
    shift: of a flow's steps, in bundles of older versions: `TrainingSchedule.flow` has it now
    rescale_betas_zero_snr: False where the class does not know the schedule's own value
    """

    name: str
    spacing: str | None = None
    order: Literal[1, 2, 3] | None = None
    solver_type: Literal["midpoint", "heun", "bh1", "bh2"] | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool | None = None
    predicts_noise: bool | None = None
    disable_corrector: tuple[int, ...] | None = None
    end: Literal["zero", "lowest", "repeat"] | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    interpolation: Literal["linear", "log_linear"] | None = None
    timestep_type: Literal["discrete", "continuous"] | None = None
    lambda_min: float | None = None
    variance: Literal["fixed_small", "fixed_large"] | None = None
    original_inference_steps: int | None = None
    timestep_scaling: float | None = None
    shift: float | None = None
    rescale_betas_zero_snr: bool | None = None

    @property
    def options(self) -> dict[str, object]:
        """Return what the config sets beside the sampler and its spacing, by the names of the fields."""
        values = msgspec.structs.asdict(self)
        return {name: value for name, value in values.items() if value is not None and name not in ("name", "spacing")}


class TrainingSchedule(Document, frozen=True, kw_only=True):
    """The noise the checkpoint was trained with, and its own scheduler, in diffusers' terms.

    timestep_spacing: None if the checkpoint's config leaves it to each scheduler, as Stable Diffusion 1.x does
    scheduler: the checkpoint's own scheduler class; sampler: what it is here, None in bundles of older versions
    edm: in place of the betas, where the model has EDM's preconditioning
    flow: how a flow's steps are shifted, by whichever sampler; None where the model is not of a flow
    partial_step: what an image to start from with a share of the steps that is not whole makes of the step that the
        share ends in, as diffusers' pipelines of the family do: it is skipped, or taken
    clip_sample: whether diffusers' pipeline of this family would clip what the model predicts: no plan can, see `ddim`
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    prediction_type: Prediction
    timestep_spacing: Spacing | None
    steps_offset: int
    set_alpha_to_one: bool
    rescale_betas_zero_snr: bool = False
    trained_betas: tuple[float, ...] | None = None
    scheduler: str = "DDIMScheduler"
    sampler: OwnSampler | None = None
    edm: EdmRange | None = None
    flow: FlowShift | None = None
    partial_step: PartialStep = "skipped"
    clip_sample: bool = False

    @property
    def clip_note(self) -> str | None:
        """Say how pictures differ from those of diffusers' pipeline; None if they do not."""
        if not self.clip_sample:
            return None
        return (
            f"the checkpoint's {self.scheduler} has clip_sample, which diffusers' pipeline of this family honours: it "
            "cuts the predicted latents to -1..1; here nothing is cut, so its pictures differ"
        )
