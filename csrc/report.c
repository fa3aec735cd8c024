/* report.c - reading the books, and checking them. */
#include <math.h>
#include <string.h>

#include "arena.h"

const char *odma_status_name(odma_status status) {
    switch (status) {
        case ODMA_OK: return "ok";
        case ODMA_INVALID: return "invalid argument";
        case ODMA_EPOCH: return "the epoch is over";
        case ODMA_SEQ_CHANGED: return "the last seq with another body";
        case ODMA_SEQ_OLD: return "an old seq";
        case ODMA_SEQ_GAP: return "a seq beyond the next";
        case ODMA_VERSION: return "another policy version";
        case ODMA_NOT_FOUND: return "not found";
        case ODMA_EXISTS: return "exists already";
        case ODMA_LOCKED: return "open elsewhere";
        case ODMA_FOREIGN: return "not our file";
        case ODMA_MISMATCH: return "another layout or geometry";
        case ODMA_CORRUPT: return "corrupt";
        case ODMA_NO_SPACE: return "no space";
        case ODMA_IO: return "input/output error";
        case ODMA_BROKEN: return "the file changed under the arena";
        case ODMA_FORKED: return "attached by the parent process";
    }
    return "unknown status";
}

/* --- rules --- */

const char *engine_fault(const odma_engine *engine) {
    if (engine->moves < ODMA_MOVES_NONE || engine->moves > ODMA_MOVES_ANY)
        return "moves: one of odma_moves";
    if (engine->single_ordered_stream > 1 || engine->copies_may_overlap > 1)
        return "single_ordered_stream, copies_may_overlap: 0 or 1";
    if (engine->planes < 1) return "planes: at least 1";
    if (!(engine->descriptor_seconds >= 0 && engine->descriptor_seconds < 1e3) ||
        !(engine->token_seconds >= 0 && engine->token_seconds < 1e3))
        return "descriptor_seconds, token_seconds: 0 to 1,000";
    return NULL;
}

static const char *region_fault(const odma_arena *arena, uint32_t i) {
    const struct slot *slot = &arena->cells[i].slot;
    const struct request *request = &arena->cells[i].request;
    uint64_t capacity = (uint64_t)arena->geometry.blocks * arena->geometry.block_tokens;
    if (arena->request_ids[i][0] == 0) return "a region has no request id";
    if (request->max_total_tokens < 1 || request->max_total_tokens > capacity)
        return "a region's maximum is impossible";
    if (slot->length > blocks_of(arena, request->max_total_tokens))
        return "a region is longer than its maximum";
    if (request->class_index >= arena->books->class_count &&
        request->class_index != ODMA_CLASS_OTHER)
        return "a region's class does not exist";
    if (request->predicted > 1) return "a region's prediction is impossible";
    if (request->birth < 1 || request->birth > arena->books->births)
        return "a region's birth is impossible";
    if (slot->used_tokens > (uint64_t)slot->length * arena->geometry.block_tokens)
        return "a region has more used than it is long";
    if (slot->seq > arena->books->seq) return "a region is ahead of its pool";
    return NULL;
}

static const char *slot_fault(const odma_arena *arena, uint32_t i) {
    const struct slot *slot = &arena->cells[i].slot;
    if (slot->state == SLOT_FREE) return NULL;
    if (slot->state > ODMA_REGION_WAITING) return "a slot has an unknown state";
    if (arena->books->epoch == 0) return "a region is held though no epoch is running";
    if (slot->length < 1 || slot->length > arena->geometry.blocks ||
        slot->start > arena->geometry.blocks - slot->length)
        return "a region lies outside of the arena";
    if (slot->state == ODMA_REGION_LIVE)
        return slot->generation == 0 ? "a region has no handle" : region_fault(arena, i);
    if (slot->seq > arena->books->seq || slot->seq <= arena->books->completed_seq)
        return "a run waits for an impossible completion";
    return NULL;
}

static const char *stats_fault(const struct stats *stats) {
    if (!(stats->increment >= 0 && stats->increment < 1e300)) return "a weight is impossible";
    for (uint32_t kind = 0; kind < 4; kind++)
        for (uint32_t i = 0; i < ODMA_BINS; i++)
            if (!(stats->bins[kind][i] >= 0 && stats->bins[kind][i] < 1e300))
                return "a histogram bin is impossible";
    return NULL;
}

