"""One vLLM replica in simulated time: scheduler steps over a paged cache.

In: requests (`submit`) and how far time has come (`advance`). Out: `outcomes` (first tokens and finished requests, with
their times), `log` (cache events, step by step), counters. Source: vllm/v1/core/sched/scheduler.py of vLLM 0.29:

- a step schedules the running requests in the order of their admission, then admits waiting ones first come first
  served while the token budget and the number of sequences allow, and only if the whole prompt fits in free blocks;
- a prompt longer than what is left of the budget is computed in chunks. Admission stops with it, so at most one
  request is half-way through its prompt, and it is the last of the running ones;
- blocks are cached when they are scheduled, and can be hit by the next request of the same step;
- when a running request finds no block, the last of the running ones is preempted: it gives up its blocks and goes to
  the head of the queue, to be computed again; nothing is admitted in that step.

Since everyone who decodes computes one token per step, a request's block boundaries and its end are known as step
numbers when it starts to decode. A decode step therefore costs only the requests that are at a boundary in it, and
`advance` runs such steps in a tight loop as long as no prompt is to be computed.
"""

from __future__ import annotations

from collections import deque

from benchmarks.fleet.cache import BlockCache, HostTier
from benchmarks.fleet.engine import EngineRequest, LogEntry, Outcome, ReplicaConfig, What
from benchmarks.fleet.requests import LoadReport, Record
from serve_app.types import CPU, GPU


