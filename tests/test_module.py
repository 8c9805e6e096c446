"""OnPolicyDistillation: what is refused when it is built, and what an optimizer step does."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.objective import (
    ByReward,
    CrossEntropy,
    Entropy,
    GroupRelative,
    LogLinear,
    LogRatio,
    Objective,
    PolicyGradient,
    ReverseKL,
    Term,
    Window,
)
from opd_lightning.optimization import LRSchedule, default_optimizer, in_place
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Teacher
from tests.tiny import (
    LongerIsBetter,
    Rows,
    attach,
    fit,
    make_module,
    make_trainer,
    no_teacher,
    sgd,
    teacher_forced,
    watch_queries,
)


def build(**settings):
    return make_module("nowhere", load=False, **settings)


# -- construction -------------------------------------------------------------------------------------------------

LIVE = {"teacher": Teacher(Live())}
MIXED = Rollout(behavior={"student": 0.5, "dataset": 0.5})
REFUSED = {
    "no teacher": (
        {"objective": Objective([Term(ReverseKL(), "expert")]), "teacher": LIVE},
        r"terms\[0\] \(ReverseKL\): no teacher 'expert' in model\.teachers, which has \['teacher'\]",
    ),
    "teacher unnamed": (
        {"objective": Objective([Term(ReverseKL(), teacher=None)])},
        r"ReverseKL needs a teacher; name an entry of model\.teachers",
    ),
    "unknown behavior": (
        {"teacher": LIVE, "rollout": Rollout(behavior={"expert": 1.0})},
        r"rollout\.behavior names 'expert', which is no entry of model\.teachers: \['teacher'\]",
    ),
    "unread target": (
        {"objective": Objective([Term(CrossEntropy(), None, target=LogLinear({"teacher": 1.0}))])},
        r"\.target: CrossEntropy compares with no teacher, so nothing reads the target",
    ),
}
UNSERVED = {
    "idle teacher": (
        {"teacher": {**LIVE, "other": Teacher(Live())}},
        r"model\.teachers: nobody asks \['other'\]; name them in a term or remove them",
    ),
    "no reward": (
        {"teacher": LIVE, "objective": Objective([Term(ReverseKL(), weights=[ByReward()])])},
        r"ByReward needs 'reward': set model\.reward",
    ),
    "no group": (
        {"reward": LongerIsBetter(), "objective": Objective([Term(PolicyGradient(GroupRelative()), teacher=None)])},
        r"PolicyGradient needs 'group': set rollout\.group_size > 1",
    ),
    "no behavior log-probs": (
        {"teacher": LIVE, "rollout": MIXED, "objective": Objective([Term(PolicyGradient(LogRatio()))])},
        r"needs 'behavior': dataset completions have no behavior log-probs: give the term `source: student`",
    ),
    "unknown source": (
        {"teacher": LIVE, "objective": Objective([Term(ReverseKL(), source="dataset")])},
        r"\.source: nobody called 'dataset' acts; rollout\.behavior: \['student'\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_when_built(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize("name", UNSERVED)
def test_what_nobody_serves_is_refused_when_callbacks_are_known_and_before_anything_is_loaded(name, tmp_path):
    settings, message = UNSERVED[name]
    with pytest.raises(ValueError, match=message):
        fit(build(**settings), tmp_path)


def test_what_can_be_served_is_built(tmp_path):
    acts = build(teacher=LIVE, rollout=Rollout(behavior={"teacher": 1.0}), objective=no_teacher())
    mixes = build(
        teacher=LIVE,
        rollout=MIXED,
        objective=Objective(
            [Term(PolicyGradient(LogRatio()), source="student"), Term(CrossEntropy(), source="dataset")]
        ),
    )
    for module in (acts, mixes):
        attach(module, tmp_path).check()


def test_a_falling_schedule_needs_an_end(tiny_student, tmp_path):
    module = make_module(tiny_student, {}, no_teacher(), schedule=LRSchedule("cosine"))
    with pytest.raises(ValueError, match=r"model\.schedule\.name=cosine needs trainer\.max_steps"):
        fit(module, tmp_path, steps=-1)


def test_a_generation_batch_that_cannot_be_cut_is_refused_before_training(tiny_student, tmp_path):
    module = make_module(tiny_student, {}, no_teacher(), rollout=Rollout(batch_size=6, micro_batch_size=3))
    with pytest.raises(ValueError, match=r"a generation batch of 6 trajectories .* steps of 3 × 4"):
        fit(module, tmp_path, accumulate_grad_batches=4)


# -- an optimizer step --------------------------------------------------------------------------------------------


def test_a_parameter_without_gradient_stops_the_run_and_is_named(world, tmp_path):
    """Rule 18."""
    module = world.module()
    module.student.model.idle = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"2 trainable parameters got no gradient, among them model\.idle\.weight"):
        world.fit(module, tmp_path)


@pytest.mark.parametrize(("lora", "normalizer"), [(None, "steps"), (Lora(r=2), "weights")], ids=["full", "lora"])
def test_a_step_with_nothing_to_train_is_a_counted_zero(every_world, lora, normalizer, tmp_path):
    """Rule 17: it touches every trained parameter, and moves none."""
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(every_world.teacher))), where={"task": "nowhere"})}
    objective = Objective([Term(ReverseKL(), normalizer=normalizer)])
    module = every_world.module(teachers, objective, lora=lora)
    before = [p.detach().clone() for p in module.student.parameters()]
    trainer = every_world.fit(module, tmp_path, steps=2, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True))
    assert trainer.callback_metrics["train/empty_micro_batches"] == 1


def test_gradients_are_gone_after_the_optimizer_step(world, tmp_path):
    """They would be in memory during the next rollout and objective."""
    module = world.module()
    world.fit(module, tmp_path)
    assert all(p.grad is None for p in module.student.parameters())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_update_in_place_is_the_update(kind):
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    plain, changed = (kind([weight], lr=0.1, weight_decay=0.01) for weight in weights)
    in_place(changed)
    for gradient in gradients:
        for weight, optimizer in zip(weights, (plain, changed), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(weights[0], weights[1], rtol=1e-5, atol=1e-6)
    assert changed.param_groups[0]["fused"]


def test_a_choice_of_the_optimizers_implementation_is_kept():
    weight = torch.nn.Parameter(torch.zeros(2))
    chosen = [torch.optim.AdamW([weight], foreach=True), torch.optim.AdamW([weight], fused=False)]
    assert not any(in_place(optimizer).param_groups[0]["fused"] for optimizer in chosen)
    in_place(torch.optim.SGD([weight]))


def test_the_default_optimizer_is_clipped_in_mixed_precision(world, tmp_path):
    module = world.module(optimizer=default_optimizer)
    world.fit(module, tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert module.optimizers().param_groups[0]["fused"]


def test_part_of_a_step_may_have_nothing_to_train(every_world, tmp_path):
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(every_world.teacher))), where={"task": "even"})}
    module = every_world.module(teachers, rollout=Rollout(batch_size=8, micro_batch_size=1, horizon=4))
    trainer = every_world.fit(module, tmp_path, accumulate_grad_batches=8)
    assert 0 < trainer.callback_metrics["train/empty_micro_batches"] < 1


def test_completions_beyond_the_window_are_not_trained(every_world, tmp_path):
    """Every row masked by a weight: the window begins behind the horizon."""
    objective = Objective([Term(ReverseKL(), weights=[Window(start=50)], normalizer="weights")])
    module = every_world.module(every_world.teacher, objective)
    before = [p.detach().clone() for p in module.student.parameters()]
    every_world.fit(module, tmp_path, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True))


def test_distillation_lowers_the_divergence(any_world, tmp_path):
    losses = []

    class Watching(any_world.setting):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            losses.append(float(self.trainer.callback_metrics["train/loss/ReverseKL"]))

    module = any_world.module(
        setting=Watching,
        rollout=Rollout(batch_size=24, horizon=8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    any_world.fit(module, tmp_path, steps=15)
    assert losses[-1] < 0.7 * losses[0]


LOGGED = [
    "train/loss/ReverseKL",
    "train/teacher/kl_student_teacher",
    "train/teacher/kl_teacher_student",
    "train/teacher/kl_first_step",
    "train/teacher/entropy",
    "train/teacher/overlap_top16",
    "train/teacher/overlap_mass",
    "train/teacher/privileged_gap",
    "train/student_entropy",
    "train/length",
    "train/stopped",
    "train/reward",
    "train/staleness",
    "train/clipped/ReverseKL/Window",
    "time/rollout_share",
    "time/teacher_share",
    "time/student_share",
    "time/backward_share",
    "time/update_share",
    "time/step_s",
    "train/lr",
    "train/gradient_norm",
    "train/tokens_so_far",
    "speed/rollout_steps_per_s",
    "speed/teacher_steps_per_s",
    "speed/student_steps_per_s",
    "steps/rollout",
    "steps/teacher",
    "steps/student",
    "work/padding_share",
]


def test_what_is_logged_at_each_step(world, tmp_path):
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(world.teacher))), world.view)}
    objective = Objective([Term(ReverseKL(), weights=[Window(stop=5)])])
    module = world.module(teachers, objective, reward=LongerIsBetter())
    trainer = world.fit(module, tmp_path, steps=2)
    missing = [name for name in LOGGED if name not in trainer.callback_metrics]
    assert not missing
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())


@pytest.mark.parametrize("made", ["initial", "ema", "live"])
def test_self_distillation_starts_at_no_distance(every_world, made, tmp_path):
    weights = {"initial": Initial(), "ema": EMA(), "live": Live()}[made]
    module = every_world.module({"teacher": Teacher(weights)}, optimizer=sgd(1.0))
    trainer = every_world.fit(module, tmp_path)
    assert float(trainer.callback_metrics["train/loss/ReverseKL"]) == 0


def test_a_teacher_that_is_off_is_not_asked(world, tmp_path, monkeypatch):
    """A coefficient of 0 skips its forward pass."""
    objective = Objective([Term(ReverseKL(), coefficient=0.0), Term(CrossEntropy(), teacher=None)])
    module = world.module(world.teacher, objective)
    monkeypatch.setattr(module.streams, "query", lambda *_: pytest.fail("asked"))
    world.fit(module, tmp_path)


# -- answers that are read again ------------------------------------------------------------------------------------


def trained(world, folder, weights, monkeypatch, objective=None, anew=False, turn=None, **rollout):
    """Weights after 6 optimizer steps of 2 micro-batches, all losses, and how often the teacher was asked.

    Args:
        monkeypatch: sees the teacher asked.
        anew: nothing is kept.
        turn: called with the teacher after the third optimizer step.
    """
    losses, asked = [], []

    class Watching(world.setting):
        def on_train_start(self):
            super().on_train_start()
            asked.clear()  # by the comparison before the first step

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss))
            return loss

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            if turn is not None and len(losses) == 6:
                turn(self.teachers["teacher"])

    module = world.module(
        {"teacher": Teacher(weights, world.view)},
        objective,
        setting=Watching,
        rollout=Rollout(batch_size=8, micro_batch_size=2, horizon=6, **rollout),
    )
    query_all = module.streams.query_all
    with monkeypatch.context() as patch:
        watch_queries(patch, lambda name, _: asked.append(name))
        if anew:
            patch.setattr(module.streams, "query_all", lambda names, batch, *_: query_all(names, batch))
        world.fit(module, folder, steps=6, accumulate_grad_batches=2, log_every_n_steps=100)
    return [p.detach().clone() for p in module.student.parameters()], losses, len(asked)


def same_run(one, other) -> None:
    assert one[1] == other[1]
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


@pytest.mark.parametrize(("made", "times"), [("frozen", 4), ("initial", 4), ("ema", 12), ("live", 12)])
def test_a_teacher_that_stands_still_is_asked_once_in_all_epochs(make_world, made, times, tmp_path, monkeypatch):
    world = make_world("text")

    def weights():
        still = {"frozen": Frozen(Pretrained(str(world.teacher))), "initial": Initial()}
        return {**still, "ema": EMA(), "live": Live()}[made]

    found = trained(world, tmp_path, weights(), monkeypatch, epochs=3)
    assert found[2] == times
    same_run(found, trained(world, tmp_path, weights(), monkeypatch, anew=True, epochs=3))
    assert len(set(found[1])) == 12, "the student moves on"


def test_a_teacher_whose_view_has_changed_is_asked_again(make_world, tmp_path, monkeypatch):
    world = make_world("text")

    def blind(teacher):
        teacher.view = None

    def run(**how):
        return trained(world, tmp_path, Frozen(Pretrained(str(world.teacher))), monkeypatch, epochs=3, **how)

    found = run(turn=blind)
    assert 4 < found[2] < 12
    same_run(found, run(turn=blind, anew=True))
    assert found[1] != run()[1]


@pytest.mark.parametrize("made", ["frozen", "live"])
def test_a_normalizer_that_reads_distributions_asks_a_teacher_once(make_world, made, tmp_path, monkeypatch):
    world = make_world("text")

    def run(**how):
        weights = Live() if made == "live" else Frozen(Pretrained(str(world.teacher)))
        objective = Objective([Term(ReverseKL(), weights=[Entropy("teacher")], normalizer="weights")])
        return trained(world, tmp_path, weights, monkeypatch, objective, **how)

    found, anew = run(), run(anew=True)
    assert (found[2], anew[2]) == (12, 24)
    same_run(found, anew)


def test_a_checkpoint_of_another_student_is_refused(every_world, tmp_path):
    trainer = every_world.fit(every_world.module(), tmp_path)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    checkpoint = torch.load(tmp_path / "full.ckpt", weights_only=True)
    other = every_world.module(lora=Lora(r=2))
    with pytest.raises(ValueError, match=r"model\.student\.lora was not set in the checkpoint and is now set: keep"):
        other.on_load_checkpoint(checkpoint)


def test_an_adapters_checkpoint_holds_no_base(every_world, tmp_path):
    trainer = every_world.fit(every_world.module(lora=Lora(r=2)), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert names
    assert all("lora_" in name for name in names)


def test_models_are_loaded_once(every_world):
    module = every_world.module()
    policies = dict(module.policies)
    module.configure_model()
    assert module.policies == policies


def test_sources_route_terms(world, tmp_path):
    """Reverse KL on the student's rollouts, cross entropy on the dataset's completions."""
    objective = Objective([Term(ReverseKL(), source="student"), Term(CrossEntropy(), None, source="dataset")])
    rollout = Rollout(batch_size=24, horizon=6, behavior={"student": 0.5, "dataset": 0.5})
    seen = []

    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            seen.append(batch.trajectories)
            return super().training_step(batch, batch_idx)

    module = world.module(world.teacher, objective, setting=Watching, rollout=rollout)
    trainer = world.fit(module, tmp_path, world.make_rows(24))
    (batch,) = seen
    assert 0 < float(batch.source.float().mean()) < 1
    fresh = world.module()
    dataset = batch.select((batch.source == 1).nonzero().flatten())
    wanted = -float(teacher_forced(fresh, "student", dataset).sum() / dataset.mask.sum())
    assert float(trainer.callback_metrics["train/loss/CrossEntropy"]) == pytest.approx(wanted, rel=1e-4)


# -- parts of the objective that learn --------------------------------------------------------------------------------


class Scaled(ReverseKL, torch.nn.Module):
    """A divergence times a number that is learned with the student."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def __call__(self, steps):
        return super().__call__(steps) * self.scale


def test_parameters_of_a_part_are_trained_kept_and_resumed(world, tmp_path):
    def run(folder, steps, checkpoint=None):
        module, trainer = world.module(objective=Objective([Term(Scaled())])), make_trainer(folder, steps=steps)
        trainer.fit(module, datamodule=Rows(world.make_rows(24), ()), ckpt_path=checkpoint, weights_only=True)
        return module, trainer

    module, _ = run(tmp_path / "whole", 4)
    assert float(module.objective.terms[0].signal.scale) != 1
    assert "parts.Scaled_Scaled.scale" in module.state_dict()
    _, trainer = run(tmp_path / "half", 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again, _ = run(tmp_path / "again", 4, tmp_path / "half.ckpt")
    for name, weight in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