/* The rule that the books break, each entry looked at by itself, or NULL. */
const char *books_fault(const odma_arena *arena) {
    const struct books *books = arena->books;
    if (books->epoch != 0 && books->epoch != books->last_epoch) return "the epoch is impossible";
    if (books->last_epoch >= MAX_WIRE || books->seq >= MAX_WIRE) return "a counter is too large";
    if (books->completed_seq > books->seq) return "more is completed than was answered";
    if (books->births > books->counters.allocates) return "more were born than allocated";
    if (books->class_count > ODMA_CLASSES) return "there are too many classes";
    if (books->description_bytes > ODMA_DESCRIPTION_BYTES) return "the description is too long";
    for (uint32_t i = 0; i < ODMA_TENANTS; i++)
        if (books->claims[i].turn > books->turns || books->claims[i].blocks > arena->geometry.blocks)
            return "a claim is impossible";
    const char *fault = books->epoch == 0 ? NULL : engine_fault(&books->engine);
    if (fault == NULL) fault = policy_fault(&books->policy);
    for (uint32_t i = 0; i < STATS && fault == NULL; i++) fault = stats_fault(&books->stats[i]);
    for (uint32_t i = 0; i < arena->layout.table_size && fault == NULL; i++)
        fault = slot_fault(arena, i);
    return fault;
}

static const char *run_fault(const odma_arena *arena, uint32_t id, uint32_t start, uint32_t prev) {
    const struct run *run = &arena->runs[id];
    if (run->start != start || run->prev != prev || run->length == 0) return "runs do not tile";
    if (is_free_run(arena, id)) {
        if (is_free_run(arena, prev)) return "two neighbours are free";
        return NULL;
    }
    const struct slot *slot = &arena->cells[id].slot;
    if (slot->state == SLOT_FREE || slot->start != run->start || slot->length != run->length)
        return "a run and its slot disagree";
    const char *name = arena->request_ids[id];
    if (slot->state == ODMA_REGION_LIVE && find_id(arena, name, id_hash(name)) != id)
        return "a request id leads elsewhere";
    return NULL;
}

static const char *runs_fault(const odma_arena *arena) {
    uint32_t at = 0, prev = NONE, live = 0, waiting = 0, free_runs = 0, free_blocks = 0;
    for (uint32_t id = arena->first_run; id != NONE; prev = id, id = arena->runs[id].next) {
        const char *fault = run_fault(arena, id, at, prev);
        if (fault != NULL) return fault;
        at += arena->runs[id].length;
        if (is_free_run(arena, id)) {
            free_runs++;
            free_blocks += arena->runs[id].length;
        } else if (arena->cells[id].slot.state == ODMA_REGION_LIVE) {
            live++;
        } else {
            waiting++;
        }
    }
    if (at != arena->geometry.blocks || prev != arena->last_run) return "runs do not tile";
    if (live != arena->live || waiting != arena->waiting || free_runs != arena->free_runs ||
        free_blocks != arena->free_blocks)
        return "the counts of runs are wrong";
    uint32_t held = 0;
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        held += arena->cells[i].slot.state != SLOT_FREE;
    return held == live + waiting ? NULL : "a slot is held by no run";
}

static const char *bins_fault(const odma_arena *arena) {
    uint32_t found = 0;
    for (uint32_t bin = 0; bin < FREE_BINS; bin++) {
        bool bit = (arena->bin_bits[bin / 64] >> (bin % 64)) & 1;
        if (bit != (arena->bins[bin] != NONE)) return "a bin's bit is wrong";
        for (uint32_t id = arena->bins[bin]; id != NONE; id = arena->runs[id].bin_next) found++;
    }
    return found == arena->free_runs ? NULL : "a free run is in no bin";
}

odma_status odma_arena_check(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return refuse(reason, status, "%s", odma_status_name(status));
    const char *fault = NULL;
    if (memcmp(arena->map + arena->layout.books_offset, arena->books, arena->layout.books_bytes))
        fault = "the file and the memory disagree";
    if (fault == NULL) fault = books_fault(arena);
    if (fault == NULL) fault = runs_fault(arena);
    if (fault == NULL) fault = bins_fault(arena);
    if (fault == NULL) fault = accounts_fault(arena);
    if (fault != NULL) status = refuse(reason, ODMA_CORRUPT, "%s", fault);
    return leave(arena, status);
}

/* --- reading --- */

