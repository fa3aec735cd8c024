/* check.c - the rules: of what a caller gives, of the books, and of the indexes.
 *
 * Each function answers the rule that is broken as a sentence, or NULL.
 */
#include <string.h>

/* --- what a caller gives --- */

static const char *geometry_fault(const odma_geometry *geometry) {
    uint32_t tokens = geometry->block_tokens;
    if (geometry->blocks < 1 || geometry->blocks > ODMA_MAX_BLOCKS) return "blocks: 1 to 16777216";
    if (tokens < 1 || tokens > 1024 || (tokens & (tokens - 1)) != 0)
        return "block_tokens: a power of two from 1 to 1024";
    if ((uint64_t)geometry->blocks * tokens > ODMA_MAX_TOKENS) return "blocks: at most 2^28 tokens";
    if (geometry->max_regions < 1 || geometry->max_regions > ODMA_MAX_REGIONS)
        return "max_regions: 1 to 65536";
    if (geometry->max_ops < 1 || geometry->max_ops > ODMA_MAX_OPS) return "max_ops: 1 to 4096";
    if (geometry->max_copies < 1 || geometry->max_copies > ODMA_MAX_COPIES)
        return "max_copies: 1 to 4096";
    if (geometry->model_length_tokens < 1 || geometry->model_length_tokens > ODMA_MAX_TOKENS)
        return "model_length_tokens: 1 to 2^28";
    uint32_t granule = geometry->granule_tokens;
    if (granule != 0 && (granule < ODMA_MIN_GRANULE_TOKENS || granule > ODMA_MAX_GRANULE_TOKENS ||
                         granule % tokens != 0))
        return "granule_tokens: 0, or a multiple of block_tokens from 64 to 512";
    return NULL;
}

static const char *engine_fault(const odma_engine *engine) {
    if (engine->moves < ODMA_MOVES_NONE || engine->moves > ODMA_MOVES_ANY)
        return "moves: one of odma_moves";
    if (engine->single_ordered_stream > 1 || engine->copies_may_overlap > 1 ||
        engine->reads_two_runs > 1)
        return "single_ordered_stream, copies_may_overlap, reads_two_runs: 0 or 1";
    if (engine->planes < 1) return "planes: at least 1";
    if (!(engine->descriptor_seconds >= 0 && engine->descriptor_seconds < 1e3) ||
        !(engine->token_seconds >= 0 && engine->token_seconds < 1e3))
        return "descriptor_seconds, token_seconds: 0 to 1,000";
    return NULL;
}

static odma_status tenants_check(const odma_policy *policy, char reason[ODMA_REASON_BYTES]) {
    if (policy->tenant_count > ODMA_TENANTS)
        return refuse(reason, ODMA_INVALID, "tenants: at most %u", (unsigned)ODMA_TENANTS);
    double sum = policy->safety_share;
    for (uint32_t i = 0; i < policy->tenant_count; i++) {
        const odma_tenant *tenant = &policy->tenants[i];
        const char *rule = NULL;
        if (tenant->name[0] == 0) rule = "name: 1 to 32 bytes";
        if (!is_padded_name(tenant->name)) rule = "name: ends with zero bytes only";
        for (uint32_t j = 0; j < i; j++)
            if (memcmp(tenant->name, policy->tenants[j].name, sizeof tenant->name) == 0)
                rule = "name: each tenant once";
        if (!within(tenant->maximum_share, 1e-9, 1))
            rule = "maximum_share: above 0, at most 1";
        else if (!within(tenant->guaranteed_share, 0, tenant->maximum_share))
            rule = "guaranteed_share: 0 to maximum_share";
        if (rule != NULL) return refuse(reason, ODMA_INVALID, "tenants[%u].%s", i, rule);
        sum += tenant->guaranteed_share;
    }
    if (policy->tenant_count > 0 && !(sum <= 1 + 1e-9))
        return refuse(reason, ODMA_INVALID,
                      "tenants: guaranteed shares and safety_share are at most 1 together");
    return ODMA_OK;
}

static const char *limits_fault(const odma_policy *policy) {
    if (policy->limit_count > ODMA_LIMITS) return "limits_tokens: at most 16";
    for (uint32_t i = 0; i < policy->limit_count; i++)
        if (policy->limits_tokens[i] <= (i == 0 ? 0 : policy->limits_tokens[i - 1]) ||
            policy->limits_tokens[i] > ODMA_MAX_TOKENS)
            return "limits_tokens: ascending, from at least 1 to at most 2^28";
    return NULL;
}

