/* change.c - the doors that write: each takes the lock, changes the books, and commits. */
#include <string.h>

/* Scale the bins whose weights have grown too large: a commit for each class,
 * none of which changes what anybody reads. */
static odma_status rescale(odma_arena *arena) {
    arena->rescale = false;
    for (uint32_t i = 0; i < STATS; i++) {
        struct stats *stats = &arena->books->stats[i];
        if (stats->increment <= LARGEST_INCREMENT) continue;
        for (uint32_t kind = 0; kind < 4; kind++)
            for (uint32_t bin = 0; bin < ODMA_BINS; bin++)
                stats->bins[kind][bin] /= stats->increment;
        stats->increment = 1;
        books_mark(arena, stats, offsetof(struct stats, ring));
        odma_status status = commit(arena);
        if (status != ODMA_OK) return status;
    }
    return ODMA_OK;
}

/* --- steps --- */

odma_status odma_arena_replay(odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (!batch_is_readable(arena, batch, answer)) {
        if (answer != NULL) breaks(answer, ODMA_RULE_COUNTS, 0);
        return leave(arena, ODMA_INVALID);
    }
    uint64_t fingerprint[2];
    look_through(arena, batch, fingerprint);
    return leave(arena, seek(arena, batch, fingerprint, answer));
}

odma_status odma_arena_apply(odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (!batch_is_readable(arena, batch, answer)) {
        if (answer != NULL) breaks(answer, ODMA_RULE_COUNTS, 0);
        return leave(arena, ODMA_INVALID);
    }
    uint64_t fingerprint[2];
    look_through(arena, batch, fingerprint);
    status = seek(arena, batch, fingerprint, answer);
    if (status != ODMA_NOT_FOUND) return leave(arena, status);
    if (arena->rescale && (status = rescale(arena)) != ODMA_OK) return leave(arena, status);

    uint32_t usual = arena->books->policy.max_copy_tokens;
    begin_batch(arena, NO_BATCH, gives_max_copy(batch) ? batch->max_copy_tokens : usual);
    status = batch_fault(arena, batch, answer);
    if (status != ODMA_OK) return leave(arena, status);
    arena->step.seq = batch->seq;
    run_batch(arena, batch);
    arena->step.seq = NO_BATCH;
    status = commit_batch(arena, batch->seq, fingerprint, batch->op_count);
    if (status == ODMA_OK) write_answer(arena, batch, answer);
    return leave(arena, status);
}

odma_status odma_arena_unary(odma_arena *arena, odma_caller caller, const odma_op *op,
                             odma_result *result) {
    if (op == NULL || result == NULL || op->kind < ODMA_OP_FREE || op->kind > ODMA_OP_ALLOCATE)
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if ((status = admit(arena, caller)) != ODMA_OK) return leave(arena, status);
    if (arena->rescale && (status = rescale(arena)) != ODMA_OK) return leave(arena, status);
    begin_batch(arena, NO_BATCH, 0);
    odma_result outcome;
    uint32_t hash = op->kind == ODMA_OP_ALLOCATE ? id_hash(op->request_id) : 0;
    arena->books->turns++;
    do_op(arena, op, hash, &outcome);
    if (changes(&outcome)) arena->books->turns += CHANGE_TURNS - 1;
    take_number(arena, caller.number, outcome.outcome == ODMA_REFUSED);
    books_mark(arena, arena->books, offsetof(struct books, policy));
    status = commit(arena);
    if (status == ODMA_OK) *result = outcome;
    return leave(arena, status);
}

/* What enqueued work has written is doubtful: keep nothing, and let nobody reuse it. */
static void void_keys(odma_arena *arena) {
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        if (is_live(arena, i)) void_mark(arena, i);
        if (!is_kept(arena, i)) continue;
        count_given_up(arena, i);
        leave_kept(arena, i);
        set_waiting(arena, i);
    }
}

odma_status odma_arena_reconcile(odma_arena *arena, odma_caller caller, uint64_t completed_seq,
                                 const uint64_t *handles, uint32_t count, odma_place *kept,
                                 uint64_t *freed, uint32_t *freed_count) {
    if ((handles == NULL && count > 0) || (kept == NULL && count > 0) || freed == NULL ||
        freed_count == NULL)
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    struct books *books = arena->books;
    if ((status = admit(arena, caller)) != ODMA_OK) return leave(arena, status);
    begin_batch(arena, NO_BATCH, 0);
    take_number(arena, caller.number, false);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t rule, slot = slot_of(arena, handles[i], &rule);
        if (slot != NONE) note_of(arena, slot)->listed = true;
    }
    *freed_count = 0;
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        if (!is_live(arena, i) || note_of(arena, i)->listed) continue;
        freed[(*freed_count)++] = handle_of(arena, i);
        drop_id(arena, i);
        debit_region(arena, i);
        arena->live--;
        set_waiting(arena, i);
        books->counters.frees++;
    }
    if (arena->granule_blocks > 0 && completed_seq != books->seq) void_keys(arena);
    books->completed_seq = books->seq;
    free_waiting_up_to(arena, books->seq);
    if (arena->granule_blocks > 0) refresh_tied(arena);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t rule, slot = slot_of(arena, handles[i], &rule);
        kept[i] = (odma_place){.handle = handles[i],
                               .start = slot == NONE ? 0 : arena->runs[slot].start,
                               .length = slot == NONE ? 0 : arena->runs[slot].length};
    }
    books_mark(arena, books, offsetof(struct books, policy));
    return leave(arena, commit(arena));
}

