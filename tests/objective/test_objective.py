"""The objective: cut into chunks, micro-batches and ranks it stays the same sum; what it refuses and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_lightning.distribution import Categorical, Head, Stream
from opd_lightning.objective import (
    JSD,
    Confidence,
    Constant,
    CrossEntropy,
    Entropy,
    ForwardKL,
    GroupRelative,
    ImportanceRatio,
    LogLinear,
    LogRatio,
    Objective,
    OpenSteps,
    Outcome,
    PolicyGradient,
    ReverseKL,
    RewardPlusLogRatio,
    Steps,
    Support,
    Term,
    TopEntropy,
    Weight,
    Window,
)
from opd_lightning.objective.chunks import Chunks, ChunkSize
from opd_lightning.objective.objective import availability
from opd_lightning.trajectory import Trajectories
from tests.objective.reference import Policy, batch, close, examples

V, B, T = 9, 6, 5
MASK = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]


class Surer(Weight):
    """1 where the reference is surer of the action than the term's teacher: two streams in one weight."""

    needs = frozenset({"teacher"})
    reads = frozenset({"teacher/log_prob", "reference/log_prob"})

    def __call__(self, steps: Steps) -> Tensor:
        return (steps.statistic("reference/log_prob") > steps.statistic("teacher/log_prob")).float()


OBJECTIVES: dict[str, Callable[[], list[Term]]] = {
    "plain": lambda: [Term(ReverseKL())],
    "weighted, over its own weights": lambda: [
        Term(JSD(support=Support("union", 3)), weights=[Entropy("student"), Window(stop=3)], normalizer="weights")
    ],
    "a quantile of the batch": lambda: [
        Term(ForwardKL(), weights=[TopEntropy(0.4)], normalizer="weights"),
        Term(ReverseKL(), weights=[TopEntropy(0.6, of="teacher")]),
    ],
    "a quantile of the row": lambda: [Term(ReverseKL(), weights=[TopEntropy(0.5, scope="row")], normalizer="weights")],
    "means over where it is on and over trajectories": lambda: [
        Term(ReverseKL(), weights=[Window(stop=3)], normalizer="on"),
        Term(JSD(), weights=[Entropy()], normalizer="trajectories"),
        Term(PolicyGradient(LogRatio(discount=0.9)), source="student", normalizer="trajectories"),
    ],
    "weights that read the open chunk, and another stream": lambda: [
        Term(ReverseKL(), weights=[Surer()], normalizer="weights"),
        Term(CrossEntropy(), None, weights=[Entropy("student")], normalizer="weights"),
    ],
    "policy gradient": lambda: [
        Term(PolicyGradient(LogRatio(discount=0.9))),
        Term(PolicyGradient(RewardPlusLogRatio()), weights=[Outcome(1.0, 0.5)], normalizer="weights"),
    ],
    "two sources": lambda: [
        Term(ReverseKL(), source="student", normalizer="weights"),
        Term(CrossEntropy(), None, source="dataset", weights=[Entropy("student")], normalizer="weights"),
    ],
    "a target": lambda: [
        Term(ReverseKL(), target=LogLinear({"teacher": 1.25, "reference": -0.25}), coefficient=0.5),
        Term(ForwardKL(), teacher="reference", weights=[TopEntropy(0.5, of="teacher")]),
    ],
}


