"""A conversation's pages between its turns."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Session:
    """Tokens whose keys and values are kept for the next turn.

    Made by `Engine.new_session`. The pages may be taken back when memory runs out; then the next
    turn computes them again from its prompt.

    Attributes:
        session_id: unique in the engine.
        token_ids: tokens in the pages, from the first on.
        pages: KV pages held while idle.
        rope_theta: rotary base, decided by the first turn (spec section 3); 0.0 before it.
        sequence_id: of the newest generation, running or not; None before the first.
        is_busy: a generation of this session is running.
    """

    session_id: int
    token_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    rope_theta: float = 0.0
    sequence_id: int | None = None
    is_busy: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens kept."""
        return len(self.token_ids)
