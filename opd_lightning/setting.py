"""Setting: what a setting says of prompts, steps and policies, and what the rest of the core may ask it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .blend import Blend
from .comparisons import usual_suspects
from .distribution import Distribution
from .evaluation_settings import Evaluation
from .finding import Finding
from .forecast import Forecast
from .note import Note, needed_columns, written_by
from .objective import Objective
from .picture import Picture
from .policy import Acting, Policy, View
from .portable import Portable
from .reward import Reward
from .rollout_settings import Rollout
from .student_view import shown
from .teacher import Teacher
from .trajectory import Example, Trajectories


class Setting(Portable):
    """The interface between a setting and the core: four methods that it implements, and others with a default.

    Attributes:
        policies: the student and the teachers by name, once they are loaded; those that are elsewhere have none.
        elsewhere: of such teachers, what the start-up table says of them.
        objective, teachers, notes, rollout, reward, evaluation, student_view: as in `OnPolicyDistillation`.
    """

    headline: ClassVar[str] = "accuracy"
    """What is printed before training: the metrics with this in their names."""
    columns: ClassVar[tuple[str, ...]] = ("prompt",)
    """Those without which no policy can act on an example."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """What it offers to parts of the objective (`Part.needs`); ``reward``: `rewards` has rewards without a verifier;
    ``blend``: `sample_blended`; ``layers``: `hidden_states`; ``turn``: `prefixes`, `go_on` and the channel ``turn``."""
    reads: ClassVar[frozenset[str]] = frozenset({"prompt"})
    """Columns that it reads where rows have them, besides those that its parts name."""
    unit: ClassVar[str] = "steps"
    """What its actions are called, in metrics and lines that count them."""
    padding: ClassVar[dict[str, tuple[float, str]]] = {}
    """Of observations that differ in width between batches: the value of what is added, and the side (left, right)."""

    policies: dict[str, Policy]
    elsewhere: dict[str, dict[str, str]]
    objective: Objective
    teachers: dict[str, Teacher]
    notes: dict[str, Note]
    rollout: Rollout
    reward: Reward | None
    evaluation: Evaluation
    student_view: View | None

    # -- the four methods of a setting --------------------------------------------------------------------------

    @abstractmethod
    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        """Converts raw columns to model inputs of ``policy``: the student, or a teacher with its own template."""

    @abstractmethod
    def sample(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        """Lets ``policy`` act. Draws for trajectory i depend on ``seeds[i]`` alone, not on its neighbors.

        It may run in a thread of its own, beside training: nothing but the arguments says who acts, and how.
        """

    @abstractmethod
    def distribution(
        self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None
    ) -> Distribution:
        """Evaluates ``policy`` at every visited state ``[B, T]``; ``view``: the examples as it reads them."""

    @abstractmethod
    def rewards(
        self, trajectories: Trajectories
    ) -> tuple[Tensor | Sequence[float | None] | None, list[dict[str, Any]]]:
        """Rewards, and what to show of each trajectory (``prompt``, ``completion``).

        Rewards are finite numbers, a tensor ``[B]`` or a list with None where one abstains (`reward_of` asks the
        verifier); None without a verifier.
        """

    # -- what a setting may add ---------------------------------------------------------------------------------

    def sample_held_out(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        """Acts in evaluation, for a setting that explores while it trains; default: `sample`."""
        return self.sample(policy, prompts, examples, rollout, seeds)

    def sample_blended(
        self, acting: dict[str, Acting], blend: Blend, rollout: Rollout, seeds: list[int]
    ) -> Trajectories:
        """Lets several policies act as one; for a setting whose ``provides`` names ``blend``.

        Args:
            acting: of each of ``blend.policies``, what it acts on.
            blend: mixes what they say.
            rollout, seeds: as in `sample`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot blend policies")

    def prefixes(
        self, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout
    ) -> Trajectories | None:
        """Collects the recorded turns that rollouts go on from (``rollout.prefix_turns``); None: from none.

        Args:
            policy, examples, seen: as in `replay`.
            rollout: says from how many.
        """
        return None

    def go_on(self, acting: Acting, begun: Trajectories, rollout: Rollout, seeds: list[int]) -> Trajectories:
        """Lets a policy go on from trajectories; for a setting whose ``provides`` names ``turn``.

        Args:
            acting: who, and what it acts on.
            begun: their steps, up to the last one that the mask holds, are kept and not trained.
            rollout, seeds: as in `sample`; the horizon counts what was begun, too.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot go on from trajectories")

    def hidden_states(
        self, policy: Policy, trajectories: Trajectories, layers: Sequence[int], view: list[Example] | None = None
    ) -> list[Tensor]:
        """Computes hidden states ``[B, T, H]`` of layers; for a setting whose ``provides`` names ``layers``.

        Args:
            policy, trajectories, view: as in `distribution`.
            layers: by number, negative ones from the end.
        """
        raise NotImplementedError(f"{type(self).__name__} shows no hidden states")

    def replay(
        self, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout, seeds: list[int]
    ) -> Trajectories:
        """Converts given completions to trajectories, for ``rollout.behavior: {dataset: …}``.

        Args:
            policy: the student, whose processor reads them.
            examples: rows of the data set.
            seen: the same as the student's view shows them.
            rollout, seeds: as in `sample`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot replay dataset completions")

    def refusal(self, example: Example) -> str | None:
        """Finds why this example cannot be used (too long a prompt, …); None if it can."""
        return None

    def problem_with_view(self, name: str, example: Example) -> str | None:
        """Finds why a teacher can't read its view of an example (too long a prompt, …); None if it can, or has none."""
        return None

    def inspect(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Computes further metrics, a value per trajectory ``[B]`` each, for one batch of each validation."""
        return {}

    def measure(self, stage: str, who: str, examples: list[Example], batch_idx: int) -> None:
        """Measures more of a batch of held-out examples than how one rollout of each ends (see `Evaluator.step`)."""

    def measured(self, stage: str) -> dict[str, float]:
        """Returns the metrics of `measure` since the last call, over all batches and ranks, by ``<stage>/<name>``."""
        return {}

    def asked_by_parts(self) -> set[str]:
        """Teachers that no term names, but other parts of the setting ask."""
        return set()

    def release(self) -> None:
        """Gives back what it holds outside of this process; comes at the end of every stage, however it ends."""

    def decode_steps(self, trajectories: Trajectories) -> list[list[str]] | None:
        """Decodes each trained step of each trajectory, for people; None where steps can't be read."""
        return None

    def audit_rows(self) -> list[tuple[str, dict[str, str]]]:
        """Rows of the start-up table: what, and its value for each role. Raises for what cannot work."""
        return []

    def readings(self, example: Example, limit: int = 500) -> list[tuple[str, str]]:
        """Lists the model inputs of a row, for people: whose they are, and their text of up to ``limit`` characters."""
        return []

    def findings(self, examples: list[Example], acted: Trajectories, folder: Path) -> Iterator[Finding]:
        """Checks what only the setting knows, for `opd check`: rows, answers, learning rate.

        Args:
            examples: training rows.
            acted: the student's rollouts on the first of them.
            folder: where pictures may go; it need not be there yet.
        """
        return iter(())

    def forecast(self, trainer: Any, device_bytes: float | None) -> Forecast | None:
        """Computes the memory that a step takes, from shapes alone; None (default): nobody knows.

        Args:
            trainer: of the run.
            device_bytes: of the GPU that it is computed for; None: the device that is there.
        """
        return None

    @staticmethod
    def pictures(run: Path) -> list[list[Picture]]:
        """Draws what `opd report` shows of a run's folder besides texts and curves, a list for each row of the page."""
        return []

    @property
    def acting_tolerance(self) -> float:
        """How far log-probs of acting may be from those of a replay, in nats, beyond what rounding does."""
        return 0.0

    def suspects(self, policy: Policy, what: str) -> list[str]:
        """Lists what may make a policy disagree with itself in one of the `comparisons`, for its message."""
        return usual_suspects(type(self).__name__, what)

    # -- what its parts need ----------------------------------------------------------------------------------

    def required_columns(self) -> dict[str, str]:
        """Lists the required columns, each with the part that needs it."""
        needed = dict.fromkeys(self.columns, "the rollout")

        def need(column: str, who: str) -> None:
            needed[column] = f"{needed[column]}, {who}" if column in needed else who

        if "dataset" in self.rollout.sources:
            need("completion", "rollout.behavior.dataset")
        if self.rollout.prefix_turns:
            need("completion", "rollout.prefix_turns")
        for column in getattr(self.reward, "columns", ()):
            need(column, "model.reward")
        for column in self.evaluation.by:
            need(column, "model.evaluation.by")
        for name, metric in self.evaluation.metrics.items():
            for column in metric.columns:
                need(column, f"model.evaluation.metrics.{name}")
        for column in self.student_view.columns if self.student_view else ():
            need(column, "model.student_view")
        for name, teacher in self.teachers.items():
            for column in (*(teacher.view.columns if teacher.view else ()), *teacher.where):
                need(column, f"model.teachers.{name}")
        found_out = written_by(self.notes)
        needed = {column: who for column, who in needed.items() if column not in found_out}
        for column, who in needed_columns(self.notes).items():
            need(column, who)
        return needed

    # -- what the core knows of every setting -------------------------------------------------------------------

    @property
    def has_rewards(self) -> bool:
        """True where `rewards` has rewards, of `model.reward` or of its own."""
        return self.reward is not None or "reward" in self.provides

    def shown(self, examples: list[Example], settings: dict[str, Any] | None = None) -> list[Example]:
        """Applies the student's view to examples; ``settings``: as the view was when it had these."""
        return shown(self.student_view, examples, settings)
