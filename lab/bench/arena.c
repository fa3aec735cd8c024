/* arena.c - what the library costs, in its own process and without Python.
 *
 *     arena mix PATH BLOCKS SHARE BATCH COMPACT STEPS SEED
 *         Nanoseconds of a reserve or a free, beside malloc on the same steps.
 *         BATCH 0: each operation alone. COMPACT 1: regions may be slid.
 *     arena plans PATH BLOCKS SHARE STEPS SEED
 *         Microseconds of a batch of one operation, of those that had to copy.
 *     arena attach PATH REGIONS REPEATS
 *         Milliseconds to attach and check a file, its pages in the cache.
 *     arena worst PATH WAITING OPERATIONS REPEATS
 *         Milliseconds of the batch that plans longest: OPERATIONS allocates, a block longer
 *         than the longest hole, beside WAITING runs that wait between pinned regions.
 *     arena keys PATH SOURCES KEYS REPEATS
 *         Nanoseconds a key of 8 allocates that bring KEYS keys each, beside the same without:
 *         all found, in one of SOURCES live regions; and none found.
 *
 * PATH is a file to be made, and removed again. Prints one JSON object.
 *
 * The mix: a block is 16 tokens; a request is a log-normal prompt (5.6, 1.0;
 * 8 to 4,096) and answer (5.2, 0.9; 4 to 2,048). The memory is filled to
 * SHARE, then a request comes whenever it fits under it and a random one goes
 * whenever it does not; never one of the same batch, whose handle its engine
 * would not know yet. The steps, with the request ids, are made beforehand and
 * are the same for both. malloc gets 64 bytes a block and its header is
 * touched, as an allocator for host memory would.
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "odma.h"

enum {
    BLOCK_TOKENS = 16,
    MALLOC_BYTES = 64, /* a block */
    LARGEST_BATCH = 64,
    LEAST_BLOCKS = 4096, /* so that a batch always finds an older request to free */
    MOST_LIVE = ODMA_MAX_REGIONS,
    SMALL_BLOCKS = 65536,
    ID_BYTES = 16
};

static void fail(const char *what, const char *why) {
    fprintf(stderr, "arena: %s: %s\n", what, why);
    exit(1);
}

static void must(odma_status status, const char *what) {
    if (status != ODMA_OK) fail(what, odma_status_name(status));
}

static void *zeroed(size_t count, size_t bytes) {
    void *memory = calloc(count, bytes);
    if (memory == NULL) fail("calloc", "out of memory");
    return memory;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* --- the mix --- */

static uint64_t state;

static uint64_t next_random(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dULL;
}

static double uniform(void) { return (double)(next_random() >> 11) / 9007199254740992.0; }

static double log_normal(double mean, double sigma, double least, double most) {
    double normal = sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform());
    double value = floor(exp(mean + sigma * normal));
    return value < least ? least : value > most ? most : value;
}