class World:
    """A float32 student with two teachers, one of which has no view on trajectory 2."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        policies = [Policy.random(generator, (B, T), V, hidden=4, dtype=torch.float32) for _ in range(3)]
        self.student = policies[0]
        here = torch.tensor([True, True, False, True, True, True])
        self.streams = {"teacher": Stream(policies[1].teacher, here), "reference": policies[2].stream}
        reward = torch.rand(B, generator=generator)
        self.trajectories = batch(
            MASK,
            V,
            seed,
            reward=reward,
            group_mean=reward.mean().expand(B),
            group_std=reward.std().expand(B),
            sources=("student", "dataset"),
            source=torch.tensor([0, 0, 1, 0, 1, 0]),
        )

    def rows(self, index: Tensor) -> tuple[Categorical, dict[str, Stream], Trajectories]:
        def cut(distribution: Any) -> Any:
            return dataclasses.replace(distribution, hidden=distribution.hidden[index])

        streams = {
            name: Stream(cut(s.distribution), None if s.available is None else s.available[index])
            for name, s in self.streams.items()
        }
        return cut(self.student.distribution), streams, self.trajectories.select(index)

    def whole(self, objective: Objective) -> list[Tensor]:
        loss, _ = objective(self.student.distribution, self.streams, self.trajectories)
        return [loss, *self.student.gradients(loss)]

    def settled(self, objective: Objective) -> Trajectories:
        """The trajectories with the channels of parts that see the whole generation batch."""
        statistics = objective.measure([(self.student.distribution, self.streams, self.trajectories)], T)
        return objective.settle(self.trajectories, availability(self.streams), statistics, lambda values: values)

    def in_parts(self, objective: Objective, ranks: list[list[Tensor]]) -> list[Tensor]:
        """Loss and gradient summed over the micro-batches ``[K]`` of each rank."""
        self.trajectories = self.settled(objective)
        parts = [[self.rows(index) for index in rank] for rank in ranks]
        normalizers = self.normalizers(objective, parts)
        total: list[Tensor] = [torch.zeros(()), *(torch.zeros_like(x) for x in self.student.inputs)]
        for student, streams, trajectories in (part for rank in parts for part in rank):
            loss, _ = objective(student, streams, trajectories, normalizers)
            total = [a + b for a, b in zip(total, [loss, *self.student.gradients(loss)], strict=True)]
        return total

    @staticmethod
    def normalizers(objective: Objective, parts: list[list[Any]]) -> dict[str, float]:
        """Z, with a sum over ranks that each of them asks for in the same order."""
        asked: list[list[float]] = []
        for rank in parts:
            sums: list[float] = []
            objective.normalizers(
                [(trajectories, availability(streams)) for _, streams, trajectories in rank],
                objective.weight_sums([part[:2] for part in rank], [part[2] for part in rank]),
                lambda value, sums=sums: sums.append(value) or value,
            )
            asked.append(sums)
        totals = iter([sum(values) for values in zip(*asked, strict=True)])
        return objective.normalizers([], [], lambda _: next(totals))


def equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The loss, and each gradient to 1e-6 of its Euclidean norm."""
    close(actual[0], expected[0], 1e-6)
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert float((a - b).norm()) <= 1e-6 * float(b.norm()), (a, b)


@pytest.mark.parametrize("name", OBJECTIVES)
@examples(12)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_the_gradient_is_that_of_the_whole_for_any_micro_batches_and_ranks(name, seed, data):
    world = World(seed)
    order = torch.tensor(data.draw(st.permutations(range(B))))
    cuts = sorted(data.draw(st.sets(st.integers(1, B - 1), max_size=B - 1)))
    micro_batches = list(order.tensor_split(cuts))
    border = data.draw(st.integers(1, len(micro_batches)))
    ranks = [rank for rank in (micro_batches[:border], micro_batches[border:]) if rank]
    chunk_steps = data.draw(st.sampled_from([None, 1, 2]))
    found = world.in_parts(Objective(OBJECTIVES[name](), chunk_steps=chunk_steps), ranks)
    equal(found, world.whole(Objective(OBJECTIVES[name]())))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_result_does_not_depend_on_the_chunk_size(name):
    world = World(1)
    expected = world.whole(Objective(OBJECTIVES[name](), chunk_steps=100))
    for chunk_steps in (1, 2, 3, 15, 16, 17):
        equal(world.whole(Objective(OBJECTIVES[name](), chunk_steps=chunk_steps)), expected)


def test_the_size_of_a_chunk_follows_from_a_budget_in_bytes():
    student = Categorical(torch.zeros(100, 4), Head(torch.nn.Linear(4, 2**16), 2**16))
    assert student.bytes_per_state() == 3 * 2**17

    def sizes(count: int, size: ChunkSize, **streams: Stream) -> list[int]:
        steps = Steps.of(batch([[1] * count], V))
        return [states.stop - states.start for states in Chunks(student, streams, steps, size).cut()]

    assert sizes(100, ChunkSize(5)) == [13] * 7 + [9]
    assert sizes(100, ChunkSize(8), teacher=Stream(student)) == [10] * 10
    assert sizes(3, ChunkSize(1)) == [2, 1]
    # evenly cut, so that no small rest costs a pass of its own
    assert sizes(100, ChunkSize(192, steps=90)) == [50, 50]


