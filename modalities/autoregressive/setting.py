"""AutoregressiveDistillation: `sample`, `distribution` and `rewards` for students that write tokens.

Shape legend: B trajectories, P prompt width (left padded), T completion width (right padded), H hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...adapters import SWITCHED
from ...blend import Blend
from ...chat import problem_with_form
from ...distribution import Categorical, Head
from ...environment import Environment
from ...module import OnPolicyDistillation
from ...policy import Acting, Policy, evaluating
from ...pretrained import Pretrained
from ...printable import quoted
from ...rollout_settings import Rollout
from ...sharding import mesh_of
from ...trajectory import Example, Trajectories
from .audit import (
    SHOWN,
    audit_rows,
    check_horizon,
    given_ids,
    problem_with_row,
    problem_with_view,
    readings,
    stop_ids,
    suspects,
)
from .engines import DecodeLoop, RolloutEngine
from .engines.trial import Trial
from .findings import Foreseen
from .flops import Counting
from .generation import Generating
from .messages import transcript
from .models import bare, depth, head_at, known_ids, output_embeddings, tokenizer_of, unknown_characters
from .reading import check_layers, hidden_states
from .rendering import COLUMNS, Renderer
from .turns import (
    TakingTurns,
    check_environment,
    conversations,
    environment_rewards,
    last_turn,
    problem_with_prefix,
    with_turns,
)
from .writing import write_blended

PROBES, PROBE_TOKENS = 3, 12


class AutoregressiveDistillation(Counting, TakingTurns, Foreseen, Generating, OnPolicyDistillation):
    """A setting subclasses it, names ``model_class`` and implements `collate`.

    Args:
        engine: what writes rollouts. Default: `DecodeLoop`.
        pass_tokens: the most tokens, padding included, of one forward pass in which a policy says what it would do; a
            micro-batch is asked in as many as it takes, and a row that is longer has one of its own. Default: 1,280 on
            a CPU, where activations then stay in the cache (docs/performance.md), and no limit elsewhere. Batches with
            images are always one pass. A prefix that rows share is read once, in a pass of its own.
        chat_template_kwargs: passed to the chat template, such as ``{enable_thinking: false}`` or tools; the columns
            ``chat_template_kwargs`` and ``tools`` of a row go before them.
        environment: answers to the turns that policies write, ``rollout.turns`` of them at most.
        **kwargs: as in `OnPolicyDistillation`.

    Raises:
        ValueError: pass_tokens < 1, or under fsdp2, where every rank must make equally many passes; a blend that the
            engine can't write.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"categorical", "blend", "layers", "turn"})
    reads: ClassVar[frozenset[str]] = COLUMNS
    observes: ClassVar[frozenset[str]] = frozenset()
    """Types of parts other than text that policies read in observations (`Environment.shows`)."""
    unit: ClassVar[str] = "tokens"

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        pass_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        environment: Environment | None = None,
        **kwargs: Any,
    ) -> None:
        # before the constructor's checks, which read both
        self.environment = environment
        if environment is not None and environment.rewards:
            self.provides = self.provides | {"turn_reward"}  # type: ignore[misc]
        if pass_tokens is not None and pass_tokens < 1:
            raise ValueError(f"model.pass_tokens must be >= 1, got {pass_tokens}")
        super().__init__(**kwargs)
        self.engine, self.pass_tokens = engine or DecodeLoop(), pass_tokens
        if self.rollout.blend is not None and not self.engine.blends:
            raise ValueError(
                f"model.engine={type(self.engine).__name__} writes by one policy: rollout.blend needs DecodeLoop"
            )
        self.chat_template_kwargs = {**(environment.options if environment else {}), **(chat_template_kwargs or {})}
        self._heads: dict[str, nn.Module] = {}
        self.trials: dict[str, Trial] = {}

    def configure_model(self) -> None:
        if self.pass_tokens is not None and mesh_of(self._trainer) is not None:
            raise ValueError(
                f"model.pass_tokens={self.pass_tokens}: under trainer.strategy=fsdp2 every rank must make equally many "
                "forward passes, so a micro-batch is one; lower rollout.micro_batch_size instead"
            )
        super().configure_model()

    def original_processor(self, spec: Pretrained) -> Any:
        return spec.tokenizer()

    def load_processor(self, spec: Pretrained) -> Any:
        processor = self.original_processor(spec)
        tokenizer_of(processor).padding_side = "left"  # all rows begin to write in one column
        return processor

    def reads_as(self, policy: Policy) -> Policy:
        """Returns the policy whose processor renders a policy's prompts: itself, or the student without `own_template`.

        A copy of the student, which a worker acts with, has a processor of its own.
        """
        shares = policy.name in self.teachers and not self.teachers[policy.name].own_template
        return self.policies["student"] if shares and policy.name in self.policies else policy

    def renderer(self, policy: Policy) -> Renderer:
        """Builds the renderer of a policy's rows."""
        return Renderer(policy.processor, self.chat_template_kwargs)

    def asked(self, example: Example) -> Example:
        """Returns the row with the prompt that is rendered; ``example``: as the policy reads it."""
        return example

    def answered(self, example: Example, seen: Example, policy: Policy) -> Example:
        """Returns the row with its given completion; ``seen``: as ``policy``, the student, reads the row."""
        return example

    def tokenizer(self, policy: Policy | None = None) -> Any:
        """Returns the tokenizer of a policy (default: the trained student, whose a worker must not use)."""
        return tokenizer_of((policy or self.policies["student"]).processor)

    @cached_property
    def eos(self) -> list[int]:
        """Every id that ends a completion of the student."""
        return stop_ids(self, self.policies["student"])

    @cached_property
    def padding_id(self) -> int:
        """Padding id. It is masked, so any id with an embedding will do."""
        own = self.tokenizer().pad_token_id
        return own if own is not None and own < self.vocabulary else 0

    def suppressed(self) -> list[int]:
        """Ids that can never be an action (placeholders of other modalities)."""
        return []

    def filled_in(self, policy: Policy) -> list[int]:
        """Ids that a policy reads as something else (an image) and needs no row of embeddings for."""
        return []

    @cached_property
    def vocabulary(self) -> int:
        """Ids below it can be actions: those that the tokenizer knows and every policy can read and write."""
        rows = [known_ids(policy) for policy in self.policies.values()]
        # not its length: some tokenizers leave ids out
        return min(1 + max(self.tokenizer().get_vocab().values()), *rows)

    def head(self, policy: Policy) -> Head:
        module, config = output_embeddings(policy), bare(policy.model).config.get_text_config()
        suppressed = self.suppressed()
        return Head(
            module,
            self.vocabulary,
            scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
            suppressed=torch.tensor(suppressed) if suppressed else None,
            **({"context": policy.active} if isinstance(module, SWITCHED) else {}),
        )

    # -- the methods of a setting -------------------------------------------------------------------------------

    def sample(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        return self.act_in_turns(Acting(policy, prompts, examples), rollout, seeds)

    def sample_blended(
        self, acting: dict[str, Acting], blend: Blend, rollout: Rollout, seeds: list[int]
    ) -> Trajectories:
        return with_turns(self, rollout, write_blended(self, acting, blend, rollout, seeds))

    def replay(
        self, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout, seeds: list[int]
    ) -> Trajectories:
        """Converts the column ``completion``, cut at the horizon; of several messages the assistant's are trained.

        Where a row has ``completion_ids``, what a policy wrote once, it is these.
        """
        horizon = rollout.horizon
        given = [given_ids(self, example, view, policy) for example, view in zip(examples, seen, strict=True)]
        width = min(max(len(row.ids) for row in given), horizon)
        actions = torch.full((len(given), width), self.padding_id)
        mask = torch.zeros(actions.shape, dtype=torch.bool)
        for i, (ids, written, _) in enumerate(given):
            actions[i, : len(ids)] = torch.tensor(ids[:width])
            mask[i, : len(ids)] = torch.tensor(written[:width])
        replayed = Trajectories(
            observation=self.collate(seen, policy),
            actions=actions,
            mask=mask,
            examples=examples,
            stopped=torch.tensor([len(row.ids) <= horizon and row.ids[-1] in self.eos for row in given]),
            observed=[row.observed for row in given] if any(row.observed for row in given) else None,
            behavior_log_probs=torch.full(mask.shape, torch.nan, dtype=torch.float32),
        )
        return with_turns(self, rollout, replayed)

    def distribution(
        self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None
    ) -> Categorical:
        layers = self.objective.layers(policy.name, depth(policy))
        # on the objective's device
        where, head = trajectories.mask.device, self.head(policy)
        hidden, *others = (tensor.to(where) for tensor in hidden_states(self, policy, trajectories, view, layers))
        if policy.name in self.teachers:
            head = head_at(where, head, policy.name, self._heads)
        return Categorical(hidden, head, dict(zip(layers, others, strict=True)))

    def hidden_states(
        self, policy: Policy, trajectories: Trajectories, layers: Sequence[int], view: list[Example] | None = None
    ) -> list[Tensor]:
        _, *states = hidden_states(self, policy, trajectories, view, layers)
        return states

    def media(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        """Computes model inputs that belong to no token of the prompt, such as pixels; never stored."""
        return {}

    def shown_inputs(self, policy: Policy) -> dict[str, Tensor]:
        """Computes all inputs of a policy that is shown something besides text; empty: it reads text alone."""
        return {}

    def cache_key(self, example: Example) -> Hashable:
        """Returns the key that separates examples with equal token ids (their images)."""
        return None

    def continued(self, prompts: dict[str, Tensor], trajectories: Trajectories, device: Any) -> dict[str, Tensor]:
        """Builds model inputs for prompt and completion ``[B, P + T]``."""
        # a step may be visible without being trained, so everything up to the last trained one is attended to
        written = trajectories.mask.flip(1).cumsum(1).flip(1) > 0
        attention = torch.cat([prompts["attention_mask"], written.to(device).long()], 1)
        return {
            "input_ids": torch.cat([prompts["input_ids"], trajectories.actions.to(device)], 1),
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        }

    def rewards(self, trajectories: Trajectories) -> tuple[list[float | None] | None, list[dict[str, Any]]]:
        samples: list[dict[str, Any]] = []
        texts, examples = self.completions(last_turn(trajectories)), trajectories.examples
        facts = [self.parsed(*pair, trajectories.student_view) for pair in zip(texts, examples, strict=True)]
        rows = [example | own for example, own in zip(examples, facts, strict=True)]
        self.scoring.ahead(self.reward, texts, rows)
        for text, row, own in zip(texts, rows, facts, strict=True):
            samples.append({"prompt": transcript(row["prompt"]), "completion": text, **own})
            if self.reward is not None:
                samples[-1]["reward"] = self.reward_of(text, row)
        for sample, told in zip(samples, conversations(self, trajectories), strict=False):
            sample |= told
        if self._trainer is not None and self.trainer.training:
            self.scoring.record(self.reward, "judge", self.record)
        of_turns = environment_rewards(self, trajectories)
        if self.reward is None:
            for sample, value in zip(samples, of_turns or (), strict=False):
                sample["reward"] = value
        return of_turns if self.reward is None else [row["reward"] for row in samples], samples

    def release(self) -> None:
        self.engine.close()
        parts: tuple[Any, ...] = (
            self.environment,
            self.reward,
            *self.evaluation.metrics.values(),
            *self.notes.values(),
        )
        for part in parts:
            if hasattr(part, "close"):
                part.close()

    def completions(self, trajectories: Trajectories) -> list[str]:
        """Decodes the completions."""
        rows = zip(trajectories.actions, trajectories.mask, strict=True)
        return [self.written_as(row[keep].tolist()) for row, keep in rows]

    def written_as(self, tokens: list[int]) -> str:
        """Decodes a completion, for rewards and samples."""
        # what ends a turn need not be marked as special
        visible = [token for token in tokens if token not in self.eos]
        return str(self.tokenizer().decode(visible, skip_special_tokens=True))

    def decode_steps(self, trajectories: Trajectories) -> list[list[str]]:
        rows = zip(trajectories.actions, trajectories.mask, strict=True)
        return [[str(self.tokenizer().decode([token])) for token in row[keep].tolist()] for row, keep in rows]

    def parsed(self, completion: str, example: Example, student_view: dict[str, Any] | None = None) -> dict[str, Any]:
        """Parses a completion to columns that only the setting knows: rewards read them, samples show them,
        and validation averages the numbers in its entry ``metrics``. ``student_view``: as `Trajectories` has it."""
        return {}

    # -- export -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def probe(self, policy: Policy) -> Tensor:
        """Computes log-probs ``[n, V]`` behind drawn ids."""
        possible = torch.tensor(sorted({*range(self.vocabulary)} - {*self.suppressed()}))
        draw = torch.randint(len(possible), (PROBES, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        ids, device = possible[draw], next(policy.model.parameters()).device
        with evaluating(policy.model), policy.active():
            logits = bare(policy.model)(input_ids=ids.to(device)).logits[..., : self.vocabulary]
        return logits.float().log_softmax(-1).flatten(0, 1).cpu()

    # -- checks -------------------------------------------------------------------------------------------------

    @property
    def acting_tolerance(self) -> float:
        return float(getattr(self.engine, "tolerance", 0.0))

    def suspects(self, policy: Policy, what: str) -> list[str]:
        return suspects(self, policy, what)

    def audit_rows(self) -> list[tuple[str, dict[str, str]]]:
        check_layers(self)
        return audit_rows(self)

    def readings(self, example: Example, limit: int = SHOWN) -> list[tuple[str, str]]:
        return readings(self, example, limit)

    def prompt_ids(self, example: Example, policy: Policy) -> Tensor:
        """Tokenizes the prompt ``[P]`` of an example, as the policy reads it."""
        prompt = self.collate([example], policy)
        return prompt["input_ids"][prompt["attention_mask"] > 0]

    def prepare_for_rows(self) -> None:
        """Checks the horizon and the template's options before rows are read.

        Raises:
            ValueError: every row would be too long, or the template does not take the run's options.
        """
        super().prepare_for_rows()
        check_horizon(self)
        check_environment(self)
        self.renderer(self.policies["student"]).check_options("model.chat_template_kwargs")

    def refusal(self, example: Example) -> str | None:
        self.configure_model()
        try:
            return problem_with_form(example["prompt"]) or self._refusal(example)
        except ValueError as error:  # a view or the setting itself could not read the example
            return str(error)
        except Exception as error:  # tokenizers raise nothing narrower
            if "[UNK]" not in str(error):
                raise
            unknown = quoted(unknown_characters(self.tokenizer(), str(example["prompt"])), 40)
            return f"a tokenizer has no token for {unknown}, and none for the unknown"

    def _refusal(self, example: Example) -> str | None:
        return problem_with_row(self, example) or problem_with_prefix(self, example)

    def problem_with_view(self, name: str, example: Example) -> str | None:
        return problem_with_view(self, name, example)
