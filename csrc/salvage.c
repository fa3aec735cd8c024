/* salvage.c - what damaged books still know, taken into fresh ones.
 *
 * The damaged file comes as bytes, so no look goes beyond them, wherever they
 * end. If the sum of its books is right they are as they were committed; if not,
 * each value has to look like what the library writes. That is no proof, and
 * the caller is told so. Regions are never taken over: a place that is wrong
 * would give one request the memory of another.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"

struct salvage {
    odma_arena *arena;
    struct remains remains;
    const struct books *old;
    odma_salvaged *parts;
    uint32_t count;
    uint64_t last_until; /* of all completions that are kept */
};

static odma_salvaged *tell(struct salvage *salvage, uint32_t part, uint32_t kept, uint32_t lost) {
    odma_salvaged *entry = &salvage->parts[salvage->count++];
    *entry = (odma_salvaged){.part = part, .kept = kept, .lost = lost};
    return entry;
}

static void __attribute__((format(printf, 2, 3))) because(odma_salvaged *entry, const char *format,
                                                          ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(entry->why, sizeof entry->why, format, arguments);
    va_end(arguments);
}

/* Whether the file went on so far. `from` points into the old books. */
static bool has(const struct salvage *salvage, const void *from, size_t bytes) {
    size_t at = (size_t)((const uint8_t *)from - (const uint8_t *)salvage->old);
    return at + bytes <= salvage->remains.books_bytes;
}

/* Whether zero bytes follow its first one, and nothing else. */
static bool is_padded(const char *name, size_t bytes) {
    bool ended = false;
    for (size_t i = 0; i < bytes; i++) {
        if (ended && name[i] != 0) return false;
        ended |= name[i] == 0;
    }
    return true;
}

static const char CUT_OFF[] = "the file ends before it";

/* --- the head --- */

static void take_description(struct salvage *salvage, const void *given, uint32_t bytes) {
    const struct books *old = salvage->old;
    struct books *books = salvage->arena->books;
    if (given == NULL && salvage->remains.proven &&
        old->description_bytes <= ODMA_DESCRIPTION_BYTES) {
        given = old->description;
        bytes = old->description_bytes;
    }
    odma_salvaged *entry = tell(salvage, ODMA_PART_DESCRIPTION, given != NULL, given == NULL);
    if (given == NULL) {
        because(entry, "nothing shows that it is whole");
        return;
    }
    books->description_bytes = bytes;
    if (bytes > 0) memcpy(books->description, given, bytes);
    mark(salvage->arena, books->description, sizeof books->description);
}

static const char *found_policy_fault(const struct salvage *salvage, const odma_policy *policy) {
    if (!has(salvage, policy, sizeof *policy)) return CUT_OFF;
    if (policy->name[0] == 0 || !is_padded(policy->name, sizeof policy->name))
        return "name: 1 to 32 bytes";
    return policy->version < 1 ? "version: from 1" : policy_fault(policy);
}

static void take_policy(struct salvage *salvage) {
    const char *fault = found_policy_fault(salvage, &salvage->old->policy);
    odma_salvaged *entry = tell(salvage, ODMA_PART_POLICY, fault == NULL, fault != NULL);
    if (fault == NULL)
        salvage->arena->books->policy = salvage->old->policy;
    else
        because(entry, "%s", fault);
}

static const char *counters_fault(const struct salvage *salvage, const odma_counters *counters) {
    if (!has(salvage, counters, sizeof *counters)) return CUT_OFF;
    uint64_t each[sizeof *counters / sizeof(uint64_t)];
    memcpy(each, counters, sizeof each);
    for (size_t i = 0; i < sizeof each / sizeof *each; i++)
        if (each[i] >= MAX_WIRE) return "one is too large";
    if (counters->frees > counters->allocates) return "more was freed than allocated";
    if (counters->finished + counters->hit_limit + counters->preempted > counters->frees)
        return "more has ended than was freed";
    return NULL;
}

/* Completions number the allocates that there had been: these go on from there. */
static void take_counters(struct salvage *salvage) {
    odma_counters *counters = &salvage->arena->books->counters;
    const char *fault = counters_fault(salvage, &salvage->old->counters);
    odma_salvaged *entry = tell(salvage, ODMA_PART_COUNTERS, fault == NULL, fault != NULL);
    if (fault == NULL)
        *counters = salvage->old->counters;
    else
        because(entry, "%s", fault);
    if (counters->allocates < salvage->last_until) counters->allocates = salvage->last_until;
}

static void take_epoch(struct salvage *salvage, uint64_t least_epoch) {
    const struct books *old = salvage->old;
    bool sound = has(salvage, old, offsetof(struct books, seq)) && old->last_epoch < MAX_WIRE &&
                 old->epoch <= old->last_epoch;
    uint64_t last = sound ? old->last_epoch : 0;
    odma_salvaged *entry = tell(salvage, ODMA_PART_EPOCH, sound, !sound);
    if (!sound) because(entry, "its number is impossible");
    if (!salvage->remains.proven && last < least_epoch) last = least_epoch;
    salvage->arena->books->last_epoch = last;
}