# -- memory ---------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation, forward or backward, returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_tensor_of_steps_times_vocabulary_is_ever_allocated(name):
    steps, vocabulary, chunk_steps = 64, 300, 4
    generator = torch.Generator().manual_seed(0)
    policies = [Policy.random(generator, (4, steps // 4), vocabulary, hidden=3) for _ in range(3)]
    trajectories = batch(
        [[1] * (steps // 4)] * 4,
        vocabulary,
        reward=torch.rand(4),
        group_mean=torch.zeros(4),
        group_std=torch.ones(4),
        sources=("student", "dataset"),
        source=torch.tensor([0, 0, 1, 1]),
    )
    streams = {"teacher": policies[1].stream, "reference": policies[2].stream}
    student = policies[0].distribution
    with LargestTensor() as largest:
        loss, _ = Objective(OBJECTIVES[name](), chunk_steps=chunk_steps)(student, streams, trajectories, diagnose=True)
        loss.backward()
    assert largest.elements <= (chunk_steps + 1) * vocabulary
    with LargestTensor() as dense:
        policies[0].logits(trajectories.mask).log_softmax(-1).sum().backward()
    assert dense.elements == steps * vocabulary


# -- the evaluation --------------------------------------------------------------------------------------------------


def test_a_coefficient_scales_and_zero_switches_term_and_teacher_off():
    world = World(0)
    terms = [Term(ReverseKL(), coefficient=0.5), Term(ForwardKL(), teacher="reference", coefficient=0.0)]
    objective = Objective(terms)
    assert objective.teachers() == {"teacher"}
    single = world.whole(Objective([Term(ReverseKL())]))
    equal(world.whole(objective), [0.5 * x for x in single])
    terms[1].coefficient = 1.0
    assert objective.teachers() == {"teacher", "reference"}


def test_terms_of_one_class_get_names_of_their_own():
    objective = Objective([Term(ReverseKL()), Term(ReverseKL()), Term(ReverseKL(), name="mine"), Term(ReverseKL())])
    assert [term.name for term in objective.terms] == ["ReverseKL", "ReverseKL_2", "mine", "ReverseKL_3"]
    averages = World(0)
    _, logged = objective(averages.student.distribution, averages.streams, averages.trajectories)
    assert {"loss/ReverseKL", "loss/ReverseKL_2", "loss/mine", "loss/ReverseKL_3"} <= set(logged.compute())


def test_without_grad_the_value_is_the_same_and_nothing_is_attached():
    world = World(0)
    expected, _ = Objective([Term(ReverseKL())])(world.student.distribution, world.streams, world.trajectories)
    with torch.no_grad():
        loss, _ = Objective([Term(ReverseKL())])(world.student.distribution, world.streams, world.trajectories)
    assert loss == expected
    assert not loss.requires_grad


def test_backward_scales_what_is_there_and_refuses_to_run_twice():
    world = World(0)
    expected = world.whole(Objective([Term(ReverseKL())]))
    arguments = world.student.distribution, world.streams, world.trajectories
    loss, _ = Objective([Term(ReverseKL())])(*arguments)
    (loss * 1024).backward(retain_graph=True)
    equal([loss, *(tensor.grad / 1024 for tensor in world.student.inputs)], expected)
    with pytest.raises(RuntimeError, match="the objective's gradients were already consumed by an earlier backward"):
        loss.backward()


def test_the_mean_loss_of_a_term_is_over_the_steps_it_trains():
    world = World(0)
    terms = [Term(ReverseKL(), weights=[Window(stop=1)])]
    _, logged = Objective(terms)(world.student.distribution, world.streams, world.trajectories)
    alone = dataclasses.replace(world.trajectories, mask=world.trajectories.mask.clone())
    alone.mask[:, 1:] = False
    loss, _ = Objective([Term(ReverseKL())])(world.student.distribution, world.streams, alone)
    assert logged.compute()["loss/ReverseKL"] == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("why", ["mask", "weights", "coefficient", "source"])
def test_with_nothing_to_train_a_zero_touches_every_trained_parameter_and_is_counted(why):
    world = World(0)
    term = Term(
        ReverseKL(),
        weights=[Window(start=50)] if why == "weights" else [],
        coefficient=0.0 if why == "coefficient" else 1.0,
        source="nobody" if why == "source" else None,
    )
    world.trajectories.sources = ("student", "dataset", "nobody")
    if why == "mask":
        world.trajectories.mask = torch.zeros_like(world.trajectories.mask)
    objective = Objective([term])
    loss, averages = objective(world.student.distribution, world.streams, world.trajectories)
    loss.backward()
    assert loss.item() == 0
    for tensor in world.student.inputs:
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()
    world = World(0)
    _, others = Objective([Term(ReverseKL())])(world.student.distribution, world.streams, world.trajectories)
    averages.merge(others)
    assert averages.compute()["empty_micro_batches"] == 0.5


def test_weightless_steps_are_never_projected():
    world = World(0)
    seen: list[int] = []

    class Counting(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            seen.append(len(hidden))
            return super().forward(hidden)

    teacher = dataclasses.replace(world.streams["teacher"].distribution, head=Head(Counting(4, V), V))
    world.streams["teacher"] = Stream(teacher)
    terms = [Term(ReverseKL(), weights=[Window(stop=2)])]
    Objective(terms)(world.student.distribution, world.streams, world.trajectories)
    trained = world.trajectories.mask
    assert sum(seen) == int((trained & (trained.cumsum(1) <= 2)).sum())


class Weather(Constant):
    """Needs what no setting of this repository has."""

    needs = frozenset({"barometer"})


# -- what is refused --------------------------------------------------------------------------------------------------

SERVED = {"reward", "group", "behavior", "categorical"}


def check(term: Term, teachers: set[str] | None = None, missing: str = "", sources: set[str] | None = None) -> None:
    teachers = {"teacher", "reference"} if teachers is None else teachers
    Objective([term]).check(teachers, SERVED - {missing}, sources or {"student"})


@pytest.mark.parametrize(
    ("term", "situation", "message"),
    [
        (
            Term(ReverseKL(), teacher="tutor"),
            {},
            r"objective\.terms\[0\] \(ReverseKL\): no teacher 'tutor' in model\.teachers, which has "
            r"\['reference', 'teacher'\]",
        ),
        (
            Term(ReverseKL(), target=LogLinear({"teacher": 1.0, "base": -1.0})),
            {},
            r"objective\.terms\[0\] \(ReverseKL\): no teacher 'base' in model\.teachers",
        ),
        (
            Term(ReverseKL(), teacher=None, name="mine"),
            {},
            r"objective\.terms\[0\] \(mine\): ReverseKL needs a teacher; name an entry of model\.teachers",
        ),
        (
            Term(CrossEntropy(), teacher=None, weights=[Entropy()]),
            {},
            r"objective\.terms\[0\] \(CrossEntropy\): Entropy needs a teacher; name an entry of model\.teachers",
        ),
        (
            Term(ReverseKL(), weights=[Outcome()]),
            {"missing": "reward"},
            r"objective\.terms\[0\] \(ReverseKL\): Outcome needs 'reward': set model\.reward",
        ),
        (
            Term(PolicyGradient(GroupRelative())),
            {"missing": "group"},
            r"objective\.terms\[0\] \(PolicyGradient\): PolicyGradient needs 'group': set rollout\.group_size > 1",
        ),
        (
            Term(PolicyGradient(LogRatio())),
            {"missing": "behavior"},
            r"PolicyGradient needs 'behavior': dataset completions have no behavior log-probs: give the term "
            r"`source: student`",
        ),
        (
            Term(PolicyGradient(LogRatio()), source="dataset"),
            {"missing": "behavior", "sources": {"student", "dataset"}},
            r"PolicyGradient needs 'behavior'",
        ),
        (
            Term(ReverseKL(), weights=[Confidence()]),
            {"missing": "categorical"},
            r"Confidence needs 'categorical': only distributions over a vocabulary have it",
        ),
        (
            Term(ReverseKL(), weights=[Weather()]),
            {},
            r"Weather needs 'barometer': this setting does not name it in `provides`",
        ),
        (
            Term(CrossEntropy(), None, source="dataset"),
            {},
            r"objective\.terms\[0\] \(CrossEntropy\)\.source: nobody called 'dataset' acts; rollout\.behavior: "
            r"\['student'\]",
        ),
        (
            Term(CrossEntropy(), target=LogLinear({"teacher": 1.0})),
            {},
            r"objective\.terms\[0\] \(CrossEntropy\)\.target: CrossEntropy compares with no teacher, so nothing reads",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(term, situation, message):
    with pytest.raises(ValueError, match=message):
        check(term, **situation)


def test_what_can_be_served_is_not_refused():
    check(Term(PolicyGradient(RewardPlusLogRatio()), weights=[TopEntropy(of="teacher")]))
    check(Term(PolicyGradient(LogRatio()), source="student"), missing="behavior", sources={"student", "dataset"})
    check(Term(CrossEntropy(), None), teachers=set(), missing="behavior")


def test_an_objective_without_terms_or_with_an_impossible_chunk_is_refused():
    with pytest.raises(ValueError, match=r"objective\.terms is empty: nothing would be trained"):
        Objective([])
    for settings in ({"chunk_mib": 0}, {"chunk_steps": 0}):
        with pytest.raises(ValueError, match=r"objective: chunk_mib=\d+ and chunk_steps=(0|None) must be >= 1"):
            Objective([Term(ReverseKL())], **settings)


def test_a_signal_that_reads_a_teacher_without_declaring_it_is_told():
    with pytest.raises(RuntimeError, match="this term has no teacher; a signal that reads one must declare it"):
        _ = OpenSteps.of(batch([[1]], V)).teacher


def test_chunks_cover_gradients_of_every_step_once():
    world = World(0)
    objective = Objective([Term(ReverseKL())], chunk_steps=2)
    world.streams["teacher"] = Stream(world.streams["teacher"].distribution)
    loss, _ = objective(world.student.distribution, world.streams, world.trajectories)
    hidden = world.student.gradients(loss)[0]
    assert (hidden.abs().sum(-1) > 0).equal(world.trajectories.mask)
    close(hidden[~world.trajectories.mask], torch.zeros_like(hidden[~world.trajectories.mask]), 0)


# -- parts with parameters --------------------------------------------------------------------------------------------


class Scaled(ReverseKL, torch.nn.Module):
    """A divergence times a number that is learned with the student."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def __call__(self, steps: OpenSteps) -> Tensor:
        return ReverseKL.__call__(self, steps) * self.scale


@pytest.mark.parametrize("chunk_steps", [1, 3, None])
def test_parameters_of_a_part_have_the_gradient_of_the_loss(chunk_steps):
    world = World(0)
    plain, _ = Objective([Term(ReverseKL())])(world.student.distribution, world.streams, world.trajectories)
    expected = [gradient / 2 for gradient in world.student.gradients(plain)]
    part = Scaled()
    objective = Objective([Term(part)], chunk_steps=chunk_steps)
    loss, _ = objective(world.student.distribution, world.streams, world.trajectories)
    equal([2 * loss, *world.student.gradients(loss)], [plain, *expected])
    (gradient,) = torch.autograd.grad(
        objective(world.student.distribution, world.streams, world.trajectories).loss, [part.scale]
    )
    close(gradient, plain.detach(), 1e-6)
    with torch.no_grad():
        alone, _ = objective(world.student.distribution, world.streams, world.trajectories)
    close(alone, loss.detach(), 1e-7)


# -- where a term is off ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["steps", "on", "trajectories", "weights"])
@pytest.mark.parametrize(
    "made",
    [
        lambda: Term(ReverseKL(), weights=[ImportanceRatio()]),
        lambda: Term(PolicyGradient(LogRatio(against="behavior"))),
        lambda: Term(PolicyGradient(LogRatio(discount=0.9, against="behavior"))),
    ],
    ids=["weight", "advantage", "return"],
)
def test_completions_without_behavior_log_probs_reach_neither_value_nor_gradient(made, normalizer):
    def parts(filling: float) -> list[Tensor]:
        world = World(0)
        given = world.trajectories.source == 1
        world.trajectories.behavior_log_probs[given] = filling
        term = made()
        term.source, term.normalizer = "student", normalizer
        return world.whole(Objective([term, Term(CrossEntropy(), None, source="dataset")]))

    unknown, known = parts(torch.nan), parts(-1.0)
    assert all(bool(tensor.isfinite().all()) for tensor in unknown)
    equal(unknown, known)


def test_names_of_terms_never_collide():
    def names(*given: str) -> list[str]:
        return [term.name for term in Objective([Term(ReverseKL(), name=name) for name in given]).terms]

    assert names("a", "a", "a_2") == ["a", "a_2", "a_2_2"]
    assert names("", "", "ReverseKL_2") == ["ReverseKL", "ReverseKL_2", "ReverseKL_2_2"]
    once = Objective([Term(ReverseKL()), Term(ReverseKL())])
    assert [t.name for t in dataclasses.replace(once, terms=[*once.terms, Term(ReverseKL())]).terms] == [
        "ReverseKL", "ReverseKL_2", "ReverseKL_3",
    ]  # fmt: skip
