/* defaults.c - what a caller means by a field that is 0, in one place.
 *
 * A record of the books is finished: nothing in it is unset.
 */
#include <string.h>

static void set_if_unset(uint32_t *field, uint32_t value) {
    if (*field == 0) *field = value;
}

static odma_geometry finished_geometry(odma_geometry geometry) {
    geometry.pad = 0;
    set_if_unset(&geometry.block_tokens, 16);
    set_if_unset(&geometry.max_regions, 1024);
    set_if_unset(&geometry.max_ops, 1024);
    set_if_unset(&geometry.max_copies, 1024);
    uint64_t capacity = (uint64_t)geometry.blocks * geometry.block_tokens;
    set_if_unset(&geometry.model_length_tokens,
                 capacity < ODMA_MAX_TOKENS ? (uint32_t)capacity : ODMA_MAX_TOKENS);
    return geometry;
}

/* The engine of the running epoch, as it was given. */
static odma_engine engine_of(const odma_arena *arena) {
    odma_engine engine = {0};
    memcpy(&engine, &arena->books->engine, sizeof arena->books->engine);
    if (arena->granule_blocks > 0) engine.reads_two_runs = arena->reuse->reads_two_runs;
    return engine;
}

static odma_engine finished_engine(odma_engine engine) {
    set_if_unset(&engine.moves, ODMA_MOVES_NONE);
    set_if_unset(&engine.planes, 1);
    return engine;
}

/* A share or a factor, of which 0 is none. */
static double one_if_unset(double value) { return value == 0 ? 1 : value; }

static odma_policy finished_policy(odma_policy policy) {
    if (policy.name[0] == 0) memcpy(policy.name, "static", sizeof "static");
    set_if_unset(&policy.start, ODMA_START_MAXIMUM);
    set_if_unset(&policy.overflow, ODMA_OVERFLOW_PREEMPT);
    set_if_unset(&policy.step_tokens, 64);
    policy.growth = one_if_unset(policy.growth);
    policy.tenant_share = one_if_unset(policy.tenant_share);
    for (uint32_t i = 0; i < policy.tenant_count && i < ODMA_TENANTS; i++)
        policy.tenants[i].maximum_share = one_if_unset(policy.tenants[i].maximum_share);
    for (uint32_t i = policy.limit_count; i < ODMA_LIMITS; i++) policy.limits_tokens[i] = 0;
    for (uint32_t i = policy.tenant_count; i < ODMA_TENANTS; i++)
        policy.tenants[i] = (odma_tenant){0};
    return policy;
}

/* --- operations and batches --- */

static bool gives_max_total(const odma_op *op) {
    return op->max_total_tokens != 0 || (op->given & ODMA_GIVEN_MAX_TOTAL) != 0;
}

static bool gives_risk(const odma_op *op) {
    return op->overflow_risk != 0 || (op->given & ODMA_GIVEN_RISK) != 0;
}

/* Looked at as whole words, for most operations bring none. */
_Static_assert(ODMA_QUANTILES == 7, "three words and a half");
static bool are_set(const float quantiles[ODMA_QUANTILES]) {
    uint64_t words[ODMA_QUANTILES / 2];
    uint32_t last;
    memcpy(words, quantiles, sizeof words);
    memcpy(&last, quantiles + ODMA_QUANTILES - 1, sizeof last);
    return (words[0] | words[1] | words[2] | last) != 0;
}

static bool gives_quantiles(const odma_op *op) {
    return (op->given & ODMA_GIVEN_QUANTILES) != 0 || are_set(op->quantiles);
}

static bool gives_text(const odma_op *op) {
    return op->text_digest[0] != 0 || op->text_digest[1] != 0;
}

static bool gives_max_copy(const odma_batch *batch) {
    return batch->max_copy_tokens != 0 || (batch->given & ODMA_GIVEN_MAX_COPY) != 0;
}
