"""One model, ready to answer: schedule, run, postprocess."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Items
from contextlib import closing
from itertools import chain, count
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.base import Backend
from device_runtime.backends.memory_plan import MemoryPlan, plan_memory
from device_runtime.backends.rope import planned_theta
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.backends.select import create_backend
from device_runtime.engine.answer import Answer
from device_runtime.engine.batch_builder import build_batch
from device_runtime.engine.configure import (
    StopRules,
    cache_request,
    package_sampling,
    package_template,
    stop_rules,
)
from device_runtime.engine.evaluation import evaluate
from device_runtime.engine.generation import (
    DEFAULT_PARAMS,
    GenerationParams,
    Output,
    Request,
    check_prompt,
)
from device_runtime.engine.options import EngineOptions
from device_runtime.engine.page_pool import PagePool, root_digest
from device_runtime.engine.run_ahead import RunAhead
from device_runtime.engine.scheduler import Scheduler
from device_runtime.engine.sequence import Row, Sequence
from device_runtime.engine.session import Session
from device_runtime.engine.tokenizer import Tokenizer
from device_runtime.errors import InternalError, RequestError
from device_runtime.package_format.package import Package, open_package
from device_runtime.templates.message import ChatTemplate

__all__ = ["Engine", "EngineOptions", "GenerationParams", "Output", "Request", "Session"]
DEFAULT_OPTIONS = EngineOptions()


class Engine:
    """Generates for any number of sequences over one backend.

    Not thread-safe: one thread calls everything but `cancel`, which any thread or signal handler
    may call. Use `open`; the constructor takes parts that fit together.

    Attributes:
        package: what is open.
        tokenizer: of the package.
        template: its chat template.
        plan: memory and limits in force; ``plan.notes`` say what was corrected.
    """

    def __init__(
        self,
        package: Package,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        plan: MemoryPlan,
        backend: Backend,
    ) -> None:
        self.package = package
        self.tokenizer = tokenizer
        self.template = template
        self.plan = plan
        self._backend = backend
        self._stop_rules: StopRules = stop_rules(package, tokenizer, template)
        self._scheduler = Scheduler(
            PagePool(plan.num_pages, plan.page_size),
            max_batch_size=plan.max_batch_size,
            max_tokens_per_step=plan.max_tokens_per_step,
        )
        self._ids = count()
        self._answers: dict[int, Answer] = {}
        self._mailboxes: dict[int, deque[Output]] = {}
        self._in_flight: deque[tuple[Row, ...]] = deque()
        self._run_ahead = RunAhead(backend.max_steps_ahead)
        self._cancelled: set[int] = set()
        self._is_closed = False

    @classmethod
    def open(cls, path: Path | str | Package, options: EngineOptions = DEFAULT_OPTIONS) -> Engine:
        """Open a package and load it.

        Args:
            path: folder of a package or workspace, or an open package.
            options: what to take instead of config.ini's values.

        Raises:
            PackageError: the package is incomplete or asks for what does not exist.
            DeviceError: the device cannot hold or run it.
            UsageError: an option has no meaning.
        """
        package = path if isinstance(path, Package) else open_package(path)
        tokenizer = Tokenizer.open(package)
        template = package_template(package, tokenizer)
        backend = create_backend(options.backend, package)
        try:
            request = cache_request(package, options)
            survey = backend.survey(package, request, options.memory_limit_bytes)
            plan = plan_memory(package.model, request, survey)
            backend.load(package, plan)
            return cls(package, tokenizer, template, plan, backend)
        except BaseException:
            backend.close()
            raise

    @property
    def session_len(self) -> int:
        """Most tokens of one sequence."""
        return self.plan.session_len

    @property
    def vocab_size(self) -> int:
        """Rows of logits."""
        return self.package.model.vocab_size

    @property
    def backend_name(self) -> str:
        """Which backend runs."""
        return self._backend.name

    @property
    def default_sampling(self) -> SamplingParams:
        """The package's sampling defaults, seed 0."""
        return package_sampling(self.package)

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait."""
        return len(self._answers)

    def new_session(self) -> Session:
        """Return a session whose turns share their pages."""
        return Session(next(self._ids))

    def close_session(self, session: Session) -> None:
        """Give a session's pages back; it can start anew.

        Raises:
            RequestError: a generation of it is running.
        """
        if session.is_busy:
            raise RequestError(f"session {session.session_id} is busy, cancel its generation first")
        self._scheduler.close_session(session)
        session.rope_theta = 0.0

    def add(
        self,
        prompt_ids: Items[int],
        params: GenerationParams = DEFAULT_PARAMS,
        session: Session | None = None,
    ) -> int:
        """Take in a prompt; `step` works on it. Returns the sequence's id.

        Args:
            prompt_ids: the whole prompt; what a session already holds of it is not computed again.
            params: how to answer.
            session: keeps the pages for the next turn.

        Raises:
            RequestError: the prompt is empty, too long or holds an id outside the vocabulary, or
                the session is busy.
        """
        self._check_request(prompt_ids, session)
        room = self.session_len - len(prompt_ids)
        max_tokens = min(params.max_tokens or room, room)
        theta = planned_theta(self.package.model, len(prompt_ids) + max_tokens)
        sequence_id = next(self._ids)
        if session is not None:
            theta = session.rope_theta = session.rope_theta or theta
            session.sequence_id = sequence_id
            session.is_busy = True
        sequence = Sequence(
            sequence_id=sequence_id,
            token_ids=[int(token_id) for token_id in prompt_ids],
            num_prompt_tokens=len(prompt_ids),
            max_tokens=max_tokens,
            sampling=params.sampling,
            rope_theta=theta,
            root=root_digest(f"rope_theta {theta!r}"),
            session=session,
        )
        self._answers[sequence_id] = Answer(sequence, params, self.tokenizer, self._stop_rules)
        self._scheduler.add(sequence)
        return sequence_id

    def step(self) -> list[Output]:
        """Plan and submit steps, then collect the oldest; return what became known.

        Raises:
            TurbojetError: the backend failed; every generation is gone.
        """
        self._check_open()
        outputs = self._finish_cancelled()
        try:
            while len(self._in_flight) <= self._run_ahead.num_steps:
                rows = self._scheduler.schedule()
                self._tidy()
                if not rows:
                    break
                self._backend.submit(build_batch(rows))
                self._in_flight.append(rows)
            if self._in_flight:
                outputs += self._collect(self._in_flight.popleft())
            elif self._answers:
                raise InternalError(f"{len(self._answers)} sequences wait and none can run")
        except BaseException:
            self._abandon()
            raise
        for output in outputs:
            if output.sequence_id in self._mailboxes:
                self._mailboxes[output.sequence_id].append(output)
        return outputs

    def generate(
        self,
        prompt_ids: Items[int],
        params: GenerationParams = DEFAULT_PARAMS,
        session: Session | None = None,
    ) -> Generator[Output, None, None]:
        """Return the outputs of one prompt as they come, the last one with a finish reason.

        Other sequences go on in the same steps. Closing the iterator early cancels the sequence.

        Raises:
            RequestError: see `add`; raised at once, not at the first output.
        """
        self._check_request(prompt_ids, session)
        return self._stream_one(Request(tuple(prompt_ids), params, session))

    def generate_many(self, requests: Items[Request]) -> Generator[tuple[int, Output], None, None]:
        """Return the outputs of several prompts that run together, each with its request's index.

        Raises:
            RequestError: see `add`; raised at once, and then nothing runs.
        """
        for request in requests:
            self._check_request(request.prompt_ids, request.session)
        return self._stream(requests)

    def logits(self, token_ids: Items[int]) -> NDArray[np.float32]:
        """Return ``[num_tokens, vocab_size]`` fp32 for one text, computed afresh.

        Raises:
            RequestError: see `iter_logits`.
        """
        return np.concatenate(list(self.iter_logits(token_ids)))

    def iter_logits(self, token_ids: Items[int]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits of one text chunk by chunk, in the engine's KV format.

        Args:
            token_ids: at most session_len.

        Raises:
            RequestError: the text is empty or too long, or generations are running.
        """
        self._check_open()
        check_prompt(token_ids, len(token_ids), self.session_len, self.vocab_size)
        if self._answers:
            raise RequestError(f"{len(self._answers)} generations are running, finish them first")
        while self._in_flight:  # steps that ran ahead of an answer's end
            self._collect(self._in_flight.popleft())
        return evaluate(
            self._backend, self._scheduler, self.plan, self.package.model, list(token_ids)
        )

    def cancel(self, sequence_id: int) -> None:
        """Ask for the end of a generation; its last output says "cancelled". Never blocks."""
        self._cancelled.add(sequence_id)

    def check_integrity(self) -> None:
        """Compare every book with every other.

        Raises:
            InternalError: a page is lost, or held by nobody known.
        """
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._answers.clear()
            self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stream_one(self, request: Request) -> Generator[Output, None, None]:
        with closing(self._stream([request])) as outputs:
            for _, output in outputs:
                yield output

    def _stream(self, requests: Items[Request]) -> Generator[tuple[int, Output], None, None]:
        mailboxes: dict[int, deque[Output]] = {}
        try:
            for request in requests:
                sequence_id = self.add(request.prompt_ids, request.params, request.session)
                mailboxes[sequence_id] = self._mailboxes[sequence_id] = deque()
            index_of = {sequence_id: index for index, sequence_id in enumerate(mailboxes)}
            unfinished = set(mailboxes)
            while unfinished:
                if not any(mailboxes.values()):
                    self._check_alive(unfinished)
                    self.step()
                for sequence_id, mailbox in mailboxes.items():
                    while mailbox:
                        output = mailbox.popleft()
                        if output.finish_reason is not None:
                            unfinished.remove(sequence_id)
                        yield index_of[sequence_id], output
        finally:
            for sequence_id in mailboxes:
                self._drop(sequence_id)

    def _check_alive(self, sequence_ids: set[int]) -> None:
        self._check_open()
        lost = sequence_ids - set(self._answers)
        if lost:
            raise InternalError(f"sequence {min(lost)} was given up when a step failed")

    def _drop(self, sequence_id: int) -> None:
        """Forget a listener, and its generation where it is not finished."""
        self._mailboxes.pop(sequence_id, None)
        answer = self._answers.pop(sequence_id, None)
        if answer is not None and not self._is_closed:
            self._scheduler.finish(answer.sequence)

    def _collect(self, rows: tuple[Row, ...]) -> list[Output]:
        outputs = []
        drawn = self._run_ahead.collect(self._backend.collect, is_more=bool(self._in_flight))
        for sequence, token_id in self._scheduler.collect(rows, drawn):
            output = self._answers[sequence.sequence_id].take(token_id)
            if output.finish_reason is not None:
                del self._answers[sequence.sequence_id]
                self._scheduler.finish(sequence)
            outputs.append(output)
        self._tidy()
        return outputs

    def _finish_cancelled(self) -> list[Output]:
        outputs = []
        while self._cancelled:
            answer = self._answers.pop(self._cancelled.pop(), None)
            if answer is not None:
                self._scheduler.finish(answer.sequence)
                outputs.append(answer.cancel())
        return outputs

    def _tidy(self) -> None:
        """Tell the backend what it need not keep."""
        for sequence_id in self._scheduler.take_forgettable():
            self._backend.forget(sequence_id)
        released = self._scheduler.pool.take_released()
        if released:
            self._backend.release(released)

    def _abandon(self) -> None:
        """End every generation after a failure, so that the books stay right."""
        for row in chain.from_iterable(self._in_flight):
            row.sequence.num_in_flight = 0
        self._in_flight.clear()
        for answer in self._answers.values():
            answer.sequence.num_in_flight = 0
            answer.sequence.num_computed = 0
            self._scheduler.finish(answer.sequence)
        self._answers.clear()

    def _check_request(self, prompt_ids: Items[int], session: Session | None) -> None:
        self._check_open()
        check_prompt(prompt_ids, len(prompt_ids) + 1, self.session_len, self.vocab_size)
        if session is not None and session.is_busy:
            raise RequestError(f"session {session.session_id} is busy, wait for its answer")

    def _check_open(self) -> None:
        if self._is_closed:
            raise RequestError("the engine is closed")
