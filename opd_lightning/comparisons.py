"""What is compared before the first step (see `agreement`), and what may be the cause where the two differ."""

from __future__ import annotations

TOGETHER, ACTED, TRAINING = "alone / beside others", "acted / replayed", "evaluation / training mode"
MEANING = {
    TOGETHER: "what it says of a row depends on the rows beside it",
    ACTED: "the log-probs that it acts with are not those of its replay, which is what is trained",
    TRAINING: "in training mode it says something else than when it acts",
}


def usual_suspects(setting: str, what: str) -> list[str]:
    """Lists what may make the policies of any setting disagree with themselves.

    Args:
        setting: the name of its class.
        what: is compared.
    """
    return {
        TOGETHER: [
            f"{setting}.sample or {setting}.distribution lets a row see others, by padding (steps outside of the mask) "
            "or a mean over rows; or the order of states in one of the two is wrong"
        ],
        ACTED: [
            f"{setting}.distribution asks at other states than those that {setting}.sample acted at: their order, "
            "their number (one before each action, none behind the last), or what came before them",
            f"the log-probs that {setting}.sample returns are of another distribution (they have to be at "
            "temperature 1)",
        ],
        TRAINING: ["dropout, or another layer of the model that is random or counts batches in training mode"],
    }[what]
