"""The replay's loop, too simple to be wrong: one step at a time, and admission tried in each."""

from __future__ import annotations

from odma_service.replay.loop import ADMISSIONS, MOST_PASSED, History, Sums
from odma_service.replay.memory import Asked, Ended, Run, Step
from odma_service.values import End


def serve_plainly(load, memory, prices, *, batch_cap=256, closed=True, overtake=0):
    """Serve a load step by step; the History has no decisions and no window."""
    closed = closed and not load.after
    waits = list(load.after) or [-1] * len(load)
    arrivals = [0 if closed else round(s * 10**12) for s in load.arrivals_seconds]
    history = History([-1] * len(load), [-1] * len(load), [-1] * len(load))
    queue, running, ended, stalled, generated = [], [], [], [], {}
    to_come = set(range(len(load)))
    now = tokens = written_ps = reserved_ps = copy_ps = prefill_ps = running_ps = 0
    births = passed = unread = 0

    def written(run):
        return run.lead

    while to_come or queue or running:
        known = sorted((arrivals[n], n) for n in to_come if waits[n] < 0)
        if not queue and not running:
            now = max(now, known[0][0])
        for at, number in known:
            if at <= now:
                queue.append(number)
                to_come.remove(number)
                history.arrived_ps[number] = -1 if closed else at
        deep = max(ADMISSIONS, 1 + overtake) if passed < MOST_PASSED else 1
        full = [r for r in running if written(r) == r.room]
        asked = [
            Asked(number, load.requests[number], generated.get(number, 0))
            for number in queue[: min(deep, batch_cap - len(running))]
        ]
        step_copies = step_prefill = 0
        fresh = []
        if ended or full or asked:
            step = Step(
                history.steps, 0, ended, full, asked, {r.birth: r for r in running}, overtake > 0
            )
            decision = memory.decide(step)
            ended, stalled, unread = [], list(decision.stalled), decision.unread_tokens
            for run in sorted(decision.victims, key=lambda r: -r.birth):
                running.remove(run)
                generated[run.number] = written(run) - run.request.prompt_tokens
                ended.append(Ended(run, End.PREEMPTED, generated[run.number]))
                queue.insert(0, run.number)
                history.preempted.append(run.number)
                if prices.swapped_token_ps:
                    step_copies += written(run) * prices.swapped_token_ps
                else:
                    history.recomputed_tokens += written(run)
                stalled = [r for r in stalled if r is not run]
            for placed, entry in zip(decision.placed, asked, strict=False):
                if placed is None:
                    continue
                births += 1
                run = Run(entry.number, entry.request, births)
                run.handle, run.room, reused = placed
                run.lead = entry.request.prompt_tokens + entry.generated_tokens
                running.append(run)
                passed = 0 if queue[0] == entry.number else passed + 1
                queue.remove(entry.number)
                fresh.append(run)
                if prices.swapped_token_ps and entry.number in generated:
                    step_copies += run.lead * prices.swapped_token_ps
                else:
                    step_prefill += prices.prefill_ps(run.lead) - prices.prefill_ps(reused)
                    history.prompt_tokens += run.lead
                    history.reused_tokens += reused
            step_copies += prices.copies_ps(decision.copies, decision.copied_tokens)
            history.copies += decision.copies
            history.copied_tokens += decision.copied_tokens
        if history.emptied is None and not queue and not to_come:
            history.emptied = len(history.finished)
        decoding = [r for r in running if r not in stalled]
        held = sum(written(r) for r in decoding)
        decode = max(
            prices.weights_ps + prices.kv_token_ps * (held - unread),
            prices.token_ps * len(decoding) + prices.pair_ps * held,
        )
        ps = decode + step_prefill + step_copies
        now += ps
        tokens += len(decoding)
        written_ps += sum(written(r) for r in running) * ps
        reserved_ps += sum(r.room for r in running) * ps
        copy_ps += step_copies
        prefill_ps += step_prefill
        running_ps += len(decoding) * ps
        history.steps += 1
        for run in decoding:
            run.lead += 1
        for run in fresh:
            if history.first_ps[run.number] < 0:
                history.first_ps[run.number] = now
        for run in [r for r in running if written(r) == r.request.total_tokens]:
            running.remove(run)
            end = End.HIT_LIMIT if run.request.limited else End.FINISHED
            ended.append(Ended(run, end, run.request.output_tokens))
            history.finished.append(run.number)
            history.finished_ps[run.number] = now
            for number, after in enumerate(waits):
                if after == run.number:
                    waits[number] = -1
                    arrivals[number] = now + round(load.gaps_seconds[number] * 10**12)
            history.sums.append(
                Sums(now, tokens, written_ps, reserved_ps, copy_ps, prefill_ps, running_ps)
            )
    return history