/* --- epochs and policies --- */

static void describe(odma_arena *arena, const void *description, uint32_t bytes) {
    struct books *books = arena->books;
    books->description_bytes = bytes;
    if (bytes > 0) memcpy(books->description, description, bytes);
    books_mark(arena, books, offsetof(struct books, policy));
    books_mark(arena, books->description, ODMA_DESCRIPTION_BYTES);
}

odma_status odma_arena_open_epoch(odma_arena *arena, uint64_t epoch, const odma_engine *engine,
                                  const char *boot_id, const void *description,
                                  uint32_t description_bytes) {
    if (engine == NULL || epoch >= MAX_WIRE || description_bytes > ODMA_DESCRIPTION_BYTES ||
        (description == NULL && description_bytes > 0))
        return ODMA_INVALID;
    odma_engine finished = finished_engine(*engine);
    if (engine_fault(&finished) != NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (finished.reads_two_runs == 1 && arena->geometry.granule_tokens == 0)
        return leave(arena, ODMA_INVALID);
    struct books *books = arena->books;
    if (epoch <= books->last_epoch) return leave(arena, ODMA_INVALID);
    status = draw_key(arena);
    if (status != ODMA_OK) return leave(arena, status);
    forget_books(arena);
    books->epoch = books->last_epoch = epoch;
    memcpy(&books->engine, &finished, sizeof books->engine);
    if (arena->granule_blocks > 0) {
        arena->reuse->reads_two_runs = finished.reads_two_runs;
        books_mark(arena, arena->reuse, sizeof *arena->reuse);
    }
    if (boot_id != NULL) pad_boot_id(books->boot_id, boot_id);
    describe(arena, description, description_bytes);
    return leave(arena, commit(arena));
}

odma_status odma_arena_describe(odma_arena *arena, uint64_t owner, const void *description,
                                uint32_t description_bytes) {
    if (owner >= MAX_WIRE || description_bytes > ODMA_DESCRIPTION_BYTES ||
        (description == NULL && description_bytes > 0))
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    struct books *books = arena->books;
    if (owner < books->owner || (owner > books->owner && books->epoch == 0))
        return leave(arena, ODMA_INVALID);
    if (owner > books->owner) {
        books->owner = owner;
        books->number = books->refused = 0;
    }
    describe(arena, description, description_bytes);
    return leave(arena, commit(arena));
}

odma_status odma_arena_spend(odma_arena *arena, odma_caller caller) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    status = admit(arena, caller);
    if (status == ODMA_LATE && caller.number == arena->books->number) status = ODMA_OK; /* spent */
    else if (status == ODMA_OK) take_number(arena, caller.number, true);
    if (status != ODMA_OK) return leave(arena, status);
    books_mark(arena, arena->books, offsetof(struct books, policy));
    return leave(arena, commit(arena));
}

odma_status odma_arena_end_epoch(odma_arena *arena, odma_caller caller) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (caller.owner == 0) caller.owner = arena->books->owner, caller.number = MAX_WIRE - 1;
    if ((status = admit(arena, caller)) != ODMA_OK) return leave(arena, status);
    forget_books(arena);
    return leave(arena, commit(arena));
}

odma_status odma_arena_set_policy(odma_arena *arena, const odma_caller *caller,
                                  odma_policy *policy, uint32_t expected_version) {
    if (policy == NULL) return ODMA_INVALID;
    odma_policy next = finished_policy(*policy);
    if (policy_check(&next, NULL) != ODMA_OK) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    struct books *books = arena->books;
    if (caller != NULL && (status = admit(arena, *caller)) != ODMA_OK) return leave(arena, status);
    if (expected_version != 0 && expected_version != books->policy.version)
        return leave(arena, ODMA_VERSION);
    if (caller != NULL) take_number(arena, caller->number, false);
    next.version = books->policy.version == UINT32_MAX ? 1 : books->policy.version + 1;
    if (memcmp(next.tenants, books->policy.tenants, sizeof next.tenants) != 0)
        memset(books->claims, 0, sizeof books->claims);
    books->policy = next;
    books_mark(arena, books, offsetof(struct books, class_names));
    count_accounts(arena);
    status = commit(arena);
    if (status == ODMA_OK) *policy = next;
    return leave(arena, status);
}