static uint32_t blocks_of_request(void) {
    double tokens = log_normal(5.6, 1.0, 8, 4096) + log_normal(5.2, 0.9, 4, 2048);
    return (uint32_t)((tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
}

/* A length to reserve, or 0 to free what was reserved under this index. */
struct step {
    uint32_t blocks;
    uint32_t index;
};

struct mix {
    struct step *steps;
    char (*ids)[ID_BYTES]; /* of each step */
    uint32_t filled;       /* steps that fill the memory, */
    uint32_t first;        /* that are done before the clock runs, */
    uint32_t end;          /* and in all */
};

struct planner {
    uint64_t used, target;
    uint32_t live;
    uint32_t order[MOST_LIVE];  /* indexes of live requests, then those to spare */
    uint32_t blocks[MOST_LIVE]; /* by index */
    uint32_t group[MOST_LIVE];  /* the batch that reserved it, by index */
};

static struct step reserve_step(struct planner *planner, uint32_t blocks, uint32_t group) {
    uint32_t index = planner->order[planner->live++];
    if (planner->live == MOST_LIVE) fail("mix", "too many requests live at once");
    planner->blocks[index] = blocks;
    planner->group[index] = group;
    planner->used += blocks;
    return (struct step){.blocks = blocks, .index = index};
}

static struct step free_step(struct planner *planner, uint32_t group) {
    uint32_t at, index;
    do {
        at = (uint32_t)(next_random() % planner->live);
        index = planner->order[at];
    } while (planner->group[index] == group);
    planner->order[at] = planner->order[--planner->live];
    planner->order[planner->live] = index;
    planner->used -= planner->blocks[index];
    return (struct step){.index = index};
}

static void write_ids(struct mix *mix) {
    for (uint32_t i = 0; i < mix->end; i++) {
        char id[ID_BYTES + 1];
        snprintf(id, sizeof id, "request-%08x", i);
        memcpy(mix->ids[i], id, ID_BYTES);
    }
}

/* `count` steps, whole batches of them, after a quarter as many that are not timed. */
static struct mix plan_mix(uint32_t blocks, double share, uint32_t count) {
    struct mix mix = {.filled = 0};
    struct planner *planner = zeroed(1, sizeof *planner);
    uint32_t warm = count / 4 / LARGEST_BATCH * LARGEST_BATCH;
    uint32_t room = MOST_LIVE + warm + count, at = 0, length = blocks_of_request();
    mix.steps = zeroed(room, sizeof *mix.steps);
    mix.ids = zeroed(room, sizeof *mix.ids);
    planner->target = (uint64_t)(share * blocks);
    for (uint32_t i = 0; i < MOST_LIVE; i++) planner->order[i] = i;
    for (; planner->used + length <= planner->target; length = blocks_of_request())
        mix.steps[at++] = reserve_step(planner, length, UINT32_MAX);
    mix.filled = at;
    mix.first = at + warm;
    mix.end = mix.first + count;
    while (at < mix.end) {
        uint32_t group = (at - mix.filled) / LARGEST_BATCH;
        if (planner->used + length <= planner->target) {
            mix.steps[at++] = reserve_step(planner, length, group);
            length = blocks_of_request();
        } else {
            mix.steps[at++] = free_step(planner, group);
        }
    }
    free(planner);
    write_ids(&mix);
    return mix;
}

/* --- malloc --- */

static void do_mallocs(const struct mix *mix, uint32_t from, uint32_t to, void **held) {
    for (uint32_t i = from; i < to; i++) {
        const struct step *step = &mix->steps[i];
        if (step->blocks > 0) {
            char *memory = malloc((size_t)step->blocks * MALLOC_BYTES);
            memory[0] = 1;
            held[step->index] = memory;
        } else {
            free(held[step->index]);
            held[step->index] = NULL;
        }
    }
}

static double malloc_seconds(const struct mix *mix) {
    void **held = zeroed(MOST_LIVE, sizeof *held);
    do_mallocs(mix, 0, mix->first, held);
    double start = seconds();
    do_mallocs(mix, mix->first, mix->end, held);
    double taken = seconds() - start;
    for (uint32_t i = 0; i < MOST_LIVE; i++) free(held[i]);
    free(held);
    return taken;
}

/* --- the arena --- */

struct bench {
    odma_arena *arena;
    uint64_t seq;
    uint32_t reserves, refusals;
    odma_op ops[LARGEST_BATCH];
    odma_result results[LARGEST_BATCH];
    odma_copy copies[ODMA_MAX_COPIES];
    odma_place moved[2 * ODMA_MAX_COPIES]; /* with granules for max_regions more */
    uint64_t handles[MOST_LIVE];
};

static struct bench *fresh(const char *path, uint32_t blocks, uint32_t max_regions, int compact) {
    char reason[ODMA_REASON_BYTES];
    struct bench *bench = zeroed(1, sizeof *bench);
    odma_geometry geometry = {.blocks = blocks,
                              .block_tokens = BLOCK_TOKENS,
                              .max_regions = max_regions,
                              .max_ops = LARGEST_BATCH,
                              .max_copies = ODMA_MAX_COPIES,
                              .model_length_tokens = 16384};
    odma_engine engine = {.moves = ODMA_MOVES_ANY,
                          .single_ordered_stream = 1,
                          .copies_may_overlap = 1,
                          .planes = 56,
                          .token_seconds = 57344 / 307.2e9};
    odma_policy policy = {.name = "bench",
                          .start = ODMA_START_MAXIMUM,
                          .overflow = compact ? ODMA_OVERFLOW_COMPACT : ODMA_OVERFLOW_PREEMPT,
                          .step_tokens = BLOCK_TOKENS,
                          .max_copy_tokens = 1U << 30};
    if (odma_arena_create(path, &geometry, &bench->arena, reason) != ODMA_OK) fail(path, reason);
    must(odma_arena_set_policy(bench->arena, NULL, &policy, 0), "set policy");
    must(odma_arena_open_epoch(bench->arena, 1, &engine, NULL, NULL, 0), "open epoch");
    for (uint32_t i = 0; i < LARGEST_BATCH; i++)
        bench->ops[i] = (odma_op){.end = ODMA_END_ABORTED, .prompt_tokens = 1};
    return bench;
}

/* Check the books, close and remove the file. */
static void finish(struct bench *bench, const char *path) {
    char reason[ODMA_REASON_BYTES];
    if (odma_arena_check(bench->arena, reason) != ODMA_OK) fail("check", reason);
    odma_arena_close(bench->arena);
    unlink(path);
    free(bench);
}

static uint32_t live_of(struct bench *bench) {
    odma_report report;
    must(odma_arena_report(bench->arena, &report), "report");
    return report.live;
}

/* Without branches, which would cost as much as a good part of the operation:
 * a free is given an id and an allocate a handle, neither of which is read. */
static void write_op(struct bench *bench, uint32_t at, const struct step *step, const char *id) {
    odma_op *op = &bench->ops[at];
    op->kind = step->blocks > 0 ? ODMA_OP_ALLOCATE : ODMA_OP_FREE;
    op->max_total_tokens = step->blocks * BLOCK_TOKENS;
    op->handle = bench->handles[step->index];
    memcpy(op->request_id, id, ID_BYTES);
}

/* A refused request has handle 0, whose free is answered and changes nothing. */
static void read_result(struct bench *bench, uint32_t at, const struct step *step) {
    bench->handles[step->index] = bench->results[at].handle;
    bench->reserves += step->blocks > 0;
    bench->refusals += (step->blocks > 0) & (bench->results[at].outcome == ODMA_REFUSED);
}

static void do_alone(struct bench *bench, const struct mix *mix, uint32_t from, uint32_t to) {
    for (uint32_t i = from; i < to; i++) {
        write_op(bench, 0, &mix->steps[i], mix->ids[i]);
        must(odma_arena_unary(bench->arena, (odma_caller){.epoch = 1}, bench->ops, bench->results),
             "unary");
        read_result(bench, 0, &mix->steps[i]);
    }
}

/* Do `count` steps in one batch; return how many copies it needed. */
static uint32_t do_batch(struct bench *bench, const struct mix *mix, uint32_t from,
                         uint32_t count) {
    odma_answer answer = {
        .results = bench->results, .copies = bench->copies, .moved = bench->moved};
    for (uint32_t i = 0; i < count; i++)
        write_op(bench, i, &mix->steps[from + i], mix->ids[from + i]);
    odma_batch batch = {.epoch = 1,
                        .seq = bench->seq + 1,
                        .completed_seq = bench->seq,
                        .pass_refused = 1,
                        .op_count = count,
                        .ops = bench->ops};
    must(odma_arena_apply(bench->arena, &batch, &answer), "apply");
    bench->seq++;
    for (uint32_t i = 0; i < count; i++) read_result(bench, i, &mix->steps[from + i]);
    return answer.copy_count;
}

static void do_steps(struct bench *bench, const struct mix *mix, uint32_t from, uint32_t to,
                     uint32_t batch) {
    if (batch == 0) {
        do_alone(bench, mix, from, to);
        return;
    }
    for (uint32_t i = from; i < to; i += batch)
        do_batch(bench, mix, i, to - i < batch ? to - i : batch);
}

static uint32_t max_regions_for(uint32_t blocks) { return blocks <= SMALL_BLOCKS ? 2048 : 32768; }

/* --- commands --- */

static void print_mix(const char *path, uint32_t blocks, double share, uint32_t batch, int compact,
                      uint32_t count) {
    struct mix mix = plan_mix(blocks, share, count);
    double by_malloc = malloc_seconds(&mix);
    struct bench *bench = fresh(path, blocks, max_regions_for(blocks), compact);
    do_steps(bench, &mix, 0, mix.filled, batch);
    do_steps(bench, &mix, mix.filled, mix.first, batch);
    bench->reserves = bench->refusals = 0;
    double start = seconds();
    do_steps(bench, &mix, mix.first, mix.end, batch);
    double by_arena = seconds() - start;
    printf("{\"live\": %u, \"arena_ns\": %.2f, \"malloc_ns\": %.2f, \"reserves\": %u, "
           "\"refused\": %u}\n",
           live_of(bench), by_arena / count * 1e9, by_malloc / count * 1e9, bench->reserves,
           bench->refusals);
    finish(bench, path);
}

static int by_size(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double quantile(double *values, uint32_t count, double level) {
    if (count == 0) return 0;
    qsort(values, count, sizeof *values, by_size);
    return values[(uint32_t)(level * (count - 1))];
}

static void print_plans(const char *path, uint32_t blocks, double share, uint32_t count) {
    struct mix mix = plan_mix(blocks, share, count);
    struct bench *bench = fresh(path, blocks, max_regions_for(blocks), 1);
    double *plain = zeroed(count, sizeof *plain), *compacting = zeroed(count, sizeof *compacting);
    uint32_t plains = 0, compactings = 0;
    do_steps(bench, &mix, 0, mix.filled, LARGEST_BATCH);
    do_steps(bench, &mix, mix.filled, mix.first, LARGEST_BATCH);
    for (uint32_t i = mix.first; i < mix.end; i++) {
        double start = seconds();
        uint32_t copies = do_batch(bench, &mix, i, 1);
        double taken = (seconds() - start) * 1e6;
        if (copies > 0)
            compacting[compactings++] = taken;
        else
            plain[plains++] = taken;
    }
    printf("{\"compacting\": %u, \"compacting_p50_us\": %.2f, \"compacting_p99_us\": %.2f, "
           "\"plain_p50_us\": %.2f, \"plain_p99_us\": %.2f}\n",
           compactings, quantile(compacting, compactings, 0.5),
           quantile(compacting, compactings, 0.99), quantile(plain, plains, 0.5),
           quantile(plain, plains, 0.99));
    finish(bench, path);
}

/* Regions with holes between them: every eleventh is freed again. */
static void fill_with_holes(struct bench *bench, uint32_t regions) {
    struct mix mix = {0};
    uint32_t spare = regions / 10;
    mix.steps = zeroed(regions + 2 * spare, sizeof *mix.steps);
    mix.ids = zeroed(regions + 2 * spare, sizeof *mix.ids);
    for (uint32_t i = 0; i < regions + spare; i++)
        mix.steps[mix.end++] = (struct step){.blocks = blocks_of_request(), .index = i};
    for (uint32_t i = 0; i < spare; i++)
        mix.steps[mix.end++] = (struct step){.index = 11 * i};
    write_ids(&mix);
    do_steps(bench, &mix, 0, regions + spare, LARGEST_BATCH);
    do_steps(bench, &mix, regions + spare, mix.end, LARGEST_BATCH);
    if (bench->refusals > 0) fail("attach", "not every request fits");
    free(mix.steps);
    free(mix.ids);
}

static void print_attach(const char *path, uint32_t regions, uint32_t repeats) {
    char reason[ODMA_REASON_BYTES];
    struct bench *bench = fresh(path, 64 * regions, regions + regions / 4, 0);
    double *taken = zeroed(repeats, sizeof *taken);
    fill_with_holes(bench, regions);
    for (uint32_t i = 0; i < repeats; i++) {
        odma_arena_close(bench->arena);
        double start = seconds();
        if (odma_arena_attach(path, NULL, NULL, &bench->arena, reason) != ODMA_OK)
            fail("attach", reason);
        if (odma_arena_check(bench->arena, reason) != ODMA_OK) fail("check", reason);
        taken[i] = (seconds() - start) * 1e3;
    }
    printf("{\"regions\": %u, \"median_ms\": %.3f, \"max_ms\": %.3f}\n", live_of(bench),
           quantile(taken, repeats, 0.5), quantile(taken, repeats, 1));
    finish(bench, path);
}

/* An allocate of so many blocks, or a free of `handle`. */
static odma_op op_of(uint32_t blocks, uint64_t handle) {
    static uint32_t ids;
    odma_op op = {.kind = blocks > 0 ? ODMA_OP_ALLOCATE : ODMA_OP_FREE,
                  .end = ODMA_END_ABORTED,
                  .handle = handle,
                  .prompt_tokens = 1,
                  .max_total_tokens = blocks * BLOCK_TOKENS};
    snprintf(op.request_id, sizeof op.request_id, "worst-%u", ids++);
    return op;
}

/* A batch of a pool of several streams. */
static void worst_step(struct bench *bench, odma_op *ops, uint32_t count, const odma_used *used,
                       uint64_t completed, odma_result *results) {
    odma_answer answer = {.results = results, .copies = bench->copies, .moved = bench->moved};
    odma_batch batch = {.epoch = 1,
                        .seq = ++bench->seq,
                        .completed_seq = completed,
                        .pass_refused = 1,
                        .used_count = used == NULL ? 0 : 2,
                        .op_count = count,
                        .used = used,
                        .ops = ops};
    must(odma_arena_apply(bench->arena, &batch, &answer), "apply");
}

static void print_worst(const char *path, uint32_t waiting, uint32_t count, uint32_t repeats) {
    char reason[ODMA_REASON_BYTES];
    uint32_t hole = waiting + 8, last = waiting + 1;
    struct bench *bench = zeroed(1, sizeof *bench);
    odma_geometry geometry = {.blocks = hole + waiting + 66,
                              .block_tokens = BLOCK_TOKENS,
                              .max_regions = waiting + 8,
                              .max_ops = ODMA_MAX_OPS};
    odma_engine engine = {.moves = ODMA_MOVES_ANY};
    odma_policy policy = {.overflow = ODMA_OVERFLOW_COMPACT};
    if (odma_arena_create(path, &geometry, &bench->arena, reason) != ODMA_OK) fail(path, reason);
    must(odma_arena_set_policy(bench->arena, NULL, &policy, 0), "set policy");
    must(odma_arena_open_epoch(bench->arena, 1, &engine, NULL, NULL, 0), "open epoch");
    odma_op *ops = zeroed(ODMA_MAX_OPS, sizeof *ops), large = op_of(hole, 0);
    odma_result *results = zeroed(ODMA_MAX_OPS, sizeof *results), placed;
    uint64_t *handles = zeroed(waiting + 2, sizeof *handles);
    double *taken = zeroed(repeats, sizeof *taken);
    worst_step(bench, &large, 1, NULL, 0, &placed);
    for (uint32_t at = 0, part; at < waiting + 2; at += part) {
        part = waiting + 2 - at < ODMA_MAX_OPS ? waiting + 2 - at : ODMA_MAX_OPS;
        for (uint32_t i = 0; i < part; i++) ops[i] = op_of(1, 0);
        worst_step(bench, ops, part, NULL, 0, results);
        for (uint32_t i = 0; i < part; i++) handles[at + i] = results[i].handle;
    }
    large = op_of(0, placed.handle);
    worst_step(bench, &large, 1, NULL, 0, &placed);
    uint64_t completed = bench->seq;
    for (uint32_t at = 1, part; at < last; at += part) {
        part = last - at < ODMA_MAX_OPS ? last - at : ODMA_MAX_OPS;
        for (uint32_t i = 0; i < part; i++) ops[i] = op_of(0, handles[at + i]);
        worst_step(bench, ops, part, NULL, completed, results);
    }
    odma_used used[2] = {{.handle = handles[0], .used_tokens = 1, .pinned = 1},
                         {.handle = handles[last], .used_tokens = 1, .pinned = 1}};
    for (uint32_t i = 0; i < repeats; i++) {
        for (uint32_t j = 0; j < count; j++) ops[j] = op_of(hole + 1, 0);
        double start = seconds();
        worst_step(bench, ops, count, used, completed, results);
        taken[i] = (seconds() - start) * 1e3;
        if (results[0].reason != ODMA_REASON_FRAGMENTED) fail("worst", "not what was meant");
    }
    printf("{\"waiting\": %u, \"operations\": %u, \"median_ms\": %.3f, \"max_ms\": %.3f}\n",
           waiting, count, quantile(taken, repeats, 0.5), quantile(taken, repeats, 1));
    free(ops);
    free(results);
    free(handles);
    free(taken);
    finish(bench, path);
}

/* --- keys --- */

enum { ASKING = 8, GRANULE_TOKENS = 128 };

/* The key of a granule of talk `talk`. */
static void write_key(uint8_t *key, uint64_t talk, uint64_t granule) {
    uint64_t words[2] = {(talk + 1) * 0x9e3779b97f4a7c15ULL, (granule + 1) * 0xd6e8feb86659fd93ULL};
    memcpy(key, words, sizeof words);
}

struct talks {
    struct bench *bench;
    uint32_t keys;
    uint64_t asked;
    uint8_t *bytes; /* of the keys of ASKING operations */
    odma_reused *reused;
};

/* One batch of `count` allocates with the keys of talks from `first` on (UINT64_MAX: none), whose
 * regions are freed by the next one unless they stay. Answers its nanoseconds. */
static double ask_talks(struct talks *talks, uint64_t first, uint32_t count, int stays) {
    struct bench *bench = talks->bench;
    odma_answer answer = {.results = bench->results,
                          .copies = bench->copies,
                          .moved = bench->moved,
                          .moved_reused = talks->reused};
    odma_batch batch = {.epoch = 1,
                        .seq = ++bench->seq,
                        .completed_seq = bench->seq - 1,
                        .given = ODMA_GIVEN_MAX_COPY,
                        .op_count = count,
                        .ops = bench->ops};
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *keys = talks->bytes + (size_t)i * talks->keys * ODMA_KEY_BYTES;
        bench->ops[i] = (odma_op){.kind = ODMA_OP_ALLOCATE,
                                  .prompt_tokens = talks->keys * GRANULE_TOKENS + 1,
                                  .max_total_tokens = talks->keys * GRANULE_TOKENS + BLOCK_TOKENS};
        snprintf(bench->ops[i].request_id, ID_BYTES, "%llu", (unsigned long long)talks->asked++);
        if (first == UINT64_MAX) continue;
        for (uint32_t k = 0; k < talks->keys; k++)
            write_key(keys + (size_t)k * ODMA_KEY_BYTES, first + i, k);
        bench->ops[i].keys = keys;
        bench->ops[i].key_bytes = talks->keys * ODMA_KEY_BYTES;
    }
    double start = seconds();
    must(odma_arena_apply(bench->arena, &batch, &answer), "apply");
    double taken = (seconds() - start) * 1e9;
    if (bench->results[count - 1].outcome != ODMA_PLACED) fail("keys", "no room");
    if (stays) return taken;
    for (uint32_t i = 0; i < count; i++)
        bench->ops[i] = (odma_op){.kind = ODMA_OP_FREE,
                                  .end = ODMA_END_ABORTED,
                                  .handle = bench->results[i].handle};
    batch.seq = ++bench->seq, batch.completed_seq++;
    must(odma_arena_apply(bench->arena, &batch, &answer), "apply");
    return taken;
}

static void print_keys(const char *path, uint32_t sources, uint32_t keys, uint32_t repeats) {
    char reason[ODMA_REASON_BYTES];
    uint32_t blocks = (keys * GRANULE_TOKENS / BLOCK_TOKENS + 1) * (sources + ASKING);
    struct bench *bench = zeroed(1, sizeof *bench);
    odma_geometry geometry = {.blocks = blocks, .granule_tokens = GRANULE_TOKENS};
    odma_engine engine = {.moves = ODMA_MOVES_ANY, .single_ordered_stream = 1};
    if (odma_arena_create(path, &geometry, &bench->arena, reason) != ODMA_OK) fail(path, reason);
    must(odma_arena_open_epoch(bench->arena, 1, &engine, NULL, NULL, 0), "open epoch");
    struct talks talks = {.bench = bench, .keys = keys};
    talks.bytes = zeroed((size_t)ASKING * keys, ODMA_KEY_BYTES);
    talks.reused = zeroed(2 * ODMA_MAX_COPIES, sizeof *talks.reused);
    for (uint32_t i = 0; i < sources; i++) {
        ask_talks(&talks, i, 1, 1);
        odma_used used = {.handle = bench->results[0].handle,
                          .used_tokens = keys * GRANULE_TOKENS,
                          .shareable_tokens = keys * GRANULE_TOKENS};
        odma_answer answer = {.results = bench->results,
                              .copies = bench->copies,
                              .moved = bench->moved,
                              .moved_reused = talks.reused};
        odma_batch batch = {.epoch = 1,
                            .seq = ++bench->seq,
                            .completed_seq = bench->seq - 1,
                            .used_count = 1,
                            .used = &used};
        must(odma_arena_apply(bench->arena, &batch, &answer), "apply");
    }
    double *none = zeroed(repeats, sizeof *none), *found = zeroed(repeats, sizeof *found);
    double *missed = zeroed(repeats, sizeof *missed);
    for (uint32_t i = 0; i < repeats; i++) {
        none[i] = ask_talks(&talks, UINT64_MAX, ASKING, 0);
        found[i] = ask_talks(&talks, i % (sources - ASKING), ASKING, 0);
        missed[i] = ask_talks(&talks, sources + (uint64_t)i * ASKING, ASKING, 0);
    }
    double without = quantile(none, repeats, 0.5), all = ASKING * keys;
    printf("{\"sources\": %u, \"keys\": %u, \"without_us\": %.2f, \"found_us\": %.2f, "
           "\"missed_us\": %.2f, \"found_ns_a_key\": %.2f, \"missed_ns_a_key\": %.2f}\n",
           sources, keys, without / 1e3, quantile(found, repeats, 0.5) / 1e3,
           quantile(missed, repeats, 0.5) / 1e3, (quantile(found, repeats, 0.5) - without) / all,
           (quantile(missed, repeats, 0.5) - without) / all);
    free(talks.bytes);
    free(talks.reused);
    finish(bench, path);
}

static uint32_t number(const char *text) { return (uint32_t)strtoul(text, NULL, 10); }

int main(int argc, char **argv) {
    const char *command = argc > 2 ? argv[1] : "";
    const char *path = argc > 2 ? argv[2] : "";
    state = 0x853c49e6748fea9bULL;
    if (strcmp(command, "attach") == 0 && argc == 5) {
        print_attach(path, number(argv[3]), number(argv[4]));
        return 0;
    }
    if (strcmp(command, "worst") == 0 && argc == 6) {
        print_worst(path, number(argv[3]), number(argv[4]), number(argv[5]));
        return 0;
    }
    if (strcmp(command, "keys") == 0 && argc == 6) {
        print_keys(path, number(argv[3]), number(argv[4]), number(argv[5]));
        return 0;
    }
    if (argc > 3 && number(argv[3]) < LEAST_BLOCKS) fail("blocks", "at least 4096");
    if (strcmp(command, "mix") == 0 && argc == 9) {
        state += number(argv[8]);
        print_mix(path, number(argv[3]), atof(argv[4]), number(argv[5]), argv[6][0] == '1',
                  number(argv[7]));
        return 0;
    }
    if (strcmp(command, "plans") == 0 && argc == 7) {
        state += number(argv[6]);
        print_plans(path, number(argv[3]), atof(argv[4]), number(argv[5]));
        return 0;
    }
    fputs("usage: see the top of bench/arena.c\n", stderr);
    return 2;
}