class Replica:
    """Args: index: its number in the fleet; cache: to be used in place of an own one of the configured size."""

    WINDOW_S = 10.0  # `work_s` is kept by windows of this length

    def __init__(self, index: int, config: ReplicaConfig, cache: BlockCache | None = None) -> None:
        self.index = index
        self.config = config
        self.cache = cache or BlockCache(config.kv_tokens // config.block_size_tokens)
        self.host = HostTier(config.cpu_tokens // config.block_size_tokens) if config.cpu_tokens else None
        self.time_s = 0.0  # end of the last step
        self.outcomes: list[Outcome] = []
        self.log: list[LogEntry] = []
        self.steps = 0
        self.busy_s = 0.0
        self.prefill_tokens = 0  # computed, recomputation after preemption included
        self.decode_tokens = 0
        self.preemptions = 0
        self.peak_waiting = 0
        self.work_s: list[float] = []  # by window: step time beyond the fixed part, so what load causes
        self._waiting: deque[EngineRequest] = deque()
        self._waiting_tokens = 0
        self._running: dict[EngineRequest, None] = {}  # in order of admission
        self._prefilling: EngineRequest | None = None  # the one that is half-way, last of the running ones
        self._at_boundary: list[dict[EngineRequest, None]] = [{} for _ in range(config.block_size_tokens)]
        self._ending: dict[int, list[EngineRequest]] = {}  # by number of the step
        self._context_tokens = 0  # of all that decode
        self._retry = True  # something has changed since the head of the queue did not fit

    # -- from outside -------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def submit(self, record: Record, now_s: float) -> bool:
        """Accept a request, or refuse it because too many wait. Time must have come to `now_s`."""
        limit = self.config.max_waiting
        if limit is not None and len(self._waiting) >= limit:
            return False
        if not self.has_work:
            self.time_s = max(self.time_s, now_s)
        self._waiting.append(EngineRequest(record, target=record.request.prompt_tokens))
        self._waiting_tokens += record.request.prompt_tokens
        self.peak_waiting = max(self.peak_waiting, len(self._waiting))
        self._retry = True
        return True

    def advance(self, until_s: float) -> None:
        """Run every step that starts before `until_s`. The last of them may end after it."""
        while self.time_s < until_s and (self._running or self._waiting):
            if not self._can_only_decode() or not self._decode(until_s):
                self._step()

    def report(self, now_s: float, in_flight: int) -> LoadReport:
        """`in_flight` is the caller's: a request whose last step has begun has left the scheduler, but not ended."""
        cache = self.cache
        used = cache.capacity_blocks - cache.free_blocks if cache.capacity_blocks else 0
        return LoadReport(
            now_s,
            in_flight,
            len(self._waiting),
            self._waiting_tokens,
            used / max(cache.capacity_blocks, 1),
            cache.unused_blocks,
        )

    # -- one step -----------------------------------------------------------------------------------------------

    def _can_only_decode(self) -> bool:
        return (
            self._prefilling is None
            and not (self._waiting and (self._retry or not self._running))
            and not self.config.step_by_step
        )

    def _decode(self, until_s: float) -> bool:
        """Steps in which nothing but decoding happens. Returns False if the next step is not such a one."""
        cache, size = self.cache, self.config.block_size_tokens
        timing, at_boundary, ending = self.config.timing, self._at_boundary, self._ending
        base_s, context_s = timing.base_s + timing.decode_step_s, timing.context_s_per_token
        count, context, step, time_s = len(self._running), self._context_tokens, self.steps, self.time_s
        start_s, first_step = time_s, step
        while time_s < until_s:
            starting = at_boundary[step % size]
            if len(starting) > cache.free_blocks:
                break  # somebody will be preempted
            for sequence, block in zip(starting, cache.allocate(len(starting)), strict=True):
                sequence.blocks.append(block)
            filled = at_boundary[(step + 1) % size]
            if filled:
                self._fill(filled, step)
            time_s += base_s + context_s * context
            context += count
            if cache.events or self.host is not None:
                self._publish(time_s)
            step += 1
            if step - 1 in ending:
                break
        done = step - first_step
        if not done:
            return False
        self._context_tokens, self.steps, self.time_s = context, step, time_s
        self.decode_tokens += done * count
        self.busy_s += time_s - start_s
        self._add_work(start_s, time_s - start_s - done * base_s)
        self._finish(step - 1)
        return True

    def _step(self) -> None:
        """One step of any kind."""
        step, timing, start_s = self.steps, self.config.timing, self.time_s
        budget = self.config.max_num_batched_tokens
        preempted = self._give_blocks(step)
        chunk_of: list[tuple[EngineRequest, int]] = []  # whose prompt, tokens
        decoding = len(self._running) - (self._prefilling is not None)
        budget -= decoding
        if self._prefilling is not None:
            if self._continue(self._prefilling, budget, chunk_of):
                budget -= chunk_of[-1][1]
            else:
                preempted = True
        self._fill(self._at_boundary[(step + 1) % self.config.block_size_tokens], step)
        loaded = 0
        if not preempted:
            loaded = self._admit(budget, chunk_of)
        if not self._running:
            if self._waiting and not preempted:
                raise RuntimeError(f"prompt of {self._waiting[0].target} tokens does not fit in the KV cache")
            return  # all were preempted: the next step admits them again
        prefill = sum(tokens for _, tokens in chunk_of)
        context = self._context_tokens + sum(sequence.computed for sequence, _ in chunk_of)
        work_s = (
            context * timing.context_s_per_token
            + prefill / timing.prefill_tokens_per_s
            + loaded / timing.load_tokens_per_s
            + timing.prefill_step_s * bool(chunk_of)
        )
        end_s = start_s + timing.base_s + timing.decode_step_s * bool(decoding) + work_s
        self.steps = step + 1
        self.time_s = end_s
        self.busy_s += end_s - start_s
        self.prefill_tokens += prefill
        self.decode_tokens += decoding
        self._context_tokens += decoding
        self._add_work(start_s, work_s)
        self._finish(step)
        for sequence, _ in chunk_of:
            if sequence.computed == sequence.target:
                self._start_decode(sequence, step)
        self._publish(end_s)

    def _give_blocks(self, step: int) -> bool:
        """A new block for everyone at a boundary. Returns whether somebody had to be preempted for that."""
        preempted = False
        for sequence in list(self._at_boundary[step % self.config.block_size_tokens]):
            while sequence.running and not self.cache.free_blocks:
                self._preempt_last()
                preempted = True
            if sequence.running:
                sequence.blocks += self.cache.allocate(1)
        return preempted

    def _fill(self, filled: dict[EngineRequest, None], step: int) -> None:
        """These have a full block after this step."""
        blocks, keys = [], []
        for sequence in filled:
            computed = sequence.target + step - sequence.decode_from
            blocks.append(sequence.blocks[-1])
            keys.append(sequence.key(computed // self.config.block_size_tokens - 1))
        if keys:
            self.cache.store(blocks, keys)
            if self.host is not None:
                self.host.store(keys)

    def _continue(self, sequence: EngineRequest, budget: int, chunk_of: list[tuple[EngineRequest, int]]) -> bool:
        """The next chunk of the prompt that is half-way. Returns False if it was preempted."""
        tokens = min(sequence.target - sequence.computed, budget)
        needed = self._blocks_of(sequence.computed + tokens) - len(sequence.blocks)
        if needed > self.cache.free_blocks:
            self._preempt_last()
            return False
        self._compute(sequence, tokens, needed)
        chunk_of.append((sequence, tokens))
        self._prefilling = sequence if sequence.computed < sequence.target else None
        return True

    def _admit(self, budget: int, chunk_of: list[tuple[EngineRequest, int]]) -> int:
        """Take requests from the queue. Returns tokens that are loaded from the CPU tier."""
        size, cache, host = self.config.block_size_tokens, self.cache, self.host
        loaded = 0
        while self._waiting and self._retry and budget > 0 and self._prefilling is None:
            if len(self._running) >= self.config.max_num_seqs:
                self._retry = False  # until somebody ends
                break
            sequence = self._waiting[0]
            limit = (sequence.target - 1) // size
            keys = sequence.keys(limit)
            hits = cache.match(keys, limit)
            if self._blocks_of(sequence.target) - len(hits) + cache.idle_among(hits) > cache.free_blocks:
                self._retry = False
                break
            self._waiting.popleft()
            record = sequence.record
            self._waiting_tokens -= record.request.prompt_tokens
            cache.touch(hits)
            sequence.blocks = hits
            sequence.computed = len(hits) * size
            sequence.running = True
            self._running[sequence] = None
            from_host = host.match(keys, len(hits), limit) if host is not None else 0
            if host is not None and from_host:
                loaded_keys = keys[len(hits) : len(hits) + from_host]
                host.touch(loaded_keys)
                blocks = cache.allocate(from_host)
                cache.store(blocks, loaded_keys)
                sequence.blocks += blocks
                sequence.computed += from_host * size
                loaded += from_host * size
            if not record.preemptions:
                record.cached_tokens = sequence.computed
                record.loaded_tokens = from_host * size
            tokens = min(sequence.target - sequence.computed, budget)
            self._compute(sequence, tokens, self._blocks_of(sequence.computed + tokens) - len(sequence.blocks))
            chunk_of.append((sequence, tokens))
            budget -= tokens
            if sequence.computed < sequence.target:
                self._prefilling = sequence
        return loaded

    def _compute(self, sequence: EngineRequest, tokens: int, new_blocks: int) -> None:
        """Schedule the next tokens of a prompt, and cache the blocks that they fill."""
        size = self.config.block_size_tokens
        first = sequence.computed // size
        sequence.blocks += self.cache.allocate(new_blocks)
        sequence.computed += tokens
        full = sequence.computed // size
        if full > first:
            keys = sequence.keys(full)[first:full]
            self.cache.store(sequence.blocks[first:full], keys)
            if self.host is not None:
                self.host.store(keys)
            self._retry = True

    def _start_decode(self, sequence: EngineRequest, step: int) -> None:
        """The prompt is computed, and with it the next token known."""
        record, size = sequence.record, self.config.block_size_tokens
        sequence.answered += 1
        if record.first_token_s < 0:
            record.first_token_s = self.time_s
            self.outcomes.append(Outcome(self.time_s, What.FIRST_TOKEN, record))
        if sequence.answered >= record.request.output_tokens:
            self._end(sequence)
            return
        sequence.decode_from = step
        sequence.phase = (step + 1 - sequence.target) % size
        sequence.end_step = step + record.request.output_tokens - sequence.answered
        self._at_boundary[sequence.phase][sequence] = None
        self._ending.setdefault(sequence.end_step, []).append(sequence)
        self._context_tokens += sequence.target + 1

    def _finish(self, step: int) -> None:
        for sequence in self._ending.pop(step, ()):
            self._stop_decode(sequence, step)
            self._end(sequence)

    def _end(self, sequence: EngineRequest) -> None:
        sequence.running = False
        del self._running[sequence]
        self.cache.free(sequence.blocks)
        sequence.record.finished_s = self.time_s
        self.outcomes.append(Outcome(self.time_s, What.FINISHED, sequence.record))
        self._retry = True

    def _stop_decode(self, sequence: EngineRequest, last_step: int) -> None:
        del self._at_boundary[sequence.phase][sequence]
        self._context_tokens -= sequence.target + 1 + last_step - sequence.decode_from

    def _preempt_last(self) -> None:
        sequence, _ = self._running.popitem()
        last_step = self.steps - 1
        if sequence is self._prefilling:
            self._prefilling = None
        else:
            self._ending[sequence.end_step].remove(sequence)
            if not self._ending[sequence.end_step]:
                del self._ending[sequence.end_step]
            self._stop_decode(sequence, last_step)
            sequence.answered += last_step - sequence.decode_from
            sequence.target = sequence.record.request.prompt_tokens + sequence.answered
        sequence.running = False
        self.cache.free(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.record.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(sequence)
        self._waiting_tokens += sequence.record.request.prompt_tokens
        self._retry = True

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size_tokens)

    def _publish(self, time_s: float) -> None:
        if self.cache.events:
            self.log.append(LogEntry(time_s, GPU, self.cache.take_events()))
        if self.host is not None and self.host.events:
            self.log.append(LogEntry(time_s, CPU, self.host.take_events()))

    def _add_work(self, start_s: float, work_s: float) -> None:
        window = int(start_s / self.WINDOW_S)
        work = self.work_s
        if window >= len(work):
            work += [0.0] * (window + 1 - len(work))
        work[window] += work_s
