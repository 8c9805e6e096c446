"""Which changes of a configuration a run that goes on may make unasked; what they do is in test_changed_runs.py."""

from __future__ import annotations

import pytest

from opd_lightning.changes import check_permitted, other_weights

OBJECTIVE = ["model.init_args.objective.init_args.terms.0.signal.class_path", "ReverseKL", "ForwardKL"]
HORIZON = ["model.init_args.rollout.horizon", "8", "16"]


@pytest.mark.parametrize(
    "key",
    [
        "trainer.max_steps",
        "trainer.devices",
        "trainer.logger.init_args.save_dir",
        "checkpoint.every_n_train_steps",
        "data.init_args.train",  # rows are compared themselves
        "seed_everything",  # refused by whoever draws with it
        "model.init_args.evaluation.horizon",
        "model.init_args.rollout.batch_size",  # batches over all ranks are compared
        "model.init_args.rollout.engine.init_args.url",
        "model.init_args.teachers.teacher.weights.init_args.pretrained.path",  # weights are compared
    ],
)
def test_what_decides_nothing_may_change(key):
    check_permitted([[key, "a", "b"]], [])


@pytest.mark.parametrize(
    "key",
    [
        OBJECTIVE[0],
        "model.class_path",
        "model.init_args.teachers.other.weights.class_path",
        "model.init_args.rollout.temperature",
        "model.init_args.optimizer.init_args.lr",
        "model.init_args.reward.class_path",
        "trainer.callbacks.0.init_args.at",
        "trainer.precision",
        "trainer.accumulate_grad_batches",
    ],
)
def test_what_decides_what_is_trained_may_not(key):
    with pytest.raises(ValueError, match=r"a -> b"):
        check_permitted([[key, "a", "b"]], [])


def test_the_refusal_names_every_key_and_the_argument_that_permits_them_all():
    with pytest.raises(ValueError, match="another configuration") as refusal:
        check_permitted([OBJECTIVE, HORIZON, ["trainer.max_steps", "1", "2"]], ["model.schedule"])
    *lines, _ = str(refusal.value).splitlines()
    assert lines[1:] == ["  model.objective.terms.0.signal: ReverseKL -> ForwardKL", "  model.rollout.horizon: 8 -> 16"]
    argument = "--checkpoint.may_change='[model.schedule, model.objective.terms, model.rollout.horizon]'"
    assert str(refusal.value).endswith(argument)
    check_permitted([OBJECTIVE, HORIZON], ["model.schedule", "model.objective.terms", "model.rollout.horizon"])


def test_a_permission_holds_for_what_is_below_it_and_for_nothing_beside_it():
    check_permitted([OBJECTIVE], ["model.init_args.objective"])
    with pytest.raises(ValueError, match="horizon"):
        check_permitted([HORIZON], ["model.rollout.hor", "model.objective"])


def test_a_setting_that_is_new_and_unused_is_no_change():
    check_permitted([["model.init_args.rollout.new", "nothing", "None"]], [])
    with pytest.raises(ValueError, match="nothing -> 3"):
        check_permitted([["model.init_args.rollout.new", "nothing", "3"]], [])


def test_teachers_are_known_by_their_weights():
    assert other_weights({"one": "a", "gone": "b"}, {"one": "a", "new": "c"}) == []
    assert other_weights({"one": "a"}, {"one": "b"}) == [["model.teachers.one", "weights a", "weights b"]]


@pytest.mark.parametrize(
    ("key", "decides"),
    [
        ("model.init_args.reward.init_args.endpoint.init_args.budget.init_args.tokens", False),
        ("model.init_args.reward.init_args.endpoint.init_args.budget", False),
        ("model.init_args.teachers.budget.view", True),
        ("model.init_args.teachers.path.weights", True),
        ("model.init_args.notes.key.init_args.right", True),
        ("model.init_args.notes.spans.init_args.annotator.init_args.key", True),
        ("model.init_args.notes.server.init_args.key", True),
        ("model.init_args.notes.reward.init_args.timeout", True),
        ("model.init_args.objective.init_args.terms.0.signal.init_args.key", True),
        ("model.init_args.reward.init_args.timeout", False),
        ("model.init_args.environment.init_args.url", False),
        ("model.init_args.reward.init_args.endpoint.init_args.url", False),
        ("model.init_args.teachers.weights.weights.init_args.pretrained.init_args.path", False),
    ],
)
def test_names_that_people_give_are_no_places(key, decides):
    if decides:
        with pytest.raises(ValueError, match="decide what is trained"):
            check_permitted([[key, "1", "2"]], ())
    else:
        check_permitted([[key, "1", "2"]], ())
