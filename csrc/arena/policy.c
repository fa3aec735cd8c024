/* policy.c - how long a region is, and who is let in.
 *
 * The record is data: what it means is written here once, in C, because it has
 * to be decided under the lock together with the place.
 */
#include <math.h>
#include <stdlib.h>

/* Blocks that admission must leave free. Guarantees round down and this rounds
 * up, but never into what is guaranteed. */
static uint32_t safety_blocks(const odma_arena *arena) {
    const odma_policy *policy = &arena->books->policy;
    double share = ceil(policy->safety_share * arena->geometry.blocks);
    uint32_t left = arena->geometry.blocks;
    for (uint32_t i = 0; i < policy->tenant_count; i++)
        left -= share_of(arena, policy->tenants[i].guaranteed_share);
    return share < left ? (uint32_t)share : left;
}

/* Output tokens that are exceeded with probability `risk`: linear in the level,
 * in the logarithm of 1 + tokens. Between the last quantile and certainty it
 * goes on to `most`; below the first quantile it stays there. */
static double output_at(const float quantiles[ODMA_QUANTILES], double risk, double most) {
    double level = 1 - risk;
    double from = 0, low = quantiles[0];
    for (uint32_t i = 0; i < ODMA_QUANTILES; i++) {
        if (level <= LEVELS[i]) {
            if (i == 0) return quantiles[0];
            double part = (level - from) / (LEVELS[i] - from);
            return expm1(log1p(low) + part * (log1p((double)quantiles[i]) - log1p(low)));
        }
        from = LEVELS[i];
        low = quantiles[i];
    }
    if (low >= most) return most;
    return expm1(log1p(low) + (level - from) / (1 - from) * (log1p(most) - log1p(low)));
}

/* Limit, else multiple of the step, never above the maximum; in blocks. */
static inline uint32_t rounded(const odma_arena *arena, double start, uint32_t max_total) {
    const odma_policy *policy = &arena->books->policy;
    if (start >= max_total) return blocks_of(arena, max_total);
    uint64_t tokens = (uint64_t)ceil(start);
    uint32_t i = 0;
    while (i < policy->limit_count && policy->limits_tokens[i] < tokens) i++;
    if (i < policy->limit_count)
        tokens = policy->limits_tokens[i];
    else
        tokens = (tokens + policy->step_tokens - 1) / policy->step_tokens * policy->step_tokens;
    return blocks_of(arena, tokens < max_total ? (uint32_t)tokens : max_total);
}

/* The probability of outgrowing its first region that a request accepts. */
static double accepted_risk(const odma_arena *arena, const odma_op *op) {
    return gives_risk(op) ? (double)(float)op->overflow_risk : arena->books->policy.overflow_risk;
}

/* Blocks of a new region. */
static uint32_t first_blocks(const odma_arena *arena, const odma_op *op, uint32_t max_total) {
    const odma_policy *policy = &arena->books->policy;
    double held = (double)op->prompt_tokens + op->generated_tokens;
    double start = max_total;
    if (policy->start == ODMA_START_STEP) {
        start = held + policy->step_tokens;
    } else if (policy->start == ODMA_START_QUANTILE && gives_quantiles(op)) {
        start = op->prompt_tokens + output_at(op->quantiles, accepted_risk(arena, op),
                                              (double)max_total - op->prompt_tokens);
        if (start < held + 1) start = held + 1;
    }
    if (op->generated_tokens > 0 && start < held * policy->growth) start = held * policy->growth;
    return rounded(arena, start, max_total);
}

/* Blocks that a request cannot do without to be let in: those of its maximum if
 * regions begin with that, else those of one more token. */
static uint32_t least_blocks(const odma_arena *arena, const odma_op *op, uint32_t max_total) {
    uint32_t held = op->prompt_tokens + op->generated_tokens;
    bool whole = arena->books->policy.start == ODMA_START_MAXIMUM && op->generated_tokens == 0;
    return blocks_of(arena, whole || held == max_total ? max_total : held + 1);
}

/* Blocks that a live region which has to hold `least` tokens should grow to. */
static uint32_t growth_blocks(const odma_arena *arena, uint32_t slot, uint32_t least,
                              uint32_t want) {
    uint32_t max_total = arena->cells[slot].request.max_total_tokens;
    uint32_t most = blocks_of(arena, max_total);
    if (want != 0) return blocks_of(arena, want) < most ? blocks_of(arena, want) : most;
    uint32_t blocks = rounded(arena, least * arena->books->policy.growth, max_total);
    return blocks > blocks_of(arena, least) ? blocks : blocks_of(arena, least);
}

/* Whether these are finite, at least 0 and ascending. */
static inline bool are_quantiles(const float quantiles[ODMA_QUANTILES]) {
    if (!are_set(quantiles)) return true;
    bool ascend = quantiles[0] >= 0 && isfinite(quantiles[ODMA_QUANTILES - 1]);
    for (uint32_t i = 1; i < ODMA_QUANTILES; i++)
        ascend &= quantiles[i] >= quantiles[i - 1]; /* false for NaN */
    return ascend;
}

/* Whether a prediction is so wide that its request may use the safety pool. */
static bool is_unsure(const odma_arena *arena, const odma_op *op) {
    double ratio = arena->books->policy.unsure_ratio;
    if (ratio == 0 || !gives_quantiles(op)) return false;
    double median = op->quantiles[2] > 1 ? (double)op->quantiles[2] : 1;
    return op->quantiles[5] / median > ratio;
}
