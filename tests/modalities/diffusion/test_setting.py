"""The diffusion setting: diffusers' own samples, and what each method's loss and gradient are, against float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from opd_lightning.data import PromptData
from opd_lightning.modalities.diffusion import (
    SDE,
    AverageVelocity,
    FlowMatching,
    InverseError,
    LearnedScore,
    NoiseLevel,
    Noising,
    ReferenceImage,
    Renoise,
    ScoreDifference,
    Shortcuts,
    StepVelocity,
    TotalDerivative,
    Velocity,
    VelocityMatching,
    flow,
)
from opd_lightning.modalities.diffusion.families import load_family
from opd_lightning.modalities.diffusion.models import Transformer
from opd_lightning.modalities.diffusion.sampler import generator
from opd_lightning.objective import CrossEntropy, ForwardKL, LogRatio, Objective, PolicyGradient, ReverseKL, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.reward import Reward
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Live, Teacher
from tests.test_images import encoded
from tests.tiny import Rows, act, fit, make_trainer
from tests.tiny_diffusion import PIPELINES, make_rows


def on_policy(module: Any, count: int = 4, **settings: Any) -> Any:
    return act(module, make_rows(count), **settings)


def objective_of(module: Any, trajectories: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Loss and gradients of a micro-batch that stands alone."""
    streams = module.streams.query_all(module.objective.teachers(), trajectories)
    student = module.distribution(module.policies["student"], trajectories)
    loss, _ = module.objective(student, streams, trajectories)
    parameters = [p for p in module.student.parameters() if p.requires_grad]
    return loss, list(torch.autograd.grad(loss, parameters, allow_unused=True))


def states(module: Any, trajectories: Any) -> list[tuple[int, int, torch.Tensor, float, float]]:
    """Row, step, latent, t and r of every trained step."""
    found = []
    for row, k in trajectories.mask.nonzero().tolist():
        latent = trajectories.observation["start"][row] if k == 0 else trajectories.actions[row, k - 1]
        t, r = (float(trajectories.channels[name][row, k]) for name in ("sigma", "toward"))
        found.append((row, k, latent, t, r))
    return found


def says(module: Any, name: str, row: int, latent: torch.Tensor, t: float, r: float, guidance: float = 1.0) -> Any:
    """One policy's velocity at one state, asked for by itself."""
    policy = module.policies[name]
    field = module.velocity_field(policy, make_rows(row + 1), guidance)
    with torch.no_grad():
        levels = (torch.tensor([x], dtype=torch.float64) for x in (t, r))
        return field(torch.tensor([row]), latent[None], *levels)[0]


# -- rollouts -----------------------------------------------------------------------------------------------------


def sample_with_diffusers(folder: Any, kind: str, steps: int, seeds: list[int], size: int = 16) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps).tolist()}
    if kind == "anyflow":
        how = {"num_frames": 1, "num_inference_steps": steps}
    elif kind != "flux":
        how["guidance_scale"] = 1.0 if kind == "stable_diffusion_3" else 0.0
    shape = {"height": size, "width": size, "max_sequence_length": 16}
    made = [
        pipe(row["prompt"], generator=generator(seed), **shape, **how, output_type="latent", return_dict=False)[0]
        for row, seed in zip(make_rows(len(seeds)), seeds, strict=True)
    ]
    if kind == "flux":
        made = [pipe._unpack_latents(one, size, size, pipe.vae_scale_factor) for one in made]
    return torch.cat(made)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_rollout_is_diffusers_own_sampler_bit_for_bit(make, pipeline, kind, steps):
    """One image at a time: the kernels of larger batches round differently."""
    module = make(kind)
    alone = [act(module, [row], seed=1000 * i, horizon=steps) for i, row in enumerate(make_rows(3))]
    theirs = sample_with_diffusers(pipeline(kind), kind, steps, [0, 1000, 2000])
    assert torch.equal(torch.cat([module.ends(rolled) for rolled in alone]), theirs)
    together = on_policy(module, 3, horizon=steps)
    torch.testing.assert_close(module.ends(together), theirs, rtol=1e-4, atol=1e-5)
    assert together.mask.shape == (3, steps)


def test_an_exported_student_samples_what_validation_saw(make, kind, tmp_path):
    module = make(kind)
    fit(module, tmp_path / "run", make_rows(8), steps=2)
    module.save_student(module.policies["student"].model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name in ("transformer", "scheduler", "vae")) == [
        "scheduler", "transformer", "vae",
    ]  # fmt: skip
    told = [
        file
        for file in (tmp_path / "out").rglob("*.json")
        if str(module.policies["student"].path) in file.read_text(encoding="utf-8")
    ]
    assert not told, "where its parts came from on this machine is nobody's business"
    seen = module.evaluator.act("student", make_rows(1), 0)
    seeds = seen.observation["seed"].tolist()
    assert torch.equal(module.ends(seen), sample_with_diffusers(tmp_path / "out", kind, 3, seeds))


