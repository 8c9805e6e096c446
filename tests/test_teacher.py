"""Teachers: weights × view."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.autoregressive.models import bare
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.policy import View, evaluating
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Same, Teacher
from tests.tiny import act, fit, log_softmax, make_module, make_rows, sgd

VIEW = PromptView("{{ solution }}?{{ prompt }}")


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def self_taught(path, made, lora=None, **settings):
    """A student with one teacher made of itself; a view, so that there is something to learn."""
    return make_module(
        Pretrained(str(path), lora=lora), {"teacher": Teacher(made, VIEW)}, optimizer=sgd(1.0), **settings
    )


@pytest.mark.parametrize("name", ["student", "dataset", "default", "a.b", "", "a b", "keys", "forward", "a/b"])
def test_names_that_mean_something_else_are_refused(tiny_student, name):
    term = Term(ReverseKL(), teacher=name)
    with pytest.raises(ValueError, match=r"model\.teachers: "):
        make_module(tiny_student, {name: Teacher(Live())}, objective=Objective([term]), load=False)


class Changing(View):
    """Changes the row that it is given, its lists too."""

    columns = ("solution", "notes")

    def __call__(self, example):
        example["notes"].append(example["solution"])
        example["prompt"] = f"{'1' * len(example['notes'])}{example['prompt']}"
        return example


class ChangingReward:
    columns = ("answer",)

    def __call__(self, completion, example):
        example["notes"].append(completion)
        example["prompt"] = f"9{example['prompt']}"
        return 1.0


def test_views_and_rewards_change_copies_of_rows(student, teacher):
    """Whoever reads a row after them reads what is in the data."""
    frozen = Frozen(Pretrained(str(teacher)))
    module = make_module(student, {"teacher": Teacher(frozen, Changing())}, reward=ChangingReward())
    rows = [{**row, "notes": []} for row in make_rows()]
    for example in (rows[1], *act(module, rows[:4]).examples):
        module.reward_of("2", example)
        assert module.teachers["teacher"].look(example)["prompt"] == f"1{example['prompt']}"
        assert module.teachers["teacher"].look(example)["prompt"] == f"1{example['prompt']}"
        assert example["notes"] == []


# -- frozen -------------------------------------------------------------------------------------------------------


def test_a_frozen_teacher_is_nowhere_but_asked(student, teacher, tmp_path):
    module = make_module(student, {"teacher": Teacher(Frozen(Pretrained(str(teacher), dtype="bfloat16")))})
    theirs = module.policies["teacher"].model
    before = weights(theirs)
    trainer = fit(module, tmp_path, steps=2)
    assert equal(before, weights(theirs))
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}
    assert not theirs.training
    assert module.student.training
    mine = {id(parameter) for parameter in theirs.parameters()}
    assert not mine & {id(parameter) for parameter in module.parameters()}
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not mine & optimized
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"student"}


def test_a_frozen_teacher_gets_no_gradient_and_no_graph(student, teacher):
    module = make_module(student, teacher)
    said = module.streams.query("teacher", act(module, make_rows(4))).distribution
    assert not said.hidden.requires_grad


# -- initial ------------------------------------------------------------------------------------------------------


def test_initial_with_lora_is_the_base_bit_for_bit(student, tmp_path):
    untouched = make_module(student, {"teacher": Teacher(Live())})
    module = self_taught(student, Initial(), Lora(r=4))
    rolled = act(module, make_rows(8))
    fit(module, tmp_path, steps=3)
    expected = log_softmax(untouched, "student", rolled)
    assert torch.equal(log_softmax(module, "teacher", rolled), expected)
    assert (log_softmax(module, "student", rolled) - expected).abs().max() > 1e-3
    assert len(module.policies) == 2
    assert module.policies["teacher"].model is module.student, "at no memory"


def test_initial_without_lora_is_a_copy_that_stays(student, tmp_path):
    module = self_taught(student, Initial())
    before = weights(module.student)
    fit(module, tmp_path, steps=2)
    assert equal(before, weights(module.policies["teacher"].model))
    assert not equal(before, weights(module.student))
    assert not any(p.requires_grad for p in module.policies["teacher"].model.parameters())


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, tiny_student):
    """A saved adapter that does something."""
    module = make_module(Pretrained(str(tiny_student), lora=Lora(r=2)), {"teacher": Teacher(Live())})
    for name, parameter in module.student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    module.student.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("made", [Initial(), EMA(0.0)], ids=["initial", "ema"])
def test_the_student_before_training_includes_the_adapter_it_started_from(tiny_student, adapter, made, tmp_path):
    module = self_taught(tiny_student, made, Lora(adapter=str(adapter)))
    rolled = act(module, make_rows(8))
    start = log_softmax(module, "student", rolled)
    with torch.no_grad(), module.student.disable_adapter():
        base = log_softmax(module, "student", rolled)
    assert (start - base).abs().max() > 0.1
    assert (log_softmax(module, "teacher", rolled) - start).abs().max() < 1e-4
    assert sum(p.requires_grad for p in module.student.parameters()) > 0
    fit(module, tmp_path, steps=2)
    assert (log_softmax(module, "teacher", rolled) - start).abs().max() < 1e-4
    assert (log_softmax(module, "student", rolled) - start).abs().max() > 1e-3


# -- live and EMA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_live_is_the_student_now_and_gets_no_gradient(student, lora, tmp_path):
    module = self_taught(student, Live(), lora)
    fit(module, tmp_path, steps=2)
    rolled = act(module, make_rows(4))
    assert torch.equal(log_softmax(module, "teacher", rolled), log_softmax(module, "student", rolled))
    said = module.streams.query("teacher", rolled).distribution
    assert not said.hidden.requires_grad


class Recorder(EMA):
    """Keeps the student's weights at every update."""

    def update(self, step: int) -> None:
        self.seen = [*getattr(self, "seen", []), (step, weights(self._student))]
        super().update(step)