/* Whether a finished record keeps every rule but that of its name. */
static odma_status policy_check(const odma_policy *policy, char reason[ODMA_REASON_BYTES]) {
    const char *fault = limits_fault(policy);
    if (policy->start < ODMA_START_MAXIMUM || policy->start > ODMA_START_STEP)
        fault = "start: one of odma_start";
    if (policy->overflow < ODMA_OVERFLOW_PREEMPT || policy->overflow > ODMA_OVERFLOW_COMPACT)
        fault = "overflow: one of odma_overflow";
    if (policy->step_tokens < 1 || policy->step_tokens > (1U << 20))
        fault = "step_tokens: 1 to 2^20";
    if (!within(policy->overflow_risk, 0, 1)) fault = "overflow_risk: 0 to 1";
    if (!within(policy->safety_share, 0, 0.9)) fault = "safety_share: 0 to 0.9";
    if (policy->unsure_ratio != 0 && !within(policy->unsure_ratio, 1, 1e9))
        fault = "unsure_ratio: 0, or 1 to 10^9";
    if (!within(policy->growth, 1, 4)) fault = "growth: 1 to 4";
    if (!within(policy->tenant_share, 1e-9, 1)) fault = "tenant_share: above 0, at most 1";
    if (fault != NULL) return refuse(reason, ODMA_INVALID, "%s", fault);
    return tenants_check(policy, reason);
}

odma_status odma_policy_check(const odma_policy *policy, char reason[ODMA_REASON_BYTES]) {
    if (policy == NULL) return refuse(reason, ODMA_INVALID, "policy: missing");
    if (policy->name[0] == 0) return refuse(reason, ODMA_INVALID, "name: 1 to 32 bytes");
    return policy_check(policy, reason);
}

odma_status odma_geometry_check(const odma_geometry *geometry, char reason[ODMA_REASON_BYTES]) {
    const char *fault = geometry == NULL ? "geometry: missing" : geometry_fault(geometry);
    return fault == NULL ? ODMA_OK : refuse(reason, ODMA_INVALID, "%s", fault);
}

/* --- the books, each entry by itself --- */

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
    if (slot->state > (arena->granule_blocks > 0 ? ODMA_REGION_KEPT : ODMA_REGION_WAITING))
        return "a slot has an unknown state";
    if (arena->books->epoch == 0) return "a region is held though no epoch is running";
    if (slot->length < 1 || slot->length > arena->geometry.blocks ||
        slot->start > arena->geometry.blocks - slot->length)
        return "a region lies outside of the arena";
    if (slot->state == ODMA_REGION_LIVE)
        return slot->generation == 0 ? "a region has no handle" : region_fault(arena, i);
    if (slot->state == ODMA_REGION_KEPT)
        return slot->seq > arena->books->seq ? "a kept run is ahead of its pool" : NULL;
    if (slot->seq > arena->books->seq || slot->seq <= arena->books->completed_seq)
        return "a run waits for an impossible completion";
    return NULL;
}

