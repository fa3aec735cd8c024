/* batch.c - a batch: looked at as a whole, then done, one operation after the other.
 *
 * Everything is done to the process's copy of the books. A door commits it as one
 * record.
 */
#include <string.h>

static odma_status breaks(odma_answer *answer, uint32_t rule, uint32_t index) {
    answer->rule = rule;
    answer->rule_index = index;
    return ODMA_INVALID;
}

/* One pass over a batch: its fingerprint, the hashes of its allocates' request ids,
 * and memory asked for ahead. */
static void look_through(odma_arena *arena, const odma_batch *batch, uint64_t fingerprint[2]) {
    struct digest digest = digest_of(batch);
    struct foresight foresight = foresight_of(arena);
    for (uint32_t i = 0; i < batch->op_count; i++) {
        const odma_op *op = &batch->ops[i];
        if (op->kind == ODMA_OP_ALLOCATE) {
            arena->step.hashes[i] = id_hash(op->request_id);
            foresee_allocate(arena, &foresight, arena->step.hashes[i]);
        } else {
            foresee_other(arena, &foresight, op);
        }
        feed_op(&digest, op);
    }
    fingerprint[0] = mix(digest.low);
    fingerprint[1] = mix(digest.high);
}

static bool batch_is_readable(const odma_arena *arena, const odma_batch *batch,
                              const odma_answer *answer) {
    return batch != NULL && answer != NULL && answer->results != NULL && answer->copies != NULL &&
           answer->moved != NULL &&
           (answer->moved_reused != NULL || arena->granule_blocks == 0) && batch->used_count <= arena->geometry.max_regions &&
           batch->op_count <= arena->geometry.max_ops &&
           (batch->used != NULL || batch->used_count == 0) &&
           (batch->ops != NULL || batch->op_count == 0);
}

/* Look at all of a batch that is not one operation's own affair. */
static odma_status batch_fault(odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    const struct books *books = arena->books;
    if (batch->completed_seq < books->completed_seq || batch->completed_seq > books->seq)
        return breaks(answer, ODMA_RULE_COMPLETED_SEQ, 0);
    for (uint32_t i = 0; i < batch->used_count; i++) {
        uint32_t rule, slot = slot_of(arena, batch->used[i].handle, &rule);
        if (slot == NONE || note_of(arena, slot)->listed)
            return breaks(answer, ODMA_RULE_USED_HANDLE, i);
        note_of(arena, slot)->listed = true;
        if (batch->used[i].used_tokens > arena->runs[slot].length * arena->geometry.block_tokens)
            return breaks(answer, ODMA_RULE_USED_TOKENS, i);
        uint32_t most = arena->granule_blocks > 0 ? batch->used[i].used_tokens : 0;
        if (batch->used[i].shareable_tokens > most)
            return breaks(answer, ODMA_RULE_SHAREABLE_TOKENS, i);
    }
    uint64_t key_bytes = 0;
    for (uint32_t i = 0; i < batch->op_count; i++) {
        if (batch->ops[i].kind < ODMA_OP_FREE || batch->ops[i].kind > ODMA_OP_ALLOCATE)
            return breaks(answer, ODMA_RULE_KIND, i);
        key_bytes += batch->ops[i].key_bytes;
    }
    if (key_bytes > ODMA_MAX_BATCH_KEYS * ODMA_KEY_BYTES)
        return breaks(answer, ODMA_RULE_BATCH_KEYS, 0);
    return ODMA_OK;
}

/* Whether a message is its owner's next or last one: see odma_caller. */
static odma_status admit(const odma_arena *arena, odma_caller caller) {
    const struct books *books = arena->books;
    if (books->epoch == 0 || caller.epoch != books->epoch) return ODMA_EPOCH;
    if (caller.owner != books->owner) return caller.owner == 0 ? ODMA_UNFENCED : ODMA_FENCED;
    if (books->owner == 0) return ODMA_OK;
    if (caller.number < books->number || caller.number == 0 || caller.number >= MAX_WIRE)
        return ODMA_LATE;
    return caller.number == books->number && books->refused == 1 ? ODMA_LATE : ODMA_OK;
}

/* Note that an admitted message is done or refused. The door marks the head of the books. */
static void take_number(odma_arena *arena, uint64_t number, bool refused) {
    if (arena->books->owner == 0) return;
    arena->books->number = number;
    arena->books->refused = refused;
}

/* Whether a batch is the next one (ODMA_NOT_FOUND), the last one (ODMA_OK, with
 * its stored answer), or neither. */
static odma_status seek(odma_arena *arena, const odma_batch *batch, const uint64_t fingerprint[2],
                        odma_answer *answer) {
    const struct books *books = arena->books;
    odma_status status = admit(arena, (odma_caller){batch->epoch, batch->owner, batch->number});
    if (status != ODMA_OK) return status;
    if (batch->seq == books->seq + 1 && batch->seq < MAX_WIRE)
        return books->owner != 0 && batch->number == books->number ? ODMA_LATE : ODMA_NOT_FOUND;
    if (batch->seq == 0 || batch->seq < books->seq) return ODMA_SEQ_OLD;
    if (batch->seq > books->seq) return ODMA_SEQ_GAP;
    return stored_answer(arena, fingerprint, answer);
}

/* Forget all notes. */
static void next_tick(odma_arena *arena) {
    if (++arena->step.tick != 0) return;
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        arena->runs[i].note = (struct note){0};
        if (arena->granule_blocks > 0) arena->holds[i].gathered = 0;
    }
    arena->step.tick = 1;
}