/* --- what was learnt --- */

static bool within(double value, double least, double most) {
    return value >= least && value <= most; /* false for NaN */
}

static bool ascend(const float quantiles[ODMA_QUANTILES]) {
    for (uint32_t i = 0; i < ODMA_QUANTILES; i++)
        if (!isfinite(quantiles[i]) || !(quantiles[i] >= (i == 0 ? 0 : quantiles[i - 1])))
            return false;
    return true;
}

/* Whether an entry of a ring can be what was written after one of `until`. */
static bool is_completion(const odma_completion *entry, uint64_t until, uint64_t allocates) {
    return (entry->quantiles[0] < 0 || ascend(entry->quantiles)) && ascend(entry->raw) &&
           within((double)entry->overflow_risk, 0, 1) && entry->prompt_tokens >= 1 &&
           entry->prompt_tokens <= (1U << 28) && entry->output_tokens <= MOST_OUTPUT_TOKENS &&
           entry->censored <= 1 && entry->issue >= 1 && entry->issue <= entry->until &&
           entry->until >= until && entry->until <= allocates;
}

/* Take over the completions of a ring that can be, oldest first; answer how many
 * there should have been. */
static uint32_t take_ring(struct salvage *salvage, const struct stats *old, struct stats *stats,
                          uint32_t *kept) {
    bool counted = counters_fault(salvage, &salvage->old->counters) == NULL;
    uint64_t allocates = counted ? salvage->old->counters.allocates : MAX_WIRE, until = 0;
    uint32_t count = (uint32_t)(old->completions < ODMA_RING ? old->completions : ODMA_RING);
    *kept = 0;
    for (uint32_t i = 0; i < count; i++) {
        const odma_completion *entry = &old->ring[(old->completions - count + i) % ODMA_RING];
        if (!is_completion(entry, until, allocates)) continue;
        until = entry->until;
        stats->ring[(*kept)++] = *entry;
    }
    if (until > salvage->last_until) salvage->last_until = until;
    return count;
}

/* What a histogram breaks. Every completion is counted once by its output and
 * once by its total; and with decay the weights of n of them have one sum. */
static const char *histogram_fault(const struct stats *stats) {
    double sums[4] = {0}, ever = (double)stats->completions, growth = decay_growth();
    if (stats->completions >= MAX_WIRE) return "it counts too many completions";
    if (!within(stats->increment, 1, 1e300)) return "its newest weight is impossible";
    for (uint32_t kind = 0; kind < 4; kind++)
        for (uint32_t i = 0; i < ODMA_BINS; i++) {
            if (!within(stats->bins[kind][i], 0, 1e300)) return "a bin is impossible";
            sums[kind] += stats->bins[kind][i];
        }
    double weight = sums[0] + sums[1], all = stats->increment / (growth - 1);
    for (uint32_t i = 0; i < 2; i++)
        if (fabs(sums[i] - sums[i + 2]) > 1e-9 * weight) return "outputs and totals disagree";
    if (!within(weight, all * (1 - pow(growth, -ever)) * (1 - 1e-6), all * (1 + 1e-6)))
        return "its weights do not add up";
    return NULL;
}

static odma_salvaged *tell_of(struct salvage *salvage, uint32_t part, uint32_t index,
                              const char name[ODMA_NAME_BYTES], uint32_t kept, uint32_t lost) {
    odma_salvaged *entry = tell(salvage, part, kept, lost);
    entry->class_index = index;
    if (name != NULL) memcpy(entry->name, name, sizeof entry->name);
    return entry;
}

/* The next completion's place in a ring follows from how many there have been, so
 * where some are gone those that are left are all that counts as having been. */
static void take_stats(struct salvage *salvage, const struct stats *old, uint32_t index,
                       const char *name) {
    struct stats *stats = &salvage->arena->books->stats[index];
    bool there = has(salvage, old, sizeof *old);
    if (there && old->completions == 0) return;
    uint32_t kept = 0, listed = there ? take_ring(salvage, old, stats, &kept) : 0;
    const char *fault = there ? histogram_fault(old) : CUT_OFF;
    if (fault == NULL && kept == 0) fault = "none of its completions is left";
    if (fault == NULL) {
        stats->increment = old->increment;
        memcpy(stats->bins, old->bins, sizeof stats->bins);
    } else if (kept > 0) {
        recount(salvage->arena, stats, kept);
    }
    stats->completions = kept;
    if (fault == NULL && kept == listed) {
        stats->completions = old->completions;
        memcpy(stats->ring, old->ring, sizeof stats->ring);
    }
    mark(salvage->arena, stats, sizeof *stats);

    odma_salvaged *entry =
        tell_of(salvage, ODMA_PART_HISTOGRAM, index, name, fault == NULL, fault != NULL);
    if (fault != NULL && kept > 0)
        because(entry, "%s; counted again from %u completions", fault, kept);
    else if (fault != NULL)
        because(entry, "%s", fault);
    if (listed == 0) return;
    entry = tell_of(salvage, ODMA_PART_COMPLETIONS, index, name, kept, listed - kept);
    if (kept < listed) because(entry, "some are impossible");
}