static const char *mark_fault(const odma_arena *arena, uint32_t i) {
    const struct slot *slot = &arena->cells[i].slot;
    const struct mark *mark = &arena->marks[i];
    bool runs = slot->state == ODMA_REGION_LIVE || slot->state == ODMA_REGION_KEPT;
    if (!runs) return mark->generation == 0 && mark->given == 0 ? NULL : "a mark of no run";
    uint32_t most = slot->length / arena->granule_blocks;
    if (mark->generation > slot->generation || (mark->generation == 0 && mark->given > 0))
        return "a run begins with an impossible handle";
    if (mark->given > most || mark->reused > most) return "a run has keys for more than it holds";
    if (mark->keyed > mark->given) return "a key stands that was not given";
    if (slot->state == ODMA_REGION_KEPT && mark->keyed == 0) return "a run is kept for nothing";
    if (mark->last_use > arena->books->turns || mark->read_seq > arena->books->seq)
        return "the use of a run is impossible";
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

/* The rule that the books break, each entry looked at by itself, or NULL. `room` is for a
 * sentence that has to be written. */
static const char *books_fault(const odma_arena *arena, char room[ODMA_REASON_BYTES]) {
    const struct books *books = arena->books;
    if (books->epoch != 0 && books->epoch != books->last_epoch) return "the epoch is impossible";
    if (books->last_epoch >= MAX_WIRE || books->seq >= MAX_WIRE) return "a counter is too large";
    if (books->completed_seq > books->seq) return "more is completed than was answered";
    if (books->owner >= MAX_WIRE || books->number >= MAX_WIRE || books->refused > 1 ||
        (books->owner == 0 && books->number != 0))
        return "the fence is impossible";
    if (books->births > books->counters.allocates) return "more were born than allocated";
    if (books->class_count > ODMA_CLASSES) return "there are too many classes";
    if (books->description_bytes > ODMA_DESCRIPTION_BYTES) return "the description is too long";
    for (uint32_t i = 0; i < ODMA_TENANTS; i++)
        if (books->claims[i].turn > books->turns ||
            books->claims[i].blocks > arena->geometry.blocks)
            return "a claim is impossible";
    odma_engine engine = engine_of(arena);
    const char *fault = books->epoch == 0 ? NULL : engine_fault(&engine);
    if (fault == NULL && policy_check(&books->policy, room) != ODMA_OK) fault = room;
    for (uint32_t i = 0; i < STATS && fault == NULL; i++) fault = stats_fault(&books->stats[i]);
    for (uint32_t i = 0; i < arena->layout.table_size && fault == NULL; i++)
        fault = slot_fault(arena, i);
    if (arena->granule_blocks == 0) return fault;
    if (arena->reuse->reads_two_runs > 1) fault = "reads_two_runs is impossible";
    for (uint32_t i = 0; i < arena->layout.table_size && fault == NULL; i++)
        fault = mark_fault(arena, i);
    return fault;
}

/* --- the indexes --- */

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
    uint32_t at = 0, prev = NONE, live = 0, waiting = 0, kept = 0, free_runs = 0, free_blocks = 0;
    for (uint32_t id = arena->first_run; id != NONE; prev = id, id = arena->runs[id].next) {
        const char *fault = run_fault(arena, id, at, prev);
        if (fault != NULL) return fault;
        at += arena->runs[id].length;
        if (is_free_run(arena, id)) {
            free_runs++;
            free_blocks += arena->runs[id].length;
        } else if (is_live(arena, id)) {
            live++;
        } else if (is_kept(arena, id)) {
            kept++;
        } else {
            waiting++;
        }
    }
    if (at != arena->geometry.blocks || prev != arena->last_run) return "runs do not tile";
    if (live != arena->live || waiting != arena->waiting || kept != arena->kept || free_runs != arena->free_runs ||
        free_blocks != arena->free_blocks)
        return "the counts of runs are wrong";
    uint32_t held = 0;
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        held += arena->cells[i].slot.state != SLOT_FREE;
    return held == live + waiting + kept ? NULL : "a slot is held by no run";
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

/* The rule that the accounts break, or NULL. */
static const char *accounts_fault(odma_arena *arena) {
    uint64_t regions = 0, blocks = 0;
    if (!arena->limits) return NULL;
    for (uint32_t i = 0; i <= arena->accounts_mask; i++) {
        regions += arena->accounts[i].regions;
        blocks += arena->accounts[i].blocks;
    }
    if (regions != arena->live ||
        blocks != live_blocks(arena))
        return "the accounts of tenants are wrong";
    const char *fault = NULL;
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        if (is_live(arena, i)) debit_region(arena, i);
    for (uint32_t i = 0; i <= arena->accounts_mask; i++)
        if (arena->accounts[i].regions != 0 || arena->accounts[i].blocks != 0)
            fault = "the account of a tenant is wrong";
    count_accounts(arena);
    return fault;
}

/* Whether the keys of a slot's run are those that its mark tells, and found where they stand. */
static const char *run_keys_fault(const odma_arena *arena, uint32_t slot) {
    const struct mark *mark = &arena->marks[slot];
    uint32_t id = arena->holds[slot].top_key;
    for (uint32_t i = mark->given; i-- > 0; id = arena->links[id].below) {
        if (id == NONE) return "a run has lost a key";
        const struct key *key = &arena->keys[id];
        if (key->slot != slot || key->generation != mark->generation || key->index != i)
            return "a key is another run's";
        uint32_t at = *head_of(arena, key->bytes);
        while (at != NONE && at != id) at = arena->links[at].next;
        if ((at == id) != (i < mark->keyed)) return "a key stands that is not final, or does not";
    }
    return id == NONE ? NULL : "a run has a key too many";
}

/* The rule that keys and kept runs break, or NULL. */
static const char *keys_fault(const odma_arena *arena) {
    uint32_t given = 0, blocks = 0, granules = 0, spare = 0;
    if (arena->granule_blocks == 0) return NULL;
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        const char *fault = run_keys_fault(arena, i);
        if (fault != NULL) return fault;
        given += arena->marks[i].given;
        bool is = is_kept(arena, i) && used_until(arena, i) == 0;
        if (is != arena->holds[i].spare) return "a run is spare, or is not, against the rules";
        if (!is_kept(arena, i)) continue;
        blocks += arena->runs[i].length;
        granules += arena->marks[i].keyed;
        spare += is ? arena->runs[i].length : 0;
    }
    if (given + arena->spare_key_count != arena->layout.key_room) return "a key is lost";
    return blocks == arena->kept_blocks && granules == arena->kept_granules &&
                   spare == arena->spare_blocks
               ? NULL
               : "the counts of kept runs are wrong";
}
