/* read.c - the doors that read. */
#include <string.h>

odma_status odma_arena_plan_steps(odma_arena *arena, uint64_t *steps) {
    if (steps == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    *steps = arena->steps - arena->step.first_steps;
    return leave(arena, ODMA_OK);
}

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
    *engine = engine_of(arena);
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

static odma_reuse reuse_report(const odma_arena *arena) {
    const struct reuse *reuse = arena->reuse;
    uint64_t granules = arena->kept_granules;
    return (odma_reuse){.kept_runs = arena->kept,
                        .kept_tokens = granules * arena->geometry.granule_tokens,
                        .prompt_tokens = reuse->prompt_tokens,
                        .adopted_tokens = reuse->adopted_tokens,
                        .gathered_tokens = reuse->gathered_tokens,
                        .shared_tokens = reuse->shared_tokens,
                        .given_up_tokens = reuse->given_up_tokens};
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
                            .owner = books->owner,
                            .number = books->number,
                            .live = arena->live,
                            .waiting = arena->waiting,
                            .free_runs = arena->free_runs,
                            .free_blocks = room_blocks(arena),
                            .waiting_blocks = coming_blocks(arena),
                            .largest_run = largest_room(arena),
                            .safety_blocks = safety_blocks(arena),
                            .classes = books->class_count,
                            .rebooted = arena->rebooted,
                            .recovery = arena->recovery,
                            .counters = books->counters};
    report->reserved_blocks = live_blocks(arena);
    if (arena->granule_blocks > 0) report->reuse = reuse_report(arena);
    for (uint32_t id = first_live(arena); id != NONE; id = next_live(arena, id))
        report->used_tokens += used_at(arena, id, last_batch(books));
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_tenants(odma_arena *arena, odma_tenant_use *uses, uint32_t *count) {
    if (uses == NULL || count == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    const odma_policy *policy = &arena->books->policy;
    *count = policy->tenant_count;
    for (uint32_t i = 0; i < policy->tenant_count; i++) {
        const struct account *account = &arena->accounts[arena->named[i]];
        struct standing tenant = stands(arena, account);
        uses[i] = (odma_tenant_use){.regions = account->regions,
                                    .held = tenant.held,
                                    .guaranteed = tenant.guaranteed,
                                    .maximum = tenant.maximum,
                                    .claimed = claimed(arena, i)};
        memcpy(uses[i].name, policy->tenants[i].name, sizeof uses[i].name);
    }
    return leave(arena, ODMA_OK);
}

static odma_region region_at(const odma_arena *arena, uint32_t id) {
    const struct slot *slot = &arena->cells[id].slot;
    odma_region region = {.state = slot->state, .start = slot->start, .length = slot->length};
    if (arena->granule_blocks > 0)
        region.shareable_tokens = arena->marks[id].keyed * arena->geometry.granule_tokens;
    if (slot->state != ODMA_REGION_LIVE) {
        region.awaits_seq = slot->state == ODMA_REGION_KEPT ? used_until(arena, id) : slot->seq;
        return region;
    }
    const struct request *request = &arena->cells[id].request;
    region.handle = handle_of(arena, id);
    region.birth = request->birth;
    region.used_tokens = used_at(arena, id, last_batch(arena->books));
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
    for (uint32_t id = arena->first_run; id != NONE && *count < room; id = arena->runs[id].next)
        if (!is_free_run(arena, id) && arena->runs[id].start >= from)
            regions[(*count)++] = region_at(arena, id);
    return leave(arena, ODMA_OK);
}

/* Whether the file has the books as memory has them. It is read, not looked at through the map:
 * where it cannot be, that is a status and no signal. */
static odma_status compare_file(const odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    uint8_t part[16 * 1024];
    const uint8_t *books = (const uint8_t *)arena->books;
    uint64_t end = arena->layout.books_bytes;
    for (uint64_t at = 0; at < end; at += sizeof part) {
        uint64_t bytes = end - at < sizeof part ? end - at : sizeof part;
        odma_status status = read_at(arena, part, bytes, arena->layout.books_offset + at, reason);
        if (status != ODMA_OK) return status;
        if (memcmp(part, books + at, bytes) != 0)
            return refuse(reason, ODMA_CORRUPT, "the file and the memory disagree");
    }
    return ODMA_OK;
}

odma_status odma_arena_check(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return refuse(reason, status, "%s", odma_status_name(status));
    status = compare_file(arena, reason);
    if (status != ODMA_OK) return leave(arena, status);
    char room[ODMA_REASON_BYTES];
    const char *fault = books_fault(arena, room);
    if (fault == NULL) fault = runs_fault(arena);
    if (fault == NULL) fault = bins_fault(arena);
    if (fault == NULL) fault = accounts_fault(arena);
    if (fault == NULL) fault = keys_fault(arena);
    if (fault != NULL) status = refuse(reason, ODMA_CORRUPT, "%s", fault);
    return leave(arena, status);
}

/* --- what was learnt --- */

odma_status odma_arena_class(odma_arena *arena, uint32_t index, char name[ODMA_NAME_BYTES]) {
    if (name == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (index >= arena->books->class_count) return leave(arena, ODMA_NOT_FOUND);
    memcpy(name, arena->books->class_names[index], ODMA_NAME_BYTES);
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_class_index(odma_arena *arena, const char name[ODMA_NAME_BYTES],
                                   uint32_t *index) {
    if (name == NULL || index == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    uint32_t found = class_of(arena, name);
    *index = found == NONE ? (uint32_t)ODMA_CLASS_POOL : found;
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_bins(odma_arena *arena, uint32_t upper_tokens[ODMA_BINS]) {
    if (upper_tokens == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    memcpy(upper_tokens, arena->bin_upper, sizeof arena->bin_upper);
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_histogram(odma_arena *arena, uint32_t class_index,
                                 odma_histogram *histogram) {
    if (class_index >= STATS || histogram == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    const struct stats *stats = &arena->books->stats[class_index];
    double *into[4] = {histogram->output_finished, histogram->output_censored,
                       histogram->total_finished, histogram->total_censored};
    double newest = stats->increment / decay_growth();
    for (uint32_t kind = 0; kind < 4; kind++)
        for (uint32_t i = 0; i < ODMA_BINS; i++)
            into[kind][i] = stats->completions == 0 ? 0 : stats->bins[kind][i] / newest;
    histogram->completions = stats->completions;
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_quantiles(odma_arena *arena, uint32_t class_index, uint32_t more_than,
                                 float quantiles[ODMA_QUANTILES], double *weight) {
    if (class_index >= STATS || quantiles == NULL || weight == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    const struct stats *stats = known_stats(arena, class_index);
    bool known = stats != NULL && survival_quantiles(arena, stats, more_than, quantiles, weight);
    return leave(arena, known ? ODMA_OK : ODMA_NOT_FOUND);
}

odma_status odma_arena_completions(odma_arena *arena, uint32_t class_index,
                                   odma_completion *completions, uint32_t *count,
                                   uint64_t *ever) {
    if (class_index >= STATS || completions == NULL || count == NULL || ever == NULL)
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    const struct stats *stats = &arena->books->stats[class_index];
    uint64_t completed = *ever = stats->completions;
    *count = (uint32_t)(completed < ODMA_RING ? completed : ODMA_RING);
    for (uint32_t i = 0; i < *count; i++)
        completions[i] = stats->ring[(completed - *count + i) % ODMA_RING];
    return leave(arena, ODMA_OK);
}

odma_status odma_arena_running(odma_arena *arena, uint32_t class_index, odma_completion *running,
                               uint32_t room, uint32_t *count) {
    if (class_index >= STATS || running == NULL || count == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    *count = 0;
    for (uint32_t id = first_live(arena); id != NONE && *count < room; id = next_live(arena, id)) {
        const struct slot *slot = &arena->cells[id].slot;
        const struct request *request = &arena->cells[id].request;
        if (class_index != ODMA_CLASS_POOL && class_index != request->class_index) continue;
        uint32_t generated = request->generated_tokens;
        bool told = slot->seq == last_batch(arena->books);
        if (told && slot->used_tokens > request->prompt_tokens + generated)
            generated = slot->used_tokens - request->prompt_tokens;
        running[(*count)++] = completion_of(arena, id, generated, true);
    }
    return leave(arena, ODMA_OK);
}