def test_ema_moves_towards_the_student_by_the_rate(student, tmp_path):
    """teacher ← (1−rate)·teacher + rate·student after every optimizer step (rule 11)."""
    made = Recorder(0.3)
    module = self_taught(student, made, rollout=Rollout(batch_size=8, horizon=6, micro_batch_size=4))
    expected = weights(module.student)
    fit(module, tmp_path, steps=4, accumulate_grad_batches=2)
    assert [step for step, _ in made.seen] == [1, 2, 3, 4]
    for _, theirs in made.seen:
        expected = [0.7 * mine + 0.3 * other for mine, other in zip(expected, theirs, strict=True)]
    for mine, wanted in zip(weights(module.policies["teacher"].model), expected, strict=True):
        assert torch.allclose(mine, wanted, atol=1e-6)
    assert equal(made.seen[-1][1], weights(module.student)), "the last update saw the last step"


def test_ema_every(student, tmp_path):
    made = Recorder(1.0, every=3)
    module = self_taught(student, made)
    fit(module, tmp_path, steps=5)
    assert equal(weights(module.policies["teacher"].model), made.seen[2][1])


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_ema_at_rate_zero_never_moves_and_at_one_is_live(student, lora, tmp_path):
    still, live = self_taught(student, EMA(0.0), lora), self_taught(student, EMA(1.0), lora)
    rolled = act(still, make_rows(8))
    before = log_softmax(still, "teacher", rolled)
    for module, name in ((still, "still"), (live, "live")):
        fit(module, tmp_path / name, steps=3)
    assert torch.equal(log_softmax(still, "teacher", rolled), before)
    assert (log_softmax(still, "student", rolled) - before).abs().max() > 0.1
    difference = log_softmax(live, "teacher", rolled) - log_softmax(live, "student", rolled)
    assert difference.abs().max() < (1e-4 if lora else 1e-9)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_ema_is_in_the_checkpoint_and_comes_back(student, lora, tmp_path):
    module = self_taught(student, EMA(0.5), lora)
    trainer = fit(module, tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = self_taught(student, EMA(0.5), lora)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    other.load_state_dict(state, strict=False)
    rolled = act(module, make_rows(8))
    assert torch.equal(log_softmax(other, "teacher", rolled), log_softmax(module, "teacher", rolled))
    assert not any("base_layer" in name for name in state)


def test_two_averages_over_one_adapter(student, tmp_path):
    teachers = {"fast": Teacher(EMA(1.0), VIEW), "slow": Teacher(EMA(0.1))}
    objective = Objective([Term(ReverseKL(), "fast"), Term(ReverseKL(), "slow")])
    module = make_module(Pretrained(str(student), lora=Lora(r=2)), teachers, objective, optimizer=sgd(1.0))
    fit(module, tmp_path, steps=3)
    rolled = act(module, make_rows(4))
    now, fast, slow = (log_softmax(module, name, rolled) for name in ("student", "fast", "slow"))
    assert (slow - now).abs().max() > 1e-3
    # an average of rate 1 is the student but for rounding, which differs between processors
    assert (fast - now).abs().mean() < 1e-5
    assert (fast - now).abs().max() < (slow - now).abs().max() / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.5,), r"EMA\.rate .* must be in \[0, 1\], got 1\.5"), ((0.1, 0), r"EMA\.every must be >= 1, got 0")],
)
def test_ema_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMA(*arguments)


# -- routing ------------------------------------------------------------------------------------------------------