/* What the name of class `i` of the old books breaks. */
static const char *class_fault(const struct salvage *salvage, uint32_t i) {
    const char *name = salvage->old->class_names[i];
    if (!has(salvage, name, ODMA_NAME_BYTES)) return CUT_OFF;
    if (!is_padded(name, ODMA_NAME_BYTES)) return "its name is impossible";
    const struct books *books = salvage->arena->books;
    for (uint32_t k = 0; k < books->class_count; k++)
        if (memcmp(books->class_names[k], name, ODMA_NAME_BYTES) == 0)
            return "another class has its name";
    return NULL;
}

/* Whether the old books have a class `i`, by their count or by what it learnt. */
static bool had_class(const struct salvage *salvage, uint32_t i) {
    const struct books *old = salvage->old;
    if (!has(salvage, old, offsetof(struct books, pad))) return false;
    return i < ODMA_CLASSES && ((old->class_count <= ODMA_CLASSES && i < old->class_count) ||
                                old->stats[i].completions > 0);
}

/* Classes without regions may change their index. */
static odma_status take_classes(struct salvage *salvage) {
    struct books *books = salvage->arena->books;
    odma_status status = ODMA_OK;
    for (uint32_t i = 0; i < ODMA_CLASSES && status == ODMA_OK; i++) {
        if (!had_class(salvage, i)) continue;
        const char *name = salvage->old->class_names[i], *fault = class_fault(salvage, i);
        odma_salvaged *entry =
            tell_of(salvage, ODMA_PART_CLASS, books->class_count, name, fault == NULL, fault != NULL);
        if (fault != NULL) {
            because(entry, "%s: what it learnt is lost", fault);
            continue;
        }
        uint32_t index = books->class_count++;
        memcpy(books->class_names[index], name, ODMA_NAME_BYTES);
        mark(salvage->arena, books->class_names[index], ODMA_NAME_BYTES);
        take_stats(salvage, &salvage->old->stats[i], index, name);
        status = commit(salvage->arena);
    }
    return status;
}

/* Classes beyond the table and all of them together have no names. */
static odma_status take_learnt(struct salvage *salvage) {
    odma_status status = take_classes(salvage);
    const struct stats *old = salvage->old->stats;
    if (status == ODMA_OK) {
        take_stats(salvage, &old[ODMA_CLASS_POOL], ODMA_CLASS_POOL, NULL);
        status = commit(salvage->arena);
    }
    bool others = old[ODMA_CLASS_OTHER].completions > 0;
    if (status == ODMA_OK && others) {
        take_stats(salvage, &old[ODMA_CLASS_OTHER], ODMA_CLASS_OTHER, NULL);
        status = commit(salvage->arena);
    }
    return status;
}

/* --- all of it --- */

static void tell_of_regions(struct salvage *salvage) {
    const struct cell *cells = (const void *)(salvage->remains.books + sizeof(struct books));
    uint32_t held = 0;
    for (uint32_t i = 0; i < salvage->arena->layout.table_size; i++)
        held += has(salvage, &cells[i], sizeof cells[i]) && cells[i].slot.state == ODMA_REGION_LIVE;
    because(tell(salvage, ODMA_PART_REGIONS, 0, held), "places are never taken over");
}

static odma_status take_all(struct salvage *salvage, const void *description,
                            uint32_t description_bytes, uint64_t least_epoch) {
    odma_arena *arena = salvage->arena;
    take_epoch(salvage, least_epoch);
    take_description(salvage, description, description_bytes);
    take_policy(salvage);
    count_accounts(arena);
    mark(arena, arena->books, offsetof(struct books, class_names));
    odma_status status = commit(arena);
    if (status == ODMA_OK) status = take_learnt(salvage);
    take_counters(salvage);
    mark(arena, arena->books, offsetof(struct books, class_names));
    tell_of_regions(salvage);
    return status == ODMA_OK ? commit(arena) : status;
}

odma_status odma_arena_salvage(odma_arena *arena, const void *bytes, uint64_t size,
                               const void *description, uint32_t description_bytes,
                               uint64_t least_epoch, odma_salvaged *parts, uint32_t *count,
                               uint32_t *proven) {
    if (bytes == NULL || parts == NULL || count == NULL || proven == NULL ||
        least_epoch >= MAX_WIRE || description_bytes > ODMA_DESCRIPTION_BYTES)
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    struct salvage salvage = {.arena = arena, .parts = parts};
    if (arena->lsn != 1 || arena->books->last_epoch != 0) return leave(arena, ODMA_INVALID);
    status = take_remains(arena, bytes, size, &salvage.remains);
    if (status != ODMA_OK) return leave(arena, status);
    salvage.old = (const struct books *)(const void *)salvage.remains.books;
    status = take_all(&salvage, description, description_bytes, least_epoch);
    *count = salvage.count;
    *proven = salvage.remains.proven;
    free(salvage.remains.file);
    return leave(arena, status);
}