static void begin_batch(odma_arena *arena, uint64_t seq, uint32_t copy_tokens) {
    struct step *step = &arena->step;
    next_tick(arena);
    step->seq = seq;
    step->safety_blocks = safety_blocks(arena);
    step->copy_tokens_left = copy_tokens;
    step->copy_count = step->place_count = step->moved_count = 0;
    step->moves = step->pins = step->held_up_count = 0;
    step->places_changed = step->ordered = step->stopped = false;
    step->gather_count = 0;
    step->first_steps = arena->steps;
    step->first_birth = arena->books->births;
}

static void take_used(odma_arena *arena, const odma_batch *batch) {
    for (uint32_t i = 0; i < batch->used_count; i++) {
        uint32_t rule, slot = slot_of(arena, batch->used[i].handle, &rule);
        arena->cells[slot].slot.used_tokens = batch->used[i].used_tokens;
        arena->cells[slot].slot.seq = batch->seq;
        mark_slot(arena, slot);
        note_of(arena, slot)->pinned = batch->used[i].pinned != 0;
        arena->step.pins += batch->used[i].pinned != 0;
        if (batch->used[i].shareable_tokens > 0)
            set_keyed(arena, slot, granules_in(arena, batch->used[i].shareable_tokens));
    }
}

/* A tenant's own maximum holds up only that tenant, and so does what is behind it. */
static bool stops_allocates(const odma_result *result) {
    return result->outcome == ODMA_REFUSED && result->reason != ODMA_REASON_INVALID &&
           result->reason != ODMA_REASON_NOT_FOUND && result->reason != ODMA_REASON_QUOTA &&
           result->reason != ODMA_REASON_SKIPPED;
}

static bool changes(const odma_result *result) {
    return result->outcome == ODMA_PLACED || result->outcome == ODMA_FREED;
}

/* Make every place final, and list what moved and has no place among them. */
static void finish_places(odma_arena *arena, uint32_t results) {
    struct step *step = &arena->step;
    if (step->moved_count == 0 && !step->places_changed) return;
    for (uint32_t i = 0; i < results; i++) {
        odma_result *result = &step->results[i];
        if (result->outcome != ODMA_PLACED) continue;
        uint32_t rule, slot = slot_of(arena, result->handle, &rule);
        result->start = slot == NONE ? 0 : arena->runs[slot].start;
        result->length = slot == NONE ? 0 : arena->runs[slot].length;
        result->reused_tokens = slot == NONE ? 0 : reused_of(arena, slot);
    }
    for (uint32_t i = 0; i < step->moved_count; i++) {
        uint32_t slot = step->moved[i].slot;
        struct note *note = note_of(arena, slot);
        if (!is_live(arena, slot) || !note->moved || note->placed ||
            step->moved[i].first_start == arena->runs[slot].start)
            continue;
        note->placed = true;
        if (arena->granule_blocks > 0)
            step->reused[step->place_count] =
                (odma_reused){.reused_tokens = reused_of(arena, slot)};
        step->places[step->place_count++] = (odma_place){.handle = handle_of(arena, slot),
                                                         .start = arena->runs[slot].start,
                                                         .length = arena->runs[slot].length};
    }
}

/* Do what is gathered. Where copies run in one order, its sources are free then. */
static void finish_gathers(odma_arena *arena) {
    settle_gathers(arena);
    if (arena->books->engine.single_ordered_stream) free_waiting_up_to(arena, arena->step.seq);
    refresh_tied(arena);
    books_mark(arena, arena->reuse, sizeof *arena->reuse);
}

static void run_batch(odma_arena *arena, const odma_batch *batch) {
    struct books *books = arena->books;
    books->seq = batch->seq;
    books->completed_seq = batch->completed_seq;
    take_number(arena, batch->number, false);
    books->turns++;
    uint32_t waited = coming_blocks(arena);
    arena->step.ordered = batch->pass_refused == 0;
    free_waiting_up_to(arena, batch->completed_seq);
    if (arena->tied_count > 0) refresh_tied(arena);
    take_used(arena, batch);
    bool changed = coming_blocks(arena) < waited, large = arena->live > CACHED_REGIONS;
    for (uint32_t i = 0; i < batch->op_count; i++) {
        const odma_op *op = &batch->ops[i];
        if (large && i + AHEAD < batch->op_count) fetch_around(arena, &batch->ops[i + AHEAD]);
        odma_result *result = &arena->step.results[i];
        do_op(arena, op, arena->step.hashes[i], result);
        arena->step.stopped |= stops_allocates(result) && op->kind >= ODMA_OP_EXTEND;
        changed |= changes(result);
    }
    if (arena->step.gather_count > 0) finish_gathers(arena);
    finish_places(arena, batch->op_count);
    if (changed || arena->step.place_count > 0) books->turns += CHANGE_TURNS - 1;
    books->counters.batches++;
    books_mark(arena, books, offsetof(struct books, policy));
}

static void write_answer(const odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    answer->seq = batch->seq;
    answer->replayed = 0;
    answer->policy_version = arena->books->policy.version;
    answer->result_count = batch->op_count;
    answer->copy_count = arena->step.copy_count;
    answer->moved_count = arena->step.place_count;
    memcpy(answer->results, arena->step.results, batch->op_count * sizeof(odma_result));
    memcpy(answer->copies, arena->step.copies, arena->step.copy_count * sizeof(odma_copy));
    memcpy(answer->moved, arena->step.places, arena->step.place_count * sizeof(odma_place));
    if (arena->granule_blocks > 0)
        memcpy(answer->moved_reused, arena->step.reused,
               arena->step.place_count * sizeof(odma_reused));
}