def test_teachers_are_routed_by_a_column(saved, tiny_student, tiny_teacher):
    """Two terms, each for its own rows: the loss is the mean over all steps of whichever teacher is asked there."""
    third = saved(seed=3)
    teachers = {
        "even": Teacher(Frozen(Pretrained(str(tiny_teacher))), where={"task": "even"}),
        "odd": Teacher(Frozen(Pretrained(str(third))), where={"task": "odd"}),
    }
    objective = Objective([Term(ReverseKL(), "even", name="even"), Term(ReverseKL(), "odd", name="odd")])
    module = make_module(tiny_student, teachers, objective)
    rolled = act(module, make_rows(8))
    streams = module.streams.query_all(module.objective.teachers(), rolled)
    assert streams["even"].available.tolist() == [True, False] * 4
    assert streams["odd"].available.tolist() == [False, True] * 4
    with torch.no_grad():
        loss, averages = objective(module.distribution(module.policies["student"], rolled), streams, rolled)
    p = log_softmax(module, "student", rolled)
    kl = {}
    for name in teachers:
        q = log_softmax(module, name, rolled)
        kl[name] = (p.exp() * (p - q)).sum(-1) * rolled.mask
    chosen = torch.where(streams["even"].available[:, None], kl["even"], kl["odd"])
    assert float(loss) == pytest.approx(float(chosen.sum() / rolled.mask.sum()), rel=1e-5)
    even = rolled.mask & streams["even"].available[:, None]
    assert averages.compute()["loss/even"] == pytest.approx(float(kl["even"][even].mean()), rel=1e-5)


def test_elsewhere_a_routed_teacher_contributes_nothing(tiny_student, tiny_teacher):
    teacher = Teacher(Frozen(Pretrained(str(tiny_teacher))), where={"task": "nowhere"})
    module = make_module(tiny_student, {"teacher": teacher})
    rolled = act(module, make_rows(4))
    streams = module.streams.query_all(module.objective.teachers(), rolled)
    loss, _ = module.objective(module.distribution(module.policies["student"], rolled), streams, rolled)
    loss.backward()
    assert float(loss) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in module.student.parameters())


def test_an_example_without_a_view_weighs_nothing_under_both_normalizers(tiny_student, tiny_teacher):
    for normalizer in ("steps", "weights"):
        teacher = Teacher(Frozen(Pretrained(str(tiny_teacher))), VIEW)
        objective = Objective([Term(ReverseKL(), normalizer=normalizer)])
        module = make_module(tiny_student, {"teacher": teacher}, objective)
        rolled = act(module, make_rows(8))
        streams = module.streams.query_all(module.objective.teachers(), rolled)
        shown = streams["teacher"].available
        assert 0 < int(shown.sum()) < 8
        with torch.no_grad():
            loss, _ = objective(module.distribution(module.policies["student"], rolled), streams, rolled)
        p = log_softmax(module, "student", rolled)
        q = streams["teacher"].distribution.head(streams["teacher"].distribution.hidden).log_softmax(-1).detach()
        here = rolled.mask & shown[:, None]
        total = ((p.exp() * (p - q)).sum(-1) * here).sum()
        z = here.sum() if normalizer == "weights" else rolled.mask.sum()
        assert float(loss) == pytest.approx(float(total / z), rel=1e-4)


# -- modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [Frozen, EMA])
def test_another_view_of_a_model_needs_no_second_copy(own, tiny_student, tiny_teacher, tmp_path):
    weights_of = Frozen(Pretrained(str(tiny_teacher))) if own is Frozen else EMA(0.5)
    teachers = {"told": Teacher(Same("plain"), VIEW), "plain": Teacher(weights_of)}
    module = make_module(tiny_student, teachers, Objective([Term(ReverseKL(), "plain"), Term(ReverseKL(), "told")]))
    assert module.policies["told"].model is module.policies["plain"].model
    assert module.policies["told"].name == "told"
    assert teachers["told"].weights.stands_still == weights_of.stands_still
    assert teachers["told"].weights.starts_as_student == weights_of.starts_as_student
    fit(module, tmp_path)
    rolled = act(module, [row for row in make_rows() if row["solution"]][:4])
    seen = [VIEW(example) for example in rolled.examples]
    plain, told = log_softmax(module, "plain", rolled), log_softmax(module, "told", rolled, seen)
    assert not torch.allclose(plain, told)
    assert torch.equal(log_softmax(module, "told", rolled), plain)


@pytest.mark.parametrize("other", ["nobody", "told"])
def test_a_model_that_nobody_has_cannot_be_shared(other, tiny_student):
    teachers = {"told": Teacher(Same(other), VIEW), "plain": Teacher(Live())}
    with pytest.raises(ValueError, match=rf"model\.teachers\.told\.weights: no '{other}' to share; .* \['plain'\]"):
        make_module(tiny_student, teachers, load=False)


def test_evaluating_is_without_dropout_and_gives_the_mode_back(saved):
    folder = saved(attention_dropout=0.5)
    module = make_module(folder, {"teacher": Teacher(Live())})
    rolled = act(module, make_rows(4))
    assert module.student.training
    first, second = (module.streams.query("teacher", rolled).distribution.hidden for _ in range(2))
    assert torch.equal(first, second)
    assert module.student.training
    bare(module.student).eval()
    with evaluating(module.student):
        pass
    assert not module.student.training