odma_status odma_arena_geometry(odma_arena *arena, odma_geometry *geometry) {
    if (geometry == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    *geometry = arena->geometry;
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_engine(odma_arena *arena, odma_engine *engine) {
    if (engine == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (arena->books->epoch == 0) return leave(arena, ODMA_EPOCH);
    *engine = arena->books->engine;
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_description(odma_arena *arena, void *description, uint32_t *bytes) {
    if (description == NULL || bytes == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    *bytes = arena->books->description_bytes;
    memcpy(description, arena->books->description, *bytes);
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_policy(odma_arena *arena, odma_policy *policy) {
    if (policy == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    *policy = arena->books->policy;
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_set_policy(odma_arena *arena, odma_policy *policy,
                                  uint32_t expected_version) {
    if (policy == NULL || policy_fault(policy) != NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    struct books *books = arena->books;
    if (expected_version != 0 && expected_version != books->policy.version)
        return leave(arena, ODMA_VERSION);
    odma_policy next = *policy;
    next.version = books->policy.version + 1;
    for (uint32_t i = next.limit_count; i < ODMA_LIMITS; i++) next.limits_tokens[i] = 0;
    for (uint32_t i = next.tenant_count; i < ODMA_TENANTS; i++) next.tenants[i] = (odma_tenant){0};
    if (memcmp(next.tenants, books->policy.tenants, sizeof next.tenants) != 0)
        memset(books->claims, 0, sizeof books->claims);
    books->policy = next;
    mark(arena, &books->policy, sizeof books->policy + sizeof books->claims);
    count_accounts(arena);
    status = commit(arena);
    if (status == ODMA_OK) policy->version = next.version;
    return leave(arena, status);
}

/* The batch that said how much is used. */
uint64_t last_batch(const struct books *books) {
    return books->seq > 0 ? books->seq : UINT64_MAX;
}

odma_status odma_arena_report(odma_arena *arena, odma_report *report) {
    if (report == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    const struct books *books = arena->books;
    *report = (odma_report){.epoch = books->epoch,
                            .last_epoch = books->last_epoch,
                            .seq = books->seq,
                            .completed_seq = books->completed_seq,
                            .live = arena->live,
                            .waiting = arena->waiting,
                            .free_runs = arena->free_runs,
                            .free_blocks = arena->free_blocks,
                            .waiting_blocks = arena->waiting_blocks,
                            .largest_run = largest_run(arena),
                            .safety_blocks = safety_blocks(arena),
                            .classes = books->class_count,
                            .rebooted = arena->rebooted,
                            .recovery = arena->recovery,
                            .counters = books->counters};
    report->reserved_blocks = arena->geometry.blocks - arena->free_blocks - arena->waiting_blocks;
    arena->batch_seq = last_batch(books); /* as it said */
    for (uint32_t id = arena->first_run; id != NONE; id = arena->runs[id].next)
        if (!is_free_run(arena, id) && arena->cells[id].slot.state == ODMA_REGION_LIVE)
            report->used_tokens += used_of(arena, id);
    arena->batch_seq = UINT64_MAX;
    return leave(arena, ODMA_OK);
}

static odma_region region_at(const odma_arena *arena, uint32_t id) {
    const struct slot *slot = &arena->cells[id].slot;
    odma_region region = {.state = slot->state, .start = slot->start, .length = slot->length};
    if (slot->state == ODMA_REGION_WAITING) {
        region.awaits_seq = slot->seq;
        return region;
    }
    const struct request *request = &arena->cells[id].request;
    region.handle = (uint64_t)slot->generation << SLOT_BITS | id;
    region.birth = request->birth;
    region.used_tokens = used_of(arena, id);
    region.prompt_tokens = request->prompt_tokens;
    region.generated_tokens = request->generated_tokens;
    region.max_total_tokens = request->max_total_tokens;
    region.class_index = request->class_index;
    memcpy(region.request_id, arena->request_ids[id], sizeof region.request_id);
    return region;
}

odma_status odma_arena_regions(odma_arena *arena, uint32_t from, odma_region *regions,
                               uint32_t room, uint32_t *count) {
    if (count == NULL || (regions == NULL && room > 0)) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    *count = 0;
    arena->batch_seq = last_batch(arena->books);
    for (uint32_t id = arena->first_run; id != NONE && *count < room; id = arena->runs[id].next)
        if (!is_free_run(arena, id) && arena->runs[id].start >= from)
            regions[(*count)++] = region_at(arena, id);
    arena->batch_seq = UINT64_MAX;
    return leave(arena, ODMA_OK);
}