def test_the_velocity_of_a_jump_is_told_where_it_ends(make):
    module = make("anyflow", flow_map=False)
    rolled = on_policy(module, horizon=1)
    told = on_policy(make("anyflow"), horizon=1)
    assert not torch.allclose(rolled.actions, told.actions)
    with pytest.raises(ValueError, match=r"flow_map: a StableDiffusion3Pipeline can't be told where a step ends"):
        make("stable_diffusion_3", flow_map=True).audit_rows()


def test_draws_depend_on_the_seed_alone(make, kind):
    module = make(kind, sampler=Renoise())
    together, alone = on_policy(module, 4), act(module, make_rows(4)[2:3], seed=2000)
    width = alone.actions.shape[1]
    torch.testing.assert_close(together.actions[2, :width], alone.actions[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [Renoise(), Shortcuts([2, 4, 8]), Shortcuts([4], trained="last"), SDE()])
def test_samplers_end_at_an_image_and_train_what_they_say(make, sampler):
    module = make("anyflow", sampler=sampler)
    rolled = on_policy(module, 6, horizon=4)
    sigma, toward = rolled.channels["sigma"], rolled.channels["toward"]
    assert ((sigma[:, 0] == 1) & (sigma[:, 1:] <= sigma[:, :-1]).all(1)).all()
    last = (sigma > 0).sum(1) - 1
    if isinstance(sampler, Renoise):
        assert (rolled.mask.sum(1) == 1).all()
        assert rolled.mask[torch.arange(6), last].all()
        assert (toward == 0).all()
        assert len(set(last.tolist())) > 1, "exits differ"
    elif isinstance(sampler, Shortcuts):
        assert (sigma > 0).sum(1).max() <= 3
        assert (toward[torch.arange(6), last] == 0).all()
        assert sampler.trained == "all" or (rolled.mask.sum(1) == 1).all()
    else:
        assert rolled.mask.sum(1).tolist() == [3] * 6, "the last step has no density"


def test_log_probs_of_transitions_are_not_rounded_in_half_precision(make):
    """Under bf16-true new tensors are of that type unless they say otherwise; log-probs stay float32."""
    module = make("stable_diffusion_3", sampler=SDE(0.7))
    sampler, rolled = module.sampler, on_policy(module, 4, horizon=3)
    arguments = sampler, module.policies["student"], rolled, lambda rows: None
    expected = module._log_probs(*arguments)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert module._log_probs(*arguments).dtype == expected.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_stochastic_transition_has_the_mean_and_deviation_that_it_was_drawn_with(make):
    """Replaying the stored states gives the sampled means, and the noise that is left over is standard normal's."""
    module = make("stable_diffusion_3", sampler=SDE(0.7))
    rolled = on_policy(module, 4, horizon=3)
    for row, k, latent, t, r in states(module, rolled):
        v = says(module, "student", row, latent, t, t)
        mean, deviation = flow.stochastic_step(latent[None], v[None], torch.tensor([t]), torch.tensor([r]), 0.7)
        draws = generator(int(rolled.observation["seed"][row]), 2)
        noise = [torch.randn(latent.shape, generator=draws) for _ in range(k + 1)][k]
        torch.testing.assert_close(rolled.actions[row, k], (mean + deviation * noise)[0], rtol=1e-4, atol=1e-5)


# -- formulas -----------------------------------------------------------------------------------------------------


def test_transition_matching_is_the_squared_error_at_the_students_states(make, kind):
    module = make(kind, velocity_targets={"teacher": Velocity()})
    rolled = on_policy(module)
    loss, _ = objective_of(module, rolled)
    wanted = [
        float((says(module, "student", row, x, t, r) - says(module, "teacher", row, x, t, t)).double().square().mean())
        for row, _, x, t, r in states(module, rolled)
    ]
    assert float(loss) == pytest.approx(np.mean(wanted), rel=1e-4)


def test_the_error_of_clean_images_is_the_level_squared_times_that_of_velocities(make):
    module = make(objective=Objective([Term(VelocityMatching(), weights=[NoiseLevel(2)])]))
    rolled = on_policy(module)
    wanted = []
    for row, _, x, t, r in states(module, rolled):
        ours, theirs = (says(module, name, row, x, t, r).double() for name in ("student", "teacher"))
        clean = flow.clean_estimate(x.double(), ours, t) - flow.clean_estimate(x.double(), theirs, t)
        wanted.append(float(clean.square().mean()))
    assert float(objective_of(module, rolled)[0]) == pytest.approx(np.mean(wanted), rel=1e-4)


def test_errors_may_be_divided_by_their_own_size(make):
    module = make(objective=Objective([Term(VelocityMatching(), weights=[InverseError(0.5, 0.1)])]))
    rolled = on_policy(module)
    wanted = []
    for row, _, x, t, r in states(module, rolled):
        error = (says(module, "student", row, x, t, r) - says(module, "teacher", row, x, t, r)).square().mean()
        wanted.append(float(error / (error + 0.1) ** 0.5))
    assert float(objective_of(module, rolled)[0]) == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.mark.parametrize("signal", [ReverseKL(), ForwardKL()])
def test_the_kl_of_stochastic_transitions_is_exact(make, signal):
    """‖μ_S − μ_T‖² / 2σ² of the sampler's own means and deviations."""
    module = make("stable_diffusion_3", signal=signal, sampler=SDE(0.7))
    rolled = on_policy(module)
    wanted = []
    for row, _, x, t, r in states(module, rolled):
        x = x[None].double()
        levels = torch.tensor([t]).double(), torch.tensor([r]).double()
        means = [
            flow.stochastic_step(x, says(module, who, row, x[0].float(), t, t)[None].double(), *levels, 0.7)
            for who in ("student", "teacher")
        ]
        (ours, deviation), (theirs, _) = means
        wanted.append(float(((ours - theirs) / deviation).square().sum() / 2))
    assert float(objective_of(module, rolled)[0]) == pytest.approx(np.mean(wanted), rel=1e-3)


def test_nothing_is_lost_or_learned_from_oneself(make, kind):
    module = make(kind, teacher={"teacher": Teacher(Live())})
    loss, gradients = objective_of(module, on_policy(module))
    assert float(loss) == 0
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("flow_map", [True, False])
def test_a_teacher_is_told_where_a_step_ends_if_the_student_is(make, pipeline, flow_map):
    """Otherwise it would answer another question than the student did: also for a difference of scores."""
    alone = make(teacher={"teacher": Teacher(Live())}, flow_map=flow_map)
    loss, _ = objective_of(alone, on_policy(alone))
    assert float(loss) == 0
    module = matched(make, pipeline, fake_seed=2, flow_map=flow_map)
    assert float(objective_of(module, on_policy(module))[0]) < 1e-9


@pytest.mark.parametrize(("most", "stride"), [(1, None), (5, None), (5, 0.17), (100, 0.23)])
def test_the_average_velocity_is_that_of_the_teachers_own_small_steps(make, most, stride):
    module = make(velocity_targets={"teacher": AverageVelocity(most, stride)})
    rolled = on_policy(module)
    wanted = []
    counts = set()
    for row, _, x, t, r in states(module, rolled):
        substeps = most if stride is None else min(most, next(n for n in range(1, 101) if float(t - r) / n <= stride))
        counts.add(substeps)
        end = x
        for k in range(substeps):
            a, b = (t + (r - t) * j / substeps for j in (k, k + 1))
            end = flow.euler(end, says(module, "teacher", row, end, a, a), a, b)
        average = (end - x) / (r - t)
        wanted.append(float((says(module, "student", row, x, t, r) - average).square().mean()))
    assert (len(counts) > 1) == (stride is not None), "long and short intervals"
    assert float(objective_of(module, rolled)[0]) == pytest.approx(np.mean(wanted), rel=1e-4)


def test_guidance_is_one_formula_and_1_is_the_conditional_model(make):
    plain, guided = make(velocity_targets={"teacher": Velocity(1.0)}), make(velocity_targets={"teacher": Velocity(3.0)})
    rolled = on_policy(plain)
    assert torch.equal(
        objective_of(plain, rolled)[0], objective_of(make(velocity_targets={"teacher": Velocity()}), rolled)[0]
    )
    row, _, x, t, _ = states(plain, rolled)[1]
    field = plain.velocity_field(plain.policies["teacher"], [{"prompt": ""}])
    with torch.no_grad():
        nothing = field(torch.tensor([0]), x[None], *[torch.tensor([t], dtype=torch.float64)] * 2)[0]
    conditional = says(plain, "teacher", row, x, t, t)
    torch.testing.assert_close(
        says(guided, "teacher", row, x, t, t, 3.0), nothing + 3 * (conditional - nothing), rtol=1e-4, atol=1e-5
    )


def data_module(make: Any, noising: Noising, **settings: Any) -> Any:
    return make(rollout=Rollout(batch_size=4, behavior={"dataset": 1.0}), noising=noising, **settings)


def test_flow_matching_of_images(make):
    module = data_module(
        make, Noising(), teacher={}, objective=Objective([Term(FlowMatching(), teacher=None)]), flow_map=False
    )
    given = module.act("dataset", make_rows(4), [5, 6, 7, 8])
    clean = module.family.latents([row["image"] for row in make_rows(4)])
    wanted = []
    for row, _, x, t, _ in states(module, given):
        noise = torch.randn((1, *clean.shape[1:]), generator=generator(5 + row))[0]
        torch.testing.assert_close(x, (1 - t) * clean[row] + t * noise, rtol=1e-4, atol=1e-5)
        wanted.append(float((says(module, "student", row, x, t, t) - (noise - clean[row])).square().mean()))
    assert float(objective_of(module, given)[0]) == pytest.approx(np.mean(wanted), rel=1e-3)


def test_the_forward_flow_map_stage_is_flow_matching_where_r_is_t_and_a_total_derivative_elsewhere(make):
    teacher = {"teacher": Teacher(Live())}
    velocity_targets = {"teacher": TotalDerivative(0.005)}
    same = data_module(make, Noising(1.0), teacher=teacher, velocity_targets=velocity_targets)
    matching = data_module(make, Noising(1.0), teacher={}, objective=Objective([Term(FlowMatching(), teacher=None)]))
    given = same.act("dataset", make_rows(4), [1, 2, 3, 4])
    torch.testing.assert_close(objective_of(same, given)[0], objective_of(matching, given)[0], rtol=1e-4, atol=1e-6)

    free = data_module(make, Noising(0.0), teacher=teacher, velocity_targets=velocity_targets)
    given, wanted = free.act("dataset", make_rows(4), [1, 2, 3, 4]), []
    for row, _, x, t, r in states(free, given):
        v = (x - given.actions[row, 0]) / t
        up, down = min(t + 0.005, 1), t - 0.005
        ahead = says(free, "student", row, x + (up - t) * v, up, r)
        behind = says(free, "student", row, x + (down - t) * v, down, min(r, down))
        target = v - (t - r) * (ahead - behind) / (up - down)
        wanted.append(float((says(free, "student", row, x, t, r) - target).square().mean()))
    assert float(objective_of(free, given)[0]) == pytest.approx(np.mean(wanted), rel=1e-3)


def matched(make: Any, pipeline: Any, fake_seed: int = 3, **settings: Any) -> Any:
    """Distribution matching: the fake score is another model than the teacher."""
    teachers = {
        "teacher": Teacher(Frozen(Pretrained(str(pipeline("anyflow", 2))))),
        "fake": Teacher(LearnedScore(Pretrained(str(pipeline("anyflow", fake_seed))), updates=2)),
    }
    objective = Objective([Term(VelocityMatching(), weights=[NoiseLevel(2)], coefficient=0.5)])
    settings = {
        "sampler": Renoise(),
        "velocity_targets": {"teacher": ScoreDifference()},
        "objective": objective,
    } | settings
    return make("anyflow", teacher=teachers, **settings)


def test_the_gradient_of_distribution_matching_is_the_score_difference_per_pixel(make, pipeline):
    module = matched(make, pipeline)
    rolled = on_policy(module, 3)
    loss, gradients = objective_of(module, rolled)
    student = module.policies["student"].model
    field = module.velocity_field(module.policies["student"], make_rows(3))
    total, value = torch.zeros(()), 0.0
    for row, _, x, t, _ in states(module, rolled):
        t_ = torch.tensor([t], dtype=torch.float64)
        g = x - t * field(torch.tensor([row]), x[None], t_, torch.zeros_like(t_))[0]
        draw = generator(int(rolled.observation["seed"][row]), 3)
        s = 0.02 + 0.96 * float(torch.rand((), generator=draw))
        z = (1 - s) * g.detach() + s * torch.randn(g.shape, generator=draw)
        real, fake = (z - s * says(module, name, row, z, s, s) for name in ("teacher", "fake"))
        d = (fake - real) / (g.detach() - real).abs().mean()
        total = total + (g * d / d.numel()).sum() / 3
        value += float(d.square().mean()) / 2 / 3
    wanted = torch.autograd.grad(total, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    assert float(loss) == pytest.approx(value, rel=1e-3)
    for mine, theirs in zip(gradients, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_equal_scores_give_no_gradient_and_the_fake_one_learns_the_students_samples(make, pipeline, tmp_path):
    module = matched(make, pipeline, fake_seed=2)
    loss, gradients = objective_of(module, on_policy(module))
    assert float(loss) < 1e-9
    assert all(g is None or g.abs().max() < 1e-4 for g in gradients)

    before = [p.clone() for p in module.policies["fake"].model.parameters()]
    trainer = fit(module, tmp_path, make_rows(8), steps=3)
    after = list(module.policies["fake"].model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad for p in after), "to a strategy it is frozen"
    assert trainer.global_step == 3, "only the student's updates count"
    assert "train/learned/fake" in trainer.callback_metrics
    steps = {int(s["step"]) for s in module.teachers["fake"].weights.state.optimizer.state.values()}
    assert steps == {6}, "two updates for each of the student's"


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_with_two_optimizers_resumes_bit_for_bit(make, pipeline, done, tmp_path):
    """Also between two optimizer steps of one generation batch."""

    def run(steps: int, checkpoint: Any = None) -> tuple[Any, Any]:
        rollout = Rollout(batch_size=8, micro_batch_size=2, horizon=3)
        module = matched(make, pipeline, fake_seed=3, rollout=rollout)
        module._optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
        trainer = make_trainer(tmp_path, steps=steps, accumulate_grad_batches=2)
        trainer.fit(module, datamodule=Rows(make_rows(16)), ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    _, unbroken = run(5)
    trainer, _ = run(done)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = run(5, tmp_path / "part.ckpt")
    for name, value in unbroken.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(resumed.state_dict()[name], value), name
    ours, theirs = (m.teachers["fake"].weights.state.optimizer.state_dict()["state"] for m in (unbroken, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(a[k], theirs[i][k]) for i, a in ours.items() for k in ("exp_avg", "exp_avg_sq", "step"))


def test_the_gradient_may_flow_through_the_jumps_before(make, pipeline):
    """As if the whole chain had been written down with autograd; otherwise only the last jump's."""
    found = {}
    for chained in (False, True):
        sampler = Shortcuts([4, 8], trained="last", chained=chained)
        module = matched(make, pipeline, sampler=sampler)
        rolled = on_policy(module, 3)
        found[chained] = objective_of(module, rolled)
        field = module.velocity_field(module.policies["student"], make_rows(3))
        wanted = torch.zeros(())
        last = (rolled.channels["sigma"] > 0).sum(1) - 1
        for row, k, x, t, r in states(module, rolled):
            assert k == last[row]
            moment = torch.tensor([row])
            target = module.streams.query("teacher", rolled).distribution.at(
                torch.tensor([row * rolled.mask.shape[1] + k])
            )
            d = (says(module, "student", row, x, t, r) - target.chunk(slice(None)).velocity[0]) * t
            latent = rolled.observation["start"][row][None]
            for j in range(k + 1):
                a, b = (rolled.channels[name][row, j][None] for name in ("sigma", "toward"))
                latent = latent if chained else latent.detach()
                latent = flow.euler(latent, field(moment, latent, a, b), a, b)
            wanted = wanted - (latent[0] * d / d.numel()).sum() / 3
        parameters = [p for p in module.student.parameters() if p.requires_grad]
        for mine, theirs in zip(found[chained][1], torch.autograd.grad(wanted, parameters), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(found[True][0], found[False][0])
    assert any(not torch.allclose(a, b) for a, b in zip(found[True][1], found[False][1], strict=True))


# -- D-OPSD -------------------------------------------------------------------------------------------------------


def referenced(count: int = 4) -> list[Any]:
    return [{**row, "reference": None} for row in make_rows(count)]


def test_a_reference_is_seen_by_the_teacher_alone(make):
    views = {"teacher": Teacher(EMA(0.01), view=ReferenceImage()), "blind": Teacher(EMA(0.01))}
    objective = Objective([Term(VelocityMatching(), teacher=name, name=name) for name in views])
    module = make(teacher=views, objective=objective)
    rolled = on_policy(module)
    student = module.distribution(module.policies["student"], rolled)
    index = torch.arange(rolled.mask.numel())
    with torch.no_grad():
        own = student.at(index).chunk(slice(None)).mean
        told, blind = (
            module.streams.query(name, rolled).distribution.at(index).chunk(slice(None)).mean for name in views
        )
    assert torch.equal(own, blind), "equal weights and equal views"
    assert not torch.allclose(own, told)
    other = [{**row, "image": row["image"].point(lambda x: 255 - x)} for row in make_rows(4)]
    assert module.teachers["teacher"].look({"prompt": "a", "image": None}) is None
    rolled.examples = other
    with torch.no_grad():
        again = module.streams.query("teacher", rolled).distribution.at(index).chunk(slice(None)).mean
    assert not torch.allclose(again, told), "another image, another answer"


def test_references_need_an_encoder_that_sees(make):
    module = make("flux", teacher={"teacher": Teacher(EMA(0.01), view=ReferenceImage())})
    with pytest.raises(ValueError, match="FluxPipeline sees no reference images"):
        objective_of(module, on_policy(module))


def test_an_average_with_lora_gets_no_gradient_and_resumes_with_the_student(make, tmp_path):
    module = make("stable_diffusion_3", teacher={"teacher": Teacher(EMA(0.5))}, lora=Lora(r=2, alpha=4))
    fit(module, tmp_path, make_rows(8), steps=2)
    adapters = {n: p for n, p in module.student.named_parameters() if "lora_" in n}
    assert any(".teacher." in name for name in adapters)
    assert all(p.grad is None for name, p in adapters.items() if ".teacher." in name)


# -- what the core asks -------------------------------------------------------------------------------------------


def test_gradients_do_not_depend_on_chunks_and_memory_not_on_the_number_of_steps(make, kind):
    whole = make(kind, objective=Objective([Term(VelocityMatching())], chunk_steps=100))
    pieces = make(kind, objective=Objective([Term(VelocityMatching())], chunk_steps=5))
    rolled = on_policy(whole)
    torch.testing.assert_close(objective_of(whole, rolled)[0], objective_of(pieces, rolled)[0], rtol=1e-4, atol=1e-7)
    for a, b in zip(objective_of(whole, rolled)[1], objective_of(pieces, rolled)[1], strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

    opened = []
    student = pieces.distribution(pieces.policies["student"], on_policy(pieces, horizon=9))
    made = student.make
    student.make = lambda index: opened.append(len(index)) or made(index)
    streams = pieces.streams.query_all(pieces.objective.teachers(), rolled9 := on_policy(pieces, horizon=9))
    pieces.objective(student, streams, rolled9)[0].backward()
    assert max(opened) <= 5
    assert sum(opened) == 36


def test_a_teacher_is_asked_only_where_its_term_applies(make):
    objective = Objective([Term(VelocityMatching(), source="dataset")])
    shares = Rollout(batch_size=4, horizon=2, behavior={"student": 0.5, "dataset": 0.5})
    module = make(objective=objective, rollout=shares)
    rolled = on_policy(module, 4)
    rolled.sources, rolled.source = ("student", "dataset"), torch.tensor([0, 0, 1, 0])
    stream = module.streams.query("teacher", rolled)
    teacher = stream.distribution
    asked, made = [], teacher.make
    teacher.make = lambda index: asked.extend((index // 2).tolist()) or made(index)
    student = module.distribution(module.policies["student"], rolled)
    module.objective(student, {"teacher": stream}, rolled)[0].backward()
    assert set(asked) == {2}


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signal": ReverseKL()}, "ReverseKL compares densities, which the sampler Euler has none of"),
        ({"signal": PolicyGradient(LogRatio())}, "PolicyGradient is refused here: of Gaussian transitions"),
        ({"signal": CrossEntropy()}, "CrossEntropy is refused here"),
        ({"signal": FlowMatching()}, "speaks of noised data only: set its source to dataset"),
        ({"velocity_targets": {"teacher": TotalDerivative()}}, "speaks of noised data only"),
        (
            {"velocity_targets": {"nobody": Velocity()}},
            r"model\.velocity_targets: there is no teacher 'nobody'; there are \['teacher'\]",
        ),
        ({"velocity_targets": {"teacher": ScoreDifference()}}, r"ScoreDifference asks 'fake', which is no teacher"),
        ({"rollout": Rollout(top_k=3)}, "temperature, top_p, top_k and min_p mean nothing"),
        ({"sampler": SDE(), "rollout": Rollout(batch_size=2, horizon=1)}, "the last step of an SDE is not trained"),
    ],
)
def test_what_means_nothing_is_refused_when_it_is_built(make, settings, message):
    with pytest.raises(ValueError, match=message):
        on_policy(make(**settings))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Velocity(-1), r"Velocity\.guidance must be >= 0"),
        (lambda: AverageVelocity(0), r"AverageVelocity\.substeps must be >= 1"),
        (lambda: AverageVelocity(stride=0.0), r"AverageVelocity\.stride must be > 0"),
        (lambda: ScoreDifference(low=0.9, high=0.1), "need 0 <= low < high <= 1"),
        (lambda: SDE(0), r"SDE\.noise_level must be > 0"),
        (lambda: Shortcuts([0]), r"sampler\.steps must be numbers of steps >= 1"),
        (lambda: Shortcuts(trained="some"), "must be all, middle or last"),
        (lambda: NoiseLevel(of="time"), "must be level or interval"),  # type: ignore[arg-type]
        (lambda: InverseError(-1), "power must be >= 0 and floor > 0"),
        (lambda: Noising(0.8, 0.4), "at most 1 together"),
        (lambda: LearnedScore(Pretrained("x"), updates=0), r"LearnedScore\.updates must be >= 1"),
        (lambda: LearnedScore(Pretrained("x", lora=Lora())), "it takes no quantization"),
    ],
)
def test_settings_that_mean_nothing_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_schedulers_that_are_not_flow_matching_are_refused(pipeline, make, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipeline("stable_diffusion_3"))
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"teachers\.teacher\.weights\.pretrained\.path: DDIMScheduler is no flow-m"):
        make("stable_diffusion_3", teacher=tmp_path)


def test_what_is_no_pipeline_or_an_unknown_one_is_refused(make, tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "OtherPipeline", "transformer": ["diffusers", "X"]}', encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"is a OtherPipeline; there are families for AnyFlowPipeline, "):
        load_family(str(tmp_path), {})
    with pytest.raises(ValueError, match="is no folder of a diffusers pipeline"):
        load_family(str(tmp_path / "none"), {})


def test_latents_of_another_shape_are_refused(make, pipeline):
    module = make("stable_diffusion_3", teacher=pipeline("flux"))
    module.policies["teacher"].processor.size = (32, 32)
    with pytest.raises(ValueError, match=r"model\.teachers\.teacher has latents of shape \(4, 16, 16\), the student"):
        module.audit_rows()


def test_latents_that_are_not_finite_name_their_prompt(make):
    module = make("stable_diffusion_3")
    with torch.no_grad():
        module.student.proj_out.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="latents are not finite, first for the prompt 'a red square'"):
        on_policy(module)


def test_a_prompt_beyond_the_limit_and_an_image_that_is_none_are_refused_with_their_reason(make):
    module = make()
    assert module.refusal({"prompt": " ".join(["big"] * 20)}) == (
        "the prompt has 21 tokens, model.max_sequence_length is 16"
    )
    assert "image can't be read" in module.refusal({"prompt": "a", "image": "/nowhere.png"})
    assert "image can't be read" in module.refusal({"prompt": "a", "image": {"bytes": b"broken", "path": None}})
    assert "no text" in module.refusal({"prompt": [{"role": "user", "content": "x"}]})
    assert module.refusal(make_rows(1)[0]) is None


def test_a_reference_that_is_no_image_is_refused_whatever_its_column_is_called(make, pipeline):
    told = Teacher(Frozen(Pretrained(str(pipeline("anyflow")))), view=ReferenceImage(column="sketch"))
    module = make(teacher={"teacher": told})
    assert "reference can't be read: there is no image" in module.refusal({"prompt": "a", "sketch": "/nowhere.png"})


def test_schedules_that_stand_still_are_refused(make):
    module = make("stable_diffusion_3")
    module.family.levels = lambda steps: torch.tensor([1.0, 0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"the schedule of 3 steps is \[1\.0, 0\.5, 0\.5, 0\.0\]; it must fall"):
        on_policy(module)


# -- exactness ----------------------------------------------------------------------------------------------------


def replayed(module: Any, rolled: Any) -> torch.Tensor:
    """``[n, ...]`` where the student's steps lead as they are trained: with gradient, in training mode."""
    module.student.train()
    index = rolled.mask.flatten().nonzero().squeeze(-1)
    with torch.enable_grad():
        said = module.distribution(module.policies["student"], rolled).at(index)
        return said.chunk(slice(0, len(index))).mean.detach()


def test_a_rollout_and_its_replay_agree_alone_and_together(make, kind):
    """Prompts of mixed length, and a row of them beside any others."""
    module = make(kind)
    rolled = on_policy(module, 5)
    wanted = rolled.actions.flatten(0, 1)[rolled.mask.flatten()]
    torch.testing.assert_close(replayed(module, rolled), wanted, rtol=1e-4, atol=1e-5)
    alone = torch.cat([replayed(module, rolled.select(torch.tensor([row]))) for row in range(5)])
    torch.testing.assert_close(alone, wanted, rtol=1e-4, atol=1e-5)


def test_noised_images_beside_rollouts_resume_bit_for_bit_after_every_kill(make, pipeline, tmp_path):
    """AnyFlow's form: a learned score, and images of the dataset that another run has not seen yet."""

    def run(steps: int, checkpoint: Any = None) -> tuple[Any, Any]:
        rollout = Rollout(batch_size=8, micro_batch_size=4, horizon=3, behavior={"student": 0.5, "dataset": 0.5})
        terms = [
            Term(VelocityMatching(), source="student", weights=[NoiseLevel()]),
            Term(FlowMatching(), teacher=None, source="dataset"),
        ]
        module = matched(make, pipeline, fake_seed=3, rollout=rollout, objective=Objective(terms))
        module._optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
        trainer = make_trainer(tmp_path, steps=steps)
        trainer.fit(module, datamodule=Rows(make_rows(24)), ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    _, unbroken = run(6)
    checkpoint = None
    for steps in (1, 3, 4):
        trainer, _ = run(steps, checkpoint)
        checkpoint = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(checkpoint)
    _, resumed = run(6, checkpoint)
    for name, value in unbroken.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(resumed.state_dict()[name], value), name
    ours, theirs = (m.teachers["fake"].weights.state.optimizer.state_dict()["state"] for m in (unbroken, resumed))
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(a[k], theirs[i][k]) for i, a in ours.items() for k in ("exp_avg", "exp_avg_sq", "step"))


class Pixels(Reward):
    """Says an image's every bit."""

    def __call__(self, completion: Any, example: Any) -> float:
        return float(np.asarray(completion).astype(np.float64).sum())


def test_a_reward_judges_an_image_that_does_not_depend_on_its_neighbors(make):
    module = make("stable_diffusion_3", reward=Pixels())
    rolled = on_policy(module, 5)
    decoded = []
    module.family._to_images = lambda latents, of=module.family._to_images: decoded.append(len(latents)) or of(latents)
    together = module.rewards(rolled)[0]
    assert together == [module.rewards(rolled.select(torch.tensor([row])))[0][0] for row in range(5)]
    assert set(decoded) == {1}
    assert module.rewards(rolled.select(torch.tensor([], dtype=torch.long))) == ([], [])


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """Eight good images and what is given, as Parquet keeps them."""

    def write(*files: bytes) -> str:
        good = [encoded(row["image"]) for row in make_rows(8)]
        images = [{"bytes": file, "path": None} for file in (*good, *files)]
        rows = datasets.Dataset.from_dict({"prompt": ["a red dot"] * len(images), "image": images})
        rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "rows.parquet"))
        return str(tmp_path / "rows.parquet")

    return write


@pytest.mark.parametrize("file", [b"broken", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"])
def test_a_broken_image_of_a_file_is_a_bad_row(file, stored, make, tmp_path):
    def prepared(**settings):
        data, module = PromptData(stored(file), **settings), make()
        module.trainer = data.trainer = make_trainer(tmp_path)
        data.trainer.strategy._lightning_module = module
        data.setup("fit")
        return module, data.train

    with pytest.raises(ValueError, match=r"rows\.parquet, row 9: image can't be read: this is no image of a known"):
        prepared()
    with pytest.warns(UserWarning, match="1 rows are skipped: 1 × image can't be read"):
        module, train = prepared(on_bad_row="skip")
    assert len(train) == 8
    assert module.act("dataset", [dict(row) for row in train], list(range(8))).actions.shape[0] == 8


def test_images_are_read_as_in_every_setting(make):
    family = make().family
    note, clear = Image.Exif(), Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    note[0x0112] = 6
    photo = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    turned = {"bytes": encoded(photo, exif=note), "path": None}
    expected = [photo.transpose(Image.Transpose.ROTATE_270), Image.new("RGB", (16, 16), "white")]
    assert torch.equal(family.latents([turned, clear]), family.latents(expected))
    assert torch.equal(family.pixels([turned, clear]), family.pixels(expected))


def test_two_palettes_are_two_images(make):
    red, blue = (Image.new("P", (16, 16)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    one, other = make().family.latents([red, blue])
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", sorted(PIPELINES))
def test_latents_of_an_image_do_not_depend_on_its_neighbors(make, kind):
    family, images = make(kind).family, [row["image"] for row in make_rows(16)]
    together = family.latents(images)
    alone = []
    for image in images:
        family._known.clear()  # as in a run that goes on from a checkpoint
        alone.append(family.latents([image]))
    assert torch.equal(together, torch.cat(alone))


# -- caches -------------------------------------------------------------------------------------------------------


def test_what_was_encoded_is_kept_on_disk_by_content(make, tmp_path):
    one, two = make(cache=str(tmp_path)), make(cache=str(tmp_path))
    rows = make_rows(3)
    made = one.family.conditions([r["prompt"] for r in rows], [None] * 3)
    latents = one.family.latents([r["image"] for r in rows])
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    assert not list(tmp_path.glob("*.part"))
    two.family._encode = two.family._to_latents = None  # nothing is encoded again
    again = two.family.conditions([r["prompt"] for r in rows], [None] * 3)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(made, again, strict=True) for name in a)
    assert torch.equal(two.family.latents([r["image"] for r in rows]), latents)


def test_a_prompt_is_encoded_once_and_a_reference_once_for_each_prompt(make):
    family, count = make().family, Counter()
    encode, refer = family._encode, family._refer
    family._encode = lambda prompt: (count.update([prompt]), encode(prompt))[1]
    family._refer = lambda prompt, image: (count.update([f"{prompt} + image"]), refer(prompt, image))[1]
    first, second = (row["image"] for row in make_rows(2))
    found = family.conditions(["a", "b", "a", "a", "a"], [first, None, None, second, first])
    assert count == {"a": 1, "b": 1, "a + image": 2}
    assert ["encoder_hidden_states_image" in condition for condition in found] == [True, False, False, True, True]
    assert torch.equal(found[0]["encoder_hidden_states_image"], found[4]["encoder_hidden_states_image"])
    assert not torch.equal(found[0]["encoder_hidden_states_image"], found[3]["encoder_hidden_states_image"])


def test_same_step_is_the_default_answer(make):
    assert isinstance(make().velocity_target("teacher"), StepVelocity)


# -- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_implementation": "sdpa"}, "attn_implementation means nothing to a transformer of diffusers"),
        ({"trust_remote_code": True}, "trust_remote_code means nothing"),
        ({"random_init": True}, "random_init: the transformer of .* must come with weights"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        Pretrained(str(pipeline("flux")), **settings).load(Transformer, trained=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_without_a_gpu_quantization_is_refused_with_its_reason(pipeline):
    path = str(pipeline("stable_diffusion_3", 2, 32))
    with pytest.raises(RuntimeError, match="diffusers quantizes on GPUs only; leave quantization out"):
        Pretrained(path, quantization="4bit").load(Transformer, trained=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers quantizes on GPUs only")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_teacher_answers_nearly_the_same(make, pipeline, bits):
    path = str(pipeline("stable_diffusion_3", 2, 32))
    plain = make("stable_diffusion_3", teacher={"teacher": Teacher(Frozen(Pretrained(path)))})
    small = make(
        "stable_diffusion_3",
        teacher={"teacher": Teacher(Frozen(Pretrained(path, dtype="float32", quantization=bits)))},
    )
    row, _, x, t, _ = states(plain, on_policy(plain))[0]
    ours, theirs = (says(module, "teacher", row, x, t, t) for module in (plain, small))
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() < 0.4 * ours.norm()


@pytest.mark.parametrize("sampler", [Shortcuts([1, 2]), SDE()])
def test_network_evaluations_of_rollouts_made_ahead_are_counted(make, sampler, tmp_path, monkeypatch):
    """At the generation batch that is trained, whenever the worker's thread made it: as many as without a worker."""
    counts = {}
    for staleness in (0, 1, 2):
        rollout = Rollout(batch_size=4, horizon=2, max_staleness=staleness)
        module = make("stable_diffusion_3", sampler=sampler, rollout=rollout)
        recorded: list[tuple[str, Any]] = []
        monkeypatch.setattr(module, "record", lambda *what, recorded=recorded: recorded.append(what))
        fit(module, tmp_path, make_rows(8), steps=4)
        counts[staleness] = [value for name, value in recorded if name == "network_evaluations"]
    assert counts[0] == counts[1] == counts[2]
    assert len(counts[0]) == 4
    assert min(counts[0]) > 0
