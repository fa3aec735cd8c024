/* test_arena.c - the public header, from C, under the sanitizers.
 *
 * Each test states a fact and works on a file of its own in the directory that
 * the program is given. The first fact that does not hold ends the program
 * with its line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "odma.h"

enum { REGIONS = 64, OPS = 32, COPIES = 256, ROOM = 4 * REGIONS };

static const odma_geometry GEOMETRY = {.blocks = 256,
                                       .block_tokens = 16,
                                       .max_regions = REGIONS,
                                       .max_ops = OPS,
                                       .max_copies = COPIES,
                                       .model_length_tokens = 2048,
                                       .digest = 7};

static const odma_geometry KEEPING = {.blocks = 256,
                                      .block_tokens = 16,
                                      .max_regions = REGIONS,
                                      .max_ops = OPS,
                                      .max_copies = COPIES,
                                      .model_length_tokens = 4096,
                                      .digest = 7,
                                      .granule_tokens = 64};

static const odma_engine ENGINE = {.moves = ODMA_MOVES_ANY,
                                   .single_ordered_stream = 1,
                                   .copies_may_overlap = 1,
                                   .planes = 2,
                                   .descriptor_seconds = 1e-6,
                                   .token_seconds = 1e-7};

static const odma_policy POLICY = {.name = "elastic",
                                   .start = ODMA_START_STEP,
                                   .overflow = ODMA_OVERFLOW_COMPACT,
                                   .step_tokens = 64,
                                   .max_copy_tokens = 1 << 20,
                                   .overflow_risk = 0.1,
                                   .growth = 1,
                                   .tenant_share = 1};

static char path[4096];
static char reason[ODMA_REASON_BYTES];

/* --- checks --- */

static void insist(bool fact, const char *text, int line) {
    if (fact) return;
    fprintf(stderr, "test_arena.c:%d: %s\n  reason: %s\n", line, text, reason);
    exit(1);
}

static void insist_status(odma_status status, odma_status expected, const char *text, int line) {
    if (status == expected) return;
    fprintf(stderr, "test_arena.c:%d: %s\n  gave %s, not %s; reason: %s\n", line, text,
            odma_status_name(status), odma_status_name(expected), reason);
    exit(1);
}

#define CHECK(fact) insist((fact), #fact, __LINE__)
#define GIVES(expected, call) insist_status((call), (expected), #call, __LINE__)
#define OK(call) GIVES(ODMA_OK, call)
#define EPOCH(n) ((odma_caller){.epoch = (n)})

/* --- numbers that look random and are always the same --- */

static uint64_t seed = 1;

static uint32_t below(uint32_t limit) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 16) % limit;
}

/* --- arenas and batches --- */

struct step {
    odma_batch batch;
    odma_used used[REGIONS];
    odma_op ops[OPS];
    odma_answer answer;
    odma_result results[OPS];
    odma_copy copies[COPIES];
    odma_place moved[COPIES + REGIONS];
    odma_reused reused[COPIES + REGIONS];
};

static struct step step;

static const odma_geometry *geometry_of_all = &GEOMETRY;

static odma_arena *fresh(void) {
    odma_arena *arena = NULL;
    if (unlink(path) != 0) CHECK(errno == ENOENT);
    OK(odma_arena_create(path, geometry_of_all, &arena, reason));
    odma_policy policy = POLICY;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 1, &ENGINE, "boot", "words", 5));
    return arena;
}

static odma_arena *attached(void) {
    odma_arena *arena = NULL;
    OK(odma_arena_attach(path, geometry_of_all, "boot", &arena, reason));
    return arena;
}

static void checked(odma_arena *arena) { OK(odma_arena_check(arena, reason)); }

static odma_report report_of(odma_arena *arena) {
    odma_report report;
    OK(odma_arena_report(arena, &report));
    return report;
}

static odma_op allocate_op(const char *id, uint32_t prompt_tokens) {
    odma_op op = {.kind = ODMA_OP_ALLOCATE, .prompt_tokens = prompt_tokens};
    memcpy(op.request_id, id, strnlen(id, ODMA_ID_BYTES));
    return op;
}

static odma_op free_op(uint64_t handle, uint32_t output_tokens) {
    return (odma_op){.kind = ODMA_OP_FREE,
                     .handle = handle,
                     .end = ODMA_END_FINISHED,
                     .output_tokens = output_tokens};
}

static odma_op extend_op(uint64_t handle, uint32_t least_tokens) {
    return (odma_op){.kind = ODMA_OP_EXTEND, .handle = handle, .least_tokens = least_tokens};
}

/* An empty batch that comes next, with room for its answer. */
static void begin_step(odma_arena *arena) {
    odma_report report = report_of(arena);
    memset(&step, 0, sizeof step);
    step.batch = (odma_batch){.epoch = report.epoch,
                              .seq = report.seq + 1,
                              .completed_seq = report.seq,
                              .used = step.used,
                              .ops = step.ops};
    step.answer.results = step.results;
    step.answer.copies = step.copies;
    step.answer.moved = step.moved;
    step.answer.moved_reused = step.reused;
}

static void add_op(odma_op op) { step.ops[step.batch.op_count++] = op; }

static odma_status run_step(odma_arena *arena) {
    return odma_arena_apply(arena, &step.batch, &step.answer);
}

static uint64_t allocate_one(odma_arena *arena, const char *id, uint32_t prompt_tokens) {
    begin_step(arena);
    add_op(allocate_op(id, prompt_tokens));
    OK(run_step(arena));
    CHECK(step.results[0].outcome == ODMA_PLACED);
    return step.results[0].handle;
}

/* --- what is and is not attached --- */

static void an_arena_is_made_once_and_attached_once(void) {
    odma_arena *arena = fresh(), *second = NULL;
    GIVES(ODMA_EXISTS, odma_arena_create(path, &GEOMETRY, &second, reason));
    GIVES(ODMA_LOCKED, odma_arena_attach(path, NULL, NULL, &second, reason));
    CHECK(second == NULL);
    odma_arena_close(arena);
    odma_arena_close(NULL);

    odma_geometry other = GEOMETRY;
    other.digest++;
    GIVES(ODMA_MISMATCH, odma_arena_attach(path, &other, NULL, &second, reason));
    OK(odma_arena_attach(path, NULL, NULL, &second, reason));
    OK(odma_arena_geometry(second, &other));
    CHECK(memcmp(&other, &GEOMETRY, sizeof other) == 0);
    odma_arena_close(second);
    CHECK(unlink(path) == 0);
    GIVES(ODMA_NOT_FOUND, odma_arena_attach(path, NULL, NULL, &second, reason));
}

static void a_file_that_is_not_ours_is_foreign(void) {
    odma_arena_close(fresh());
    odma_arena *arena = NULL;
    char other[sizeof path + 8];
    snprintf(other, sizeof other, "%s.other", path);

    CHECK(chmod(path, 0640) == 0);
    GIVES(ODMA_FOREIGN, odma_arena_attach(path, NULL, NULL, &arena, reason));
    CHECK(chmod(path, 0602) == 0);
    GIVES(ODMA_FOREIGN, odma_arena_attach(path, NULL, NULL, &arena, reason));
    CHECK(chmod(path, 0600) == 0);
    CHECK(symlink(path, other) == 0);
    GIVES(ODMA_FOREIGN, odma_arena_attach(other, NULL, NULL, &arena, reason));
    CHECK(unlink(other) == 0 && mkdir(other, 0700) == 0);
    GIVES(ODMA_FOREIGN, odma_arena_attach(other, NULL, NULL, &arena, reason));
    CHECK(rmdir(other) == 0 && mkfifo(other, 0600) == 0);
    GIVES(ODMA_FOREIGN, odma_arena_attach(other, NULL, NULL, &arena, reason));
    CHECK(unlink(other) == 0);
    if (geteuid() == 0) {
        CHECK(chown(path, 65534, 65534) == 0);
        GIVES(ODMA_FOREIGN, odma_arena_attach(path, NULL, NULL, &arena, reason));
        CHECK(chown(path, 0, 0) == 0);
    }
    CHECK(arena == NULL && reason[0] != 0);
    odma_arena_close(attached());
}

static off_t size_of_file(void) {
    struct stat status;
    CHECK(stat(path, &status) == 0);
    return status.st_size;
}

static void a_file_of_another_size_is_corrupt_and_stays_as_it_is(void) {
    odma_arena_close(fresh());
    odma_arena *arena = NULL;
    off_t size = size_of_file();
    const off_t sizes[] = {size + 1, size - 1, size / 2, 4096, 100, 0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CHECK(truncate(path, sizes[i]) == 0);
        GIVES(ODMA_CORRUPT, odma_arena_attach(path, NULL, NULL, &arena, reason));
        CHECK(size_of_file() == sizes[i]);
    }
}

static void a_file_that_shrinks_under_an_arena_breaks_it(void) {
    odma_arena *arena = fresh();
    CHECK(truncate(path, size_of_file() - 4096) == 0);
    begin_step(arena);
    add_op(allocate_op("a", 100));
    GIVES(ODMA_BROKEN, run_step(arena));
    odma_report report;
    GIVES(ODMA_BROKEN, odma_arena_report(arena, &report));
    odma_arena_close(arena);
}

static void a_file_that_has_shrunk_is_found_by_a_check(void) {
    odma_arena *arena = fresh();
    CHECK(truncate(path, 4096) == 0);
    GIVES(ODMA_CORRUPT, odma_arena_check(arena, reason));
    CHECK(strcmp(reason, "it is shorter than its books") == 0);
    odma_arena_close(arena);
}

/* Attach either finds that a byte is wrong or is right not to care. */
static void a_wild_byte_never_goes_unnoticed(void) {
    odma_arena *arena = fresh();
    allocate_one(arena, "a", 100);
    allocate_one(arena, "b", 200);
    odma_report before = report_of(arena);
    odma_arena_close(arena);
    off_t size = size_of_file();
    int file = open(path, O_RDWR | O_CLOEXEC);
    CHECK(file >= 0);
    uint32_t found = 0;
    for (int i = 0; i < 150; i++) {
        off_t at = (off_t)((below(1 << 30) * (uint64_t)1024 + below(1024)) % (uint64_t)size);
        if (i < 60) at = below(4096);
        uint8_t old, wild;
        CHECK(pread(file, &old, 1, at) == 1);
        wild = old ^ (uint8_t)(1 + below(255));
        CHECK(pwrite(file, &wild, 1, at) == 1);
        odma_status status = odma_arena_attach(path, NULL, "boot", &arena, reason);
        if (status == ODMA_OK) {
            checked(arena);
            odma_report report = report_of(arena);
            CHECK(memcmp(&report, &before, sizeof report) == 0);
            odma_arena_close(arena);
        } else {
            CHECK(status == ODMA_CORRUPT || status == ODMA_MISMATCH);
            found++;
        }
        CHECK(pwrite(file, &old, 1, at) == 1);
    }
    CHECK(found > 0);
    close(file);
    odma_arena_close(attached());
}

/* --- a caller's mistake is a status --- */

static void a_null_is_invalid(void) {
    odma_arena *arena = fresh(), *none = NULL;
    odma_geometry geometry;
    odma_engine engine;
    odma_policy policy = POLICY;
    odma_report report;
    odma_region region;
    odma_place place;
    odma_result result;
    odma_tenant_use use;
    uint64_t handle = 1;
    uint32_t count = 0, limits[ODMA_LIMITS];
    double weight = 1, waste;
    char description[ODMA_DESCRIPTION_BYTES];
    begin_step(arena);
    odma_op op = allocate_op("a", 10);

    GIVES(ODMA_INVALID, odma_arena_create(NULL, &GEOMETRY, &none, reason));
    GIVES(ODMA_INVALID, odma_arena_create(path, NULL, &none, reason));
    GIVES(ODMA_INVALID, odma_arena_create(path, &GEOMETRY, NULL, reason));
    GIVES(ODMA_EXISTS, odma_arena_create(path, &GEOMETRY, &none, NULL));
    GIVES(ODMA_INVALID, odma_arena_attach(NULL, NULL, NULL, &none, reason));
    GIVES(ODMA_INVALID, odma_arena_attach(path, NULL, NULL, NULL, reason));
    GIVES(ODMA_INVALID, odma_arena_open_epoch(NULL, 2, &ENGINE, "boot", "", 0));
    GIVES(ODMA_INVALID, odma_arena_open_epoch(arena, 2, NULL, "boot", "", 0));
    GIVES(ODMA_INVALID, odma_arena_open_epoch(arena, 2, &ENGINE, "boot", NULL, 1));
    GIVES(ODMA_INVALID, odma_arena_end_epoch(NULL, EPOCH(1)));
    GIVES(ODMA_INVALID, odma_arena_geometry(NULL, &geometry));
    GIVES(ODMA_INVALID, odma_arena_geometry(arena, NULL));
    GIVES(ODMA_INVALID, odma_arena_engine(NULL, &engine));
    GIVES(ODMA_INVALID, odma_arena_engine(arena, NULL));
    GIVES(ODMA_INVALID, odma_arena_description(NULL, description, &count));
    GIVES(ODMA_INVALID, odma_arena_description(arena, NULL, &count));
    GIVES(ODMA_INVALID, odma_arena_description(arena, description, NULL));
    GIVES(ODMA_INVALID, odma_arena_policy(NULL, &policy));
    GIVES(ODMA_INVALID, odma_arena_policy(arena, NULL));
    GIVES(ODMA_INVALID, odma_arena_set_policy(NULL, NULL, &policy, 0));
    GIVES(ODMA_INVALID, odma_arena_set_policy(arena, NULL, NULL, 0));
    GIVES(ODMA_INVALID, odma_arena_replay(NULL, &step.batch, &step.answer));
    GIVES(ODMA_INVALID, odma_arena_replay(arena, NULL, &step.answer));
    GIVES(ODMA_INVALID, odma_arena_replay(arena, &step.batch, NULL));
    GIVES(ODMA_INVALID, odma_arena_apply(NULL, &step.batch, &step.answer));
    GIVES(ODMA_INVALID, odma_arena_apply(arena, NULL, &step.answer));
    GIVES(ODMA_INVALID, odma_arena_apply(arena, &step.batch, NULL));
    GIVES(ODMA_INVALID, odma_arena_unary(NULL, EPOCH(1), &op, &result));
    GIVES(ODMA_INVALID, odma_arena_unary(arena, EPOCH(1), NULL, &result));
    GIVES(ODMA_INVALID, odma_arena_unary(arena, EPOCH(1), &op, NULL));
    GIVES(ODMA_INVALID, odma_arena_reconcile(NULL, EPOCH(1), 0, &handle, 1, &place, &handle, &count));
    GIVES(ODMA_INVALID, odma_arena_reconcile(arena, EPOCH(1), 0, NULL, 1, &place, &handle, &count));
    GIVES(ODMA_INVALID, odma_arena_reconcile(arena, EPOCH(1), 0, &handle, 1, NULL, &handle, &count));
    GIVES(ODMA_INVALID, odma_arena_reconcile(arena, EPOCH(1), 0, &handle, 1, &place, NULL, &count));
    GIVES(ODMA_INVALID, odma_arena_reconcile(arena, EPOCH(1), 0, &handle, 1, &place, &handle, NULL));
    GIVES(ODMA_INVALID, odma_arena_report(NULL, &report));
    GIVES(ODMA_INVALID, odma_arena_report(arena, NULL));
    GIVES(ODMA_INVALID, odma_arena_regions(NULL, 0, &region, 1, &count));
    GIVES(ODMA_INVALID, odma_arena_regions(arena, 0, NULL, 1, &count));
    GIVES(ODMA_INVALID, odma_arena_regions(arena, 0, &region, 1, NULL));
    GIVES(ODMA_INVALID, odma_arena_tenants(NULL, &use, &count));
    GIVES(ODMA_INVALID, odma_arena_tenants(arena, NULL, &count));
    GIVES(ODMA_INVALID, odma_arena_tenants(arena, &use, NULL));
    GIVES(ODMA_INVALID, odma_arena_check(NULL, reason));
    OK(odma_arena_check(arena, NULL));
    GIVES(ODMA_INVALID, odma_arena_class(NULL, 0, description));
    GIVES(ODMA_INVALID, odma_arena_class(arena, 0, NULL));
    GIVES(ODMA_INVALID, odma_arena_class_index(NULL, op.request_class, &count));
    GIVES(ODMA_INVALID, odma_arena_class_index(arena, NULL, &count));
    GIVES(ODMA_INVALID, odma_arena_class_index(arena, op.request_class, NULL));
    GIVES(ODMA_INVALID, odma_arena_histogram(NULL, 0, NULL));
    GIVES(ODMA_INVALID, odma_arena_histogram(arena, 0, NULL));
    GIVES(ODMA_INVALID, odma_arena_bins(NULL, NULL));
    GIVES(ODMA_INVALID, odma_arena_bins(arena, NULL));
    GIVES(ODMA_INVALID, odma_arena_completions(NULL, 0, NULL, NULL, NULL));
    GIVES(ODMA_INVALID, odma_arena_completions(arena, 0, NULL, &count, NULL));
    GIVES(ODMA_INVALID, odma_arena_quantiles(NULL, 0, 0, NULL, NULL));
    GIVES(ODMA_INVALID, odma_arena_quantiles(arena, 0, 0, NULL, &weight));
    GIVES(ODMA_INVALID, odma_optimal_limits(NULL, &count, NULL, 1, 1, limits, &count, &waste));
    GIVES(ODMA_INVALID, odma_optimal_limits(&weight, NULL, NULL, 1, 1, limits, &count, &waste));
    GIVES(ODMA_INVALID, odma_optimal_limits(&weight, &count, NULL, 1, 1, NULL, &count, &waste));
    GIVES(ODMA_INVALID, odma_optimal_limits(&weight, &count, NULL, 1, 1, limits, NULL, &waste));
    GIVES(ODMA_INVALID, odma_optimal_limits(&weight, &count, NULL, 1, 1, limits, &count, NULL));

    step.batch.op_count = 1;
    step.batch.ops = NULL;
    GIVES(ODMA_INVALID, run_step(arena));
    step.batch.op_count = 0;
    step.batch.used_count = 1;
    step.batch.used = NULL;
    GIVES(ODMA_INVALID, run_step(arena));
    step.batch.used_count = 0;
    step.batch.ops = NULL;
    step.answer.results = NULL;
    GIVES(ODMA_INVALID, run_step(arena));
    begin_step(arena);
    step.answer.copies = NULL;
    GIVES(ODMA_INVALID, run_step(arena));
    begin_step(arena);
    step.answer.moved = NULL;
    GIVES(ODMA_INVALID, run_step(arena));
    CHECK(report_of(arena).seq == 0);
    checked(arena);
    odma_arena_close(arena);
}

static void a_bad_geometry_makes_no_file(void) {
    unlink(path);
    odma_arena *arena = NULL;
    for (int field = 0; field < 14; field++) {
        odma_geometry bad = GEOMETRY;
        uint32_t *fields[] = {&bad.blocks,      &bad.block_tokens, &bad.max_regions,
                              &bad.max_ops,     &bad.max_copies,   &bad.model_length_tokens,
                              &bad.block_tokens};
        const uint32_t over[] = {ODMA_MAX_BLOCKS + 1, 2048, ODMA_MAX_REGIONS + 1, ODMA_MAX_OPS + 1,
                                 ODMA_MAX_COPIES + 1, UINT32_MAX, 48};
        *fields[field / 2] = field % 2 ? over[field / 2] : 0;
        GIVES(ODMA_INVALID, odma_geometry_check(&bad, reason));
        if (field > 0 && field % 2 == 0) continue; /* create takes the default */
        GIVES(ODMA_INVALID, odma_arena_create(path, &bad, &arena, reason));
        CHECK(access(path, F_OK) != 0);
    }
    char nowhere[sizeof path + 8];
    snprintf(nowhere, sizeof nowhere, "%s/no/file", path);
    GIVES(ODMA_IO, odma_arena_create(nowhere, &GEOMETRY, &arena, reason));
}

static void a_bad_engine_or_epoch_changes_nothing(void) {
    odma_arena *arena = fresh();
    allocate_one(arena, "a", 100);
    odma_report before = report_of(arena);
    for (int i = 1; i < 10; i++) {
        odma_engine bad = ENGINE;
        if (i == 1) bad.moves = 4;
        if (i == 2) bad.single_ordered_stream = 2;
        if (i == 3) bad.copies_may_overlap = 2;
        if (i == 4) bad.moves = UINT32_MAX;
        if (i == 5) bad.descriptor_seconds = -1;
        if (i == 6) bad.descriptor_seconds = (double)NAN;
        if (i == 7) bad.token_seconds = -1;
        if (i == 8) bad.token_seconds = (double)INFINITY;
        if (i == 9) bad.token_seconds = (double)NAN;
        GIVES(ODMA_INVALID, odma_arena_open_epoch(arena, 2, &bad, "boot", "", 0));
    }
    GIVES(ODMA_INVALID, odma_arena_open_epoch(arena, 0, &ENGINE, "boot", "", 0));
    GIVES(ODMA_INVALID, odma_arena_open_epoch(arena, 1, &ENGINE, "boot", "", 0));
    GIVES(ODMA_INVALID, odma_arena_open_epoch(arena, (uint64_t)1 << 53, &ENGINE, "boot", "", 0));
    char words[ODMA_DESCRIPTION_BYTES + 1] = {0};
    GIVES(ODMA_INVALID, odma_arena_open_epoch(arena, 2, &ENGINE, "boot", words, sizeof words));
    GIVES(ODMA_EPOCH, odma_arena_end_epoch(arena, EPOCH(2)));
    odma_report after = report_of(arena);
    CHECK(memcmp(&before, &after, sizeof after) == 0);
    checked(arena);
    odma_arena_close(arena);
}

/* Tenants 0 to 2 are named: the first two are sure of a part of what is not
 * kept back. */
static void name_tenants(odma_policy *policy) {
    const double shares[][2] = {{0.5, 0.75}, {0.25, 1}, {0, 0.5}};
    policy->tenant_count = 3;
    for (uint32_t i = 0; i < policy->tenant_count; i++) {
        odma_tenant *tenant = &policy->tenants[i];
        snprintf(tenant->name, sizeof tenant->name, "tenant %u", i);
        tenant->guaranteed_share = shares[i][0] * (1 - policy->safety_share);
        tenant->maximum_share = shares[i][1];
    }
}

static void a_bad_policy_is_not_installed(void) {
    odma_arena *arena = fresh();
    odma_policy before, after;
    OK(odma_arena_policy(arena, &before));
    for (int i = 0; i < 34; i++) {
        odma_policy bad = POLICY;
        if (i == 0) bad.start = 0;
        if (i == 1) bad.start = 4;
        if (i == 2) bad.overflow = 0;
        if (i == 3) bad.overflow = 4;
        if (i == 4) bad.step_tokens = 0;
        if (i == 5) bad.step_tokens = (1 << 20) + 1;
        if (i == 6) bad.limit_count = ODMA_LIMITS + 1;
        if (i == 7) bad.limit_count = 1; /* a limit of 0 */
        if (i == 8) {
            bad.limit_count = 2;
            bad.limits_tokens[0] = bad.limits_tokens[1] = 64;
        }
        if (i == 9) bad.overflow_risk = -0.1;
        if (i == 10) bad.overflow_risk = 1.1;
        if (i == 11) bad.overflow_risk = (double)NAN;
        if (i == 12) bad.safety_share = -0.1;
        if (i == 13) bad.safety_share = 0.91;
        if (i == 14) bad.safety_share = (double)NAN;
        if (i == 15) bad.unsure_ratio = 0.5;
        if (i == 16) bad.unsure_ratio = -1;
        if (i == 17) bad.unsure_ratio = (double)NAN;
        if (i == 18) bad.growth = 0.9;
        if (i == 19) bad.growth = 4.1;
        if (i == 20) bad.growth = (double)NAN;
        if (i == 21) bad.tenant_share = 0;
        if (i == 22) bad.tenant_share = 1.1;
        if (i == 23) bad.tenant_share = (double)NAN;
        if (i > 23) name_tenants(&bad);
        if (i == 24) bad.tenant_count = ODMA_TENANTS + 1;
        if (i == 25) bad.tenants[1].name[0] = 0;
        if (i == 26) bad.tenants[1] = bad.tenants[0];
        if (i == 27) bad.tenants[0].guaranteed_share = 0.76; /* above its maximum */
        if (i == 28) bad.tenants[0].guaranteed_share = -0.1;
        if (i == 29) bad.tenants[0].guaranteed_share = (double)NAN;
        if (i == 30) bad.tenants[2].maximum_share = 0;
        if (i == 31) bad.tenants[2].maximum_share = 1.1;
        if (i == 32) bad.tenants[2].maximum_share = (double)NAN;
        if (i == 33) bad.safety_share = 0.26; /* 0.75 are guaranteed */
        GIVES(ODMA_INVALID, odma_policy_check(&bad, reason));
        if (i == 0 || i == 2 || i == 4 || i == 21 || i == 30) continue; /* unset: the default */
        GIVES(ODMA_INVALID, odma_arena_set_policy(arena, NULL, &bad, 0));
    }
    odma_policy good = POLICY;
    OK(odma_policy_check(&good, reason));
    GIVES(ODMA_VERSION, odma_arena_set_policy(arena, NULL, &good, before.version + 1));
    OK(odma_arena_policy(arena, &after));
    CHECK(memcmp(&before, &after, sizeof after) == 0);
    OK(odma_arena_set_policy(arena, NULL, &good, before.version));
    CHECK(good.version == before.version + 1);
    odma_arena_close(arena);
}

static void a_bad_batch_consumes_no_seq(void) {
    odma_arena *arena = fresh();
    uint64_t handle = allocate_one(arena, "a", 100);
    odma_report before = report_of(arena);
    const odma_status expected[] = {ODMA_EPOCH,   ODMA_SEQ_GAP, ODMA_SEQ_OLD, ODMA_INVALID,
                                    ODMA_INVALID, ODMA_INVALID, ODMA_INVALID, ODMA_INVALID,
                                    ODMA_INVALID, ODMA_INVALID, ODMA_INVALID, ODMA_INVALID};
    const uint32_t rule[] = {0,
                             0,
                             0,
                             ODMA_RULE_COMPLETED_SEQ,
                             ODMA_RULE_COUNTS,
                             ODMA_RULE_COUNTS,
                             ODMA_RULE_USED_HANDLE,
                             ODMA_RULE_USED_HANDLE,
                             ODMA_RULE_USED_TOKENS,
                             ODMA_RULE_COMPLETED_SEQ,
                             ODMA_RULE_KIND,
                             ODMA_RULE_KIND};
    for (int i = 0; i < 12; i++) {
        begin_step(arena);
        add_op(allocate_op("b", 100));
        if (i == 0) step.batch.epoch = 2;
        if (i == 1) step.batch.seq = 3;
        if (i == 2) step.batch.seq = 0;
        if (i == 3) step.batch.completed_seq = 2;
        if (i == 4) step.batch.op_count = OPS + 1;
        if (i == 5) step.batch.used_count = REGIONS + 1;
        if (i == 6) step.used[step.batch.used_count++].handle = handle + 1;
        if (i == 7) step.used[0].handle = step.used[1].handle = handle;
        if (i == 7) step.batch.used_count = 2;
        if (i == 8) step.used[step.batch.used_count++] = (odma_used){.handle = handle, .used_tokens = 1 << 20};
        if (i == 9) step.batch.completed_seq = UINT64_MAX;
        if (i == 10) step.ops[0].kind = 0;
        if (i == 11) step.ops[0].kind = 5;
        insist_status(run_step(arena), expected[i], "a bad batch", i);
        if (expected[i] == ODMA_INVALID) CHECK(step.answer.rule == rule[i]);
        odma_report after = report_of(arena);
        CHECK(memcmp(&before, &after, sizeof after) == 0);
        checked(arena);
    }
    begin_step(arena);
    OK(run_step(arena));
    begin_step(arena);
    step.batch.completed_seq = 0; /* it was 1 */
    GIVES(ODMA_INVALID, run_step(arena));
    odma_arena_close(arena);
}

static void a_bad_value_is_the_result_of_its_operation(void) {
    odma_arena *arena = fresh();
    uint64_t handle = allocate_one(arena, "a", 100);
    odma_op good = allocate_op("b", 100);
    struct {
        odma_op op;
        uint32_t reason, rule;
    } cases[] = {
        {free_op(handle + 1, 0), ODMA_REASON_NOT_FOUND, ODMA_RULE_HANDLE_UNKNOWN},
        {free_op(0, 0), ODMA_REASON_NOT_FOUND, ODMA_RULE_HANDLE_UNKNOWN},
        {free_op(UINT64_MAX, 0), ODMA_REASON_NOT_FOUND, ODMA_RULE_HANDLE_UNKNOWN},
        {free_op(handle, (1 << 24) + 1), ODMA_REASON_INVALID, ODMA_RULE_OUTPUT_TOKENS},
        {{.kind = ODMA_OP_FREE, .handle = handle}, ODMA_REASON_INVALID, ODMA_RULE_END},
        {{.kind = ODMA_OP_FREE, .handle = handle, .end = 5}, ODMA_REASON_INVALID, ODMA_RULE_END},
        {extend_op(handle, 0), ODMA_REASON_INVALID, ODMA_RULE_LEAST_TOKENS},
        {extend_op(handle, 2049), ODMA_REASON_INVALID, ODMA_RULE_LEAST_TOKENS},
        {{.kind = ODMA_OP_EXTEND, .handle = handle, .least_tokens = 300, .want_tokens = 299},
         ODMA_REASON_INVALID,
         ODMA_RULE_WANT_TOKENS},
        {{.kind = ODMA_OP_EXTEND, .handle = handle, .least_tokens = 3, .want_tokens = UINT32_MAX},
         ODMA_REASON_INVALID,
         ODMA_RULE_WANT_TOKENS},
        {{.kind = ODMA_OP_TRIM, .handle = handle}, ODMA_REASON_INVALID, ODMA_RULE_TO_TOKENS},
        {{.kind = ODMA_OP_TRIM, .handle = handle, .least_tokens = UINT32_MAX},
         ODMA_REASON_INVALID,
         ODMA_RULE_TO_TOKENS},
        {good, ODMA_REASON_INVALID, ODMA_RULE_REQUEST_ID},
        {good, ODMA_REASON_INVALID, ODMA_RULE_PROMPT_TOKENS},
        {good, ODMA_REASON_INVALID, ODMA_RULE_PROMPT_TOKENS},
        {good, ODMA_REASON_INVALID, ODMA_RULE_PROMPT_TOKENS},
        {good, ODMA_REASON_INVALID, ODMA_RULE_MAX_TOTAL_TOKENS},
        {good, ODMA_REASON_INVALID, ODMA_RULE_MAX_TOTAL_TOKENS},
        {good, ODMA_REASON_INVALID, ODMA_RULE_OVERFLOW_RISK},
        {good, ODMA_REASON_INVALID, ODMA_RULE_OVERFLOW_RISK},
        {good, ODMA_REASON_INVALID, ODMA_RULE_QUANTILES},
        {good, ODMA_REASON_INVALID, ODMA_RULE_QUANTILES},
        {good, ODMA_REASON_INVALID, ODMA_RULE_PADDING},
        {good, ODMA_REASON_INVALID, ODMA_RULE_PADDING},
        {good, ODMA_REASON_INVALID, ODMA_RULE_PADDING},
    };
    memset(cases[12].op.request_id, 0, ODMA_ID_BYTES);
    cases[13].op.prompt_tokens = 0;
    cases[14].op.prompt_tokens = UINT32_MAX;
    cases[15].op.generated_tokens = UINT32_MAX; /* and their sum wraps around */
    cases[16].op.given = ODMA_GIVEN_MAX_TOTAL;
    cases[17].op.max_total_tokens = 256 * 16 + 1;
    cases[18].op.overflow_risk = -1e-300;
    cases[19].op.overflow_risk = (double)NAN;
    for (int i = 0; i < ODMA_QUANTILES; i++) {
        cases[20].op.quantiles[i] = (float)(10 - i);
        cases[21].op.quantiles[i] = i == 3 ? NAN : 5;
    }
    cases[22].op.request_id[ODMA_ID_BYTES - 1] = 'x';
    cases[23].op.request_class[1] = 'x';
    cases[24].op.tenant[ODMA_NAME_BYTES - 1] = 'x';
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin_step(arena);
        add_op(cases[i].op);
        OK(run_step(arena));
        bool same = step.results[0].outcome == ODMA_REFUSED &&
                    step.results[0].reason == cases[i].reason &&
                    step.results[0].rule == cases[i].rule;
        insist(same, "a bad value is refused by its rule: the case is", (int)i);
        CHECK(report_of(arena).live == 1);
        checked(arena);
    }
    odma_arena_close(arena);
}

/* --- what is unset --- */

static void a_zeroed_struct_asks_for_the_defaults(void) {
    odma_arena *arena = NULL;
    odma_geometry geometry = {.blocks = 256};
    odma_engine engine = {0};
    odma_policy made, policy = {0};
    odma_result result;
    unlink(path);
    OK(odma_arena_create(path, &geometry, &arena, reason));
    OK(odma_arena_policy(arena, &made));
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    CHECK(policy.version == made.version + 1 && strcmp(policy.name, "static") == 0);
    policy.version = made.version;
    CHECK(memcmp(&policy, &made, sizeof made) == 0);
    OK(odma_arena_open_epoch(arena, 1, &engine, NULL, NULL, 0));
    OK(odma_arena_engine(arena, &engine));
    CHECK(engine.moves == ODMA_MOVES_NONE && engine.planes == 1);
    OK(odma_arena_geometry(arena, &geometry));
    CHECK(geometry.block_tokens == 16 && geometry.model_length_tokens == 256 * 16);
    OK(odma_geometry_check(&geometry, reason));
    OK(odma_policy_check(&policy, reason));

    odma_op op = {.kind = ODMA_OP_ALLOCATE, .request_id = "a", .prompt_tokens = 10};
    OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
    CHECK(result.outcome == ODMA_PLACED && result.length == 256);
    odma_arena_close(arena);
    OK(odma_arena_attach(path, &(odma_geometry){.blocks = 256}, NULL, &arena, reason));
    checked(arena);
    odma_arena_close(arena);
}

static void a_zero_that_is_meant_is_given(void) {
    odma_arena *arena = fresh();
    uint64_t grows = allocate_one(arena, "grows", 16);
    allocate_one(arena, "behind", 16);
    for (int copies = 0; copies < 2; copies++) {
        begin_step(arena);
        step.batch.given = copies ? 0 : ODMA_GIVEN_MAX_COPY;
        add_op(extend_op(grows, 200));
        OK(run_step(arena));
        CHECK(step.results[0].outcome == (copies ? ODMA_PLACED : ODMA_REFUSED));
        CHECK(copies || step.results[0].reason == ODMA_REASON_COPY_BUDGET);
    }
    odma_policy policy = POLICY;
    policy.start = ODMA_START_QUANTILE;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    for (int given = 0; given < 2; given++) {
        begin_step(arena);
        add_op(allocate_op(given ? "empty answer" : "no prediction", 160));
        step.ops[0].max_total_tokens = 640;
        step.ops[0].given = given ? ODMA_GIVEN_QUANTILES : 0;
        OK(run_step(arena));
        CHECK(step.results[0].length == (given ? 12 : 40)); /* 161 in steps of 64, or all */
    }
    checked(arena);
    odma_arena_close(arena);
}

/* --- epochs, answers, forks --- */

static void an_epoch_ends_with_its_books_and_keeps_what_was_learnt(void) {
    odma_arena *arena = fresh();
    uint64_t handle = allocate_one(arena, "a", 100);
    begin_step(arena);
    add_op(free_op(handle, 40));
    OK(run_step(arena));
    allocate_one(arena, "b", 100);
    OK(odma_arena_end_epoch(arena, EPOCH(1)));
    GIVES(ODMA_EPOCH, run_step(arena));
    odma_report report = report_of(arena);
    CHECK(report.epoch == 0 && report.last_epoch == 1 && report.live == 0 && report.seq == 0);
    CHECK(report.counters.finished == 1 && report.free_blocks == GEOMETRY.blocks);
    OK(odma_arena_open_epoch(arena, 5, &ENGINE, "boot", "other words", 11));
    char words[ODMA_DESCRIPTION_BYTES];
    uint32_t bytes = 0;
    OK(odma_arena_description(arena, words, &bytes));
    CHECK(bytes == 11 && memcmp(words, "other words", 11) == 0);
    static odma_completion completions[ODMA_RING];
    uint32_t count = 0;
    uint64_t ever = 0;
    OK(odma_arena_completions(arena, ODMA_CLASS_POOL, completions, &count, &ever));
    CHECK(count == 1 && completions[0].output_tokens == 40 && !completions[0].censored);
    CHECK(ever == 1 && completions[0].issue >= 1 && completions[0].until >= completions[0].issue);
    allocate_one(arena, "a", 100);
    odma_arena_close(arena);

    OK(odma_arena_attach(path, &GEOMETRY, "another boot", &arena, reason));
    report = report_of(arena);
    CHECK(report.rebooted && report.epoch == 0 && report.last_epoch == 5 && report.live == 0);
    checked(arena);
    odma_arena_close(arena);
}

/* The tail that a trim gives back waits in an entry that never was a region. */
static void an_epoch_ends_while_runs_wait(void) {
    odma_arena *arena = fresh();
    odma_engine engine = ENGINE;
    engine.single_ordered_stream = 0;
    OK(odma_arena_open_epoch(arena, 2, &engine, "boot", NULL, 0));
    uint64_t handle = allocate_one(arena, "a", 500);
    begin_step(arena);
    step.used[step.batch.used_count++] = (odma_used){.handle = handle, .used_tokens = 10};
    add_op((odma_op){.kind = ODMA_OP_TRIM, .handle = handle, .least_tokens = 10});
    OK(run_step(arena));
    CHECK(report_of(arena).waiting == 1);
    OK(odma_arena_end_epoch(arena, EPOCH(2)));
    CHECK(report_of(arena).waiting == 0 && report_of(arena).free_blocks == GEOMETRY.blocks);
    checked(arena);
    odma_arena_close(arena);
    odma_arena_close(attached());
}

/* A region is placed in the small hole, grows out of it and is freed, and its
 * entry serves the next one: more moves in a batch than there are entries. */
static void a_batch_may_move_more_regions_than_live_at_once(void) {
    odma_geometry geometry = GEOMETRY;
    odma_arena *arena = NULL;
    odma_policy policy = POLICY;
    odma_engine engine = ENGINE;
    geometry.max_regions = 3;
    policy.overflow = ODMA_OVERFLOW_RELOCATE;
    engine.moves = ODMA_MOVES_OWN_GROWTH;
    unlink(path);
    OK(odma_arena_create(path, &geometry, &arena, reason));
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 1, &engine, "boot", NULL, 0));
    uint64_t hole = allocate_one(arena, "hole", 64);
    uint64_t wall = allocate_one(arena, "wall", 64);
    begin_step(arena);
    step.batch.max_copy_tokens = 0; /* what holds no tokens needs no copies */
    add_op(free_op(hole, 1));
    for (uint32_t i = 0; i < 10; i++) {
        char id[16];
        snprintf(id, sizeof id, "%u", i);
        add_op(allocate_op(id, 64));
        /* the first slot of the arena again, a generation older */
        uint64_t handle = hole + ((uint64_t)(i + 1) << 20);
        add_op(extend_op(handle, 256));
        add_op(free_op(handle, 1));
    }
    OK(run_step(arena));
    for (uint32_t i = 1; i < step.batch.op_count; i++)
        CHECK(step.results[i].outcome == (i % 3 ? ODMA_PLACED : ODMA_FREED));
    CHECK(report_of(arena).live == 1 && report_of(arena).counters.relocations == 10);
    CHECK(step.answer.copy_count == 0 && step.answer.moved_count == 0);
    OK(odma_arena_unary(arena, EPOCH(1), &(odma_op){.kind = ODMA_OP_FREE, .handle = wall, .end = 1},
                        step.results));
    checked(arena);
    odma_arena_close(arena);
}

static void the_stored_answer_survives_and_knows_its_body(void) {
    odma_arena *arena = fresh();
    uint64_t handle = allocate_one(arena, "a", 100);
    static struct step first;
    first = step;
    CHECK(!first.answer.replayed);
    odma_arena_close(arena);
    arena = attached();
    for (int again = 0; again < 2; again++) {
        memset(step.results, 0xff, sizeof step.results);
        step.ops[0].quantiles[0] = 5; /* predictions are no part of the body */
        for (int i = 1; i < ODMA_QUANTILES; i++) step.ops[0].quantiles[i] = 6;
        OK(again ? odma_arena_replay(arena, &step.batch, &step.answer) : run_step(arena));
        CHECK(step.answer.replayed == 1 && step.answer.seq == 1 && step.answer.result_count == 1);
        CHECK(memcmp(step.results, first.results, sizeof *step.results) == 0);
    }
    struct step other = step;
    for (int i = 0; i < 14; i++) {
        step = other;
        step.batch.ops = step.ops;
        if (i == 0) step.ops[0].prompt_tokens++;
        if (i == 1) step.ops[0].request_id[1] = 'x';
        if (i == 2) step.ops[0].request_class[0] = 'x';
        if (i == 3) step.ops[0].tenant[0] = 'x';
        if (i == 4) step.ops[0].generated_tokens++;
        if (i == 5) step.ops[0].max_total_tokens = 2048;
        if (i == 6) step.ops[0].guess_tokens = 1;
        if (i == 7) step.ops[0].overflow_risk = 0.5;
        if (i == 8) step.ops[0].text_digest[1] = 1;
        if (i == 9) step.batch.pass_refused = 1;
        if (i == 10) step.batch.given = ODMA_GIVEN_MAX_COPY;
        if (i == 11) step.batch.op_count = 0;
        if (i == 12) step.ops[0].given = ODMA_GIVEN_RISK;
        if (i == 13) step.ops[0].given = ODMA_GIVEN_MAX_TOTAL;
        insist_status(run_step(arena), ODMA_SEQ_CHANGED, "another body", i);
        insist_status(odma_arena_replay(arena, &step.batch, &step.answer), ODMA_SEQ_CHANGED,
                      "another body", i);
    }
    begin_step(arena);
    GIVES(ODMA_NOT_FOUND, odma_arena_replay(arena, &step.batch, &step.answer));
    step.batch.seq = 3;
    GIVES(ODMA_SEQ_GAP, odma_arena_replay(arena, &step.batch, &step.answer));
    odma_result result;
    odma_op op = free_op(handle, 1);
    OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
    CHECK(result.outcome == ODMA_FREED);
    step = other;
    OK(run_step(arena));
    CHECK(step.answer.replayed == 1 && step.results[0].handle == handle);
    odma_arena_close(arena);
}

static void a_forked_child_must_attach_for_itself(void) {
    odma_arena *arena = fresh();
    allocate_one(arena, "a", 100);
    begin_step(arena);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        odma_report report;
        odma_arena *own = NULL;
        GIVES(ODMA_FORKED, odma_arena_report(arena, &report));
        GIVES(ODMA_FORKED, run_step(arena));
        GIVES(ODMA_FORKED, odma_arena_check(arena, reason));
        GIVES(ODMA_FORKED, odma_arena_end_epoch(arena, EPOCH(1)));
        GIVES(ODMA_LOCKED, odma_arena_attach(path, NULL, NULL, &own, reason));
        odma_arena_close(arena);
        _exit(0);
    }
    int ended = -1;
    CHECK(waitpid(child, &ended, 0) == child && ended == 0);
    OK(run_step(arena));
    checked(arena);
    odma_arena *second = NULL;
    GIVES(ODMA_LOCKED, odma_arena_attach(path, NULL, NULL, &second, reason));
    odma_arena_close(arena);
}

/* --- random mixes --- */

static odma_region regions[ROOM];
static uint32_t region_count;

static void list_regions(odma_arena *arena) {
    OK(odma_arena_regions(arena, 0, regions, ROOM, &region_count));
    CHECK(region_count <= 2 * REGIONS);
}

static odma_op random_op(void) {
    static uint32_t names;
    const odma_region *region = region_count ? &regions[below(region_count)] : NULL;
    uint64_t handle = region != NULL ? region->handle : below(1000);
    uint32_t length = region != NULL ? region->length * 16 : 16;
    uint32_t choice = below(10);
    if (choice < 3) return free_op(handle, below(500));
    if (choice < 6) return extend_op(handle, length + below(200));
    if (choice < 7)
        return (odma_op){.kind = ODMA_OP_TRIM, .handle = handle, .least_tokens = 1 + below(length)};
    char id[ODMA_ID_BYTES] = {0};
    snprintf(id, sizeof id, "request %u", names++);
    odma_op op = allocate_op(id, 1 + below(400));
    snprintf(op.request_class, sizeof op.request_class, "class %u", below(80));
    snprintf(op.tenant, sizeof op.tenant, "tenant %u", names % 4);
    return op;
}

static void random_step(odma_arena *arena) {
    list_regions(arena);
    begin_step(arena);
    for (uint32_t i = 0; i < region_count; i++) {
        if (regions[i].state != ODMA_REGION_LIVE || below(20) == 0) continue;
        step.used[step.batch.used_count++] =
            (odma_used){.handle = regions[i].handle,
                        .used_tokens = below(regions[i].length * 16 + 1),
                        .pinned = below(30) == 0};
    }
    step.batch.pass_refused = below(2);
    odma_report report = report_of(arena);
    uint32_t behind = (uint32_t)(report.seq - report.completed_seq);
    step.batch.completed_seq = report.completed_seq + below(behind + 1);
    for (uint32_t count = below(OPS / 2); step.batch.op_count < count;) add_op(random_op());
}

/* An engine and a policy for each case: every kind of both comes up. */
static void begin_random(odma_arena *arena, uint32_t number) {
    odma_engine engine = ENGINE;
    odma_policy policy = POLICY;
    engine.moves = 1 + number % 3;
    engine.single_ordered_stream = number / 3 % 2;
    engine.copies_may_overlap = number / 6 % 2;
    policy.start = 1 + number / 2 % 3;
    policy.overflow = 1 + number / 4 % 3;
    policy.safety_share = number % 5 * 0.1;
    policy.limit_count = number % 4;
    for (uint32_t i = 0; i < policy.limit_count; i++) policy.limits_tokens[i] = 100 * (i + 1);
    if (number % 3 != 2) name_tenants(&policy);
    OK(odma_arena_open_epoch(arena, 2 + number, &engine, "boot", NULL, 0));
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
}

static void random_steps_keep_every_rule(void) {
    odma_arena *arena = fresh();
    for (uint32_t number = 0; number < 36; number++) {
        begin_random(arena, number);
        for (int i = 0; i < 150; i++) {
            random_step(arena);
            OK(run_step(arena));
            checked(arena);
            if (below(40) > 0) continue;
            odma_report before = report_of(arena);
            odma_arena_close(arena);
            arena = attached();
            odma_report after = report_of(arena);
            CHECK(memcmp(&before, &after, sizeof after) == 0);
        }
    }
    odma_arena_close(arena);
}

static void the_largest_batch_is_answered(void) {
    odma_geometry geometry = {.blocks = 50000,
                              .block_tokens = 16,
                              .max_regions = ODMA_MAX_OPS,
                              .max_ops = ODMA_MAX_OPS,
                              .max_copies = 1, /* regions without tokens move without copies */
                              .model_length_tokens = 1024};
    odma_arena *arena = NULL;
    odma_policy policy = POLICY;
    unlink(path);
    OK(odma_arena_create(path, &geometry, &arena, reason));
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 1, &ENGINE, "boot", NULL, 0));
    odma_op *ops = calloc(ODMA_MAX_OPS, sizeof *ops);
    odma_used *used = calloc(ODMA_MAX_OPS, sizeof *used);
    odma_result *results = calloc(ODMA_MAX_OPS, sizeof *results);
    odma_copy copy;
    odma_place moved;
    odma_answer answer = {.results = results, .copies = &copy, .moved = &moved};
    odma_batch batch = {.epoch = 1, .seq = 1, .op_count = ODMA_MAX_OPS, .used = used, .ops = ops};
    for (uint32_t i = 0; i < ODMA_MAX_OPS; i++) {
        char id[16];
        snprintf(id, sizeof id, "%u", i);
        ops[i] = allocate_op(id, 64 + i % 65);
    }
    OK(odma_arena_apply(arena, &batch, &answer));
    checked(arena);
    CHECK(answer.result_count == ODMA_MAX_OPS);

    for (uint32_t i = 0; i < ODMA_MAX_OPS; i++) {
        CHECK(results[i].outcome == ODMA_PLACED);
        used[i].handle = results[i].handle;
        ops[i] = i % 2 ? extend_op(results[i].handle, 256) : free_op(results[i].handle, 100);
    }
    batch = (odma_batch){.epoch = 1,
                         .seq = 2,
                         .completed_seq = 1,
                         .used_count = ODMA_MAX_OPS,
                         .op_count = ODMA_MAX_OPS,
                         .used = used,
                         .ops = ops};
    OK(odma_arena_apply(arena, &batch, &answer));
    checked(arena);
    CHECK(answer.copy_count <= 1 && answer.moved_count <= 1);
    OK(odma_arena_apply(arena, &batch, &answer));
    CHECK(answer.replayed == 1);
    free(ops);
    free(used);
    free(results);
    odma_arena_close(arena);
}

/* To relocate takes one dear descriptor and 48 tokens, to slide two neighbours
 * away two descriptors and two tokens: dearer, but it keeps the budget. */
static void a_plan_that_keeps_the_budget_is_found(void) {
    odma_geometry geometry = GEOMETRY;
    odma_engine engine = ENGINE;
    odma_policy policy = POLICY;
    odma_arena *arena = NULL;
    geometry.blocks = 16;
    engine.descriptor_seconds = 1;
    policy.step_tokens = 16;
    unlink(path);
    OK(odma_arena_create(path, &geometry, &arena, reason));
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 1, &engine, "boot", NULL, 0));
    const char *const names[] = {"a", "b", "c", "gap", "wall"};
    uint64_t handles[5];
    for (int i = 0; i < 5; i++) handles[i] = allocate_one(arena, names[i], i == 0 ? 32 : 1);
    begin_step(arena);
    for (uint32_t i = 0; i < 5; i++)
        step.used[step.batch.used_count++] = (odma_used){handles[i], i == 0 ? 48 : 1, 0, 0, 0};
    add_op(free_op(handles[3], 1));
    add_op(extend_op(handles[0], 49));
    step.batch.max_copy_tokens = 10;
    OK(run_step(arena));
    CHECK(step.results[1].outcome == ODMA_PLACED && step.results[1].start == 0);
    CHECK(step.answer.copy_count == 2 && step.answer.moved_count == 2);
    checked(arena);
    odma_arena_close(arena);
}

/* Where copies run in any order, those behind it go elsewhere first. */
static void neighbours_make_way_for_a_region_that_grows(void) {
    odma_engine engine = ENGINE;
    odma_policy policy = POLICY;
    odma_arena *arena = fresh();
    engine.single_ordered_stream = engine.copies_may_overlap = 0;
    policy.step_tokens = 16;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 2, &engine, "boot", NULL, 0));
    const uint32_t prompts[] = {15 * 16, 119 * 16, 7 * 16, 7 * 16};
    const char *const names[] = {"before", "grows", "near", "next"};
    uint64_t handles[4];
    begin_step(arena);
    for (int i = 0; i < 4; i++) {
        add_op(allocate_op(names[i], prompts[i]));
        step.ops[i].max_total_tokens = 4096;
    }
    OK(run_step(arena));
    for (int i = 0; i < 4; i++) handles[i] = step.results[i].handle;
    begin_step(arena);
    add_op(free_op(handles[0], 1));
    OK(run_step(arena));

    begin_step(arena);
    add_op(extend_op(handles[1], 130 * 16));
    step.batch.max_copy_tokens = 8 * 16 - 1;
    OK(run_step(arena));
    CHECK(step.results[0].reason == ODMA_REASON_COPY_BUDGET);
    CHECK(step.results[0].copy_tokens_needed == 8 * 16 && step.answer.copy_count == 0);
    begin_step(arena);
    add_op(extend_op(handles[1], 130 * 16));
    OK(run_step(arena));
    CHECK(step.results[0].reason == ODMA_REASON_WAITS_FOR_COMPLETION);
    CHECK(step.answer.copy_count == 2 && step.answer.moved_count == 2);
    CHECK(step.moved[0].start < 16 && step.moved[1].start < 16);
    checked(arena);
    begin_step(arena);
    add_op(extend_op(handles[1], 130 * 16));
    OK(run_step(arena));
    CHECK(step.results[0].outcome == ODMA_PLACED && step.results[0].start == 16);
    CHECK(step.answer.copy_count == 0);
    checked(arena);
    odma_arena_close(arena);
}

/* So many that memory is fetched ahead, handles of nonsense among them. */
static void batches_on_many_regions_keep_every_rule(void) {
    enum { MANY = 4096, BATCH = 64 };
    odma_geometry geometry = GEOMETRY;
    odma_policy policy = POLICY;
    odma_arena *arena = NULL;
    static uint64_t handles[MANY];
    static odma_op ops[BATCH];
    static odma_result results[BATCH];
    odma_answer answer = {.results = results, .copies = step.copies, .moved = step.moved};
    geometry.blocks = 2 * MANY;
    geometry.max_regions = MANY;
    geometry.max_ops = BATCH;
    unlink(path);
    OK(odma_arena_create(path, &geometry, &arena, reason));
    policy.step_tokens = 16;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 1, &ENGINE, "boot", NULL, 0));
    for (uint64_t seq = 1; seq <= 400; seq++) {
        uint32_t chosen[BATCH];
        for (uint32_t i = 0; i < BATCH; i++) {
            char id[32];
            chosen[i] = below(MANY);
            snprintf(id, sizeof id, "%u-%u", (unsigned)seq, i);
            ops[i] = handles[chosen[i]] == 0 ? allocate_op(id, 1 + below(40))
                                             : free_op(handles[chosen[i]], 1);
            if (below(20) == 0) ops[i] = free_op(below(2) ? UINT64_MAX : below(1 << 20), 1);
            if (ops[i].kind == ODMA_OP_FREE) handles[chosen[i]] = 0;
        }
        odma_batch batch = {.epoch = 1,
                            .seq = seq,
                            .completed_seq = seq - 1,
                            .pass_refused = 1,
                            .op_count = BATCH,
                            .ops = ops};
        OK(odma_arena_apply(arena, &batch, &answer));
        for (uint32_t i = 0; i < BATCH; i++)
            if (results[i].outcome == ODMA_PLACED) handles[chosen[i]] = results[i].handle;
    }
    CHECK(report_of(arena).live > 1024);
    checked(arena);
    odma_arena_close(arena);
    OK(odma_arena_attach(path, &geometry, "boot", &arena, reason));
    checked(arena);
    odma_arena_close(arena);
}

/* --- tenants --- */

static odma_op tenant_op(const char *id, uint32_t prompt_tokens, uint32_t tenant) {
    odma_op op = allocate_op(id, prompt_tokens);
    op.max_total_tokens = prompt_tokens;
    snprintf(op.tenant, sizeof op.tenant, "tenant %u", tenant);
    return op;
}

static odma_result ask(odma_arena *arena, odma_op op) {
    odma_result result;
    OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
    checked(arena);
    return result;
}

static odma_tenant_use use_of(odma_arena *arena, uint32_t tenant) {
    odma_tenant_use uses[ODMA_TENANTS];
    uint32_t count;
    OK(odma_arena_tenants(arena, uses, &count));
    CHECK(tenant < count);
    return uses[tenant];
}

/* Tenant 2 and one without a name fill the arena between them. */
static odma_arena *lent_out(uint64_t *named, uint64_t *other) {
    odma_arena *arena = fresh();
    odma_policy policy = POLICY;
    policy.start = ODMA_START_MAXIMUM;
    name_tenants(&policy);
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    *named = ask(arena, tenant_op("named", 128 * 16, 2)).handle;
    *other = ask(arena, tenant_op("other", 128 * 16, 9)).handle;
    CHECK(*named != 0 && *other != 0 && report_of(arena).free_blocks == 0);
    return arena;
}

static void a_tenant_gets_back_what_it_is_guaranteed(void) {
    uint64_t named, other;
    odma_arena *arena = lent_out(&named, &other);
    odma_result result = ask(arena, tenant_op("mine", 100 * 16, 0));
    CHECK(result.reason == ODMA_REASON_NO_SPACE && result.preempt_handle == other);
    CHECK(use_of(arena, 0).claimed == 100 && use_of(arena, 2).held == 128);
    CHECK(ask(arena, free_op(named, 0)).outcome == ODMA_FREED);
    odma_arena_close(arena);

    arena = attached(); /* the claim stands, and what is free is for it */
    CHECK(ask(arena, tenant_op("late", 16, 2)).reason == ODMA_REASON_CLAIMED);
    CHECK(ask(arena, tenant_op("later", 16, 9)).reason == ODMA_REASON_CLAIMED);
    CHECK(ask(arena, tenant_op("sure", 28 * 16, 1)).outcome == ODMA_PLACED);
    CHECK(ask(arena, tenant_op("more", 65 * 16, 1)).reason == ODMA_REASON_CLAIMED);
    CHECK(ask(arena, tenant_op("mine", 100 * 16, 0)).outcome == ODMA_PLACED);
    CHECK(use_of(arena, 0).claimed == 0 && use_of(arena, 0).held == 100);
    CHECK(ask(arena, free_op(other, 0)).outcome == ODMA_FREED);
    CHECK(ask(arena, tenant_op("late", 16, 2)).outcome == ODMA_PLACED);
    CHECK(ask(arena, tenant_op("most", 93 * 16, 0)).reason == ODMA_REASON_QUOTA);
    CHECK(ask(arena, tenant_op("most", 92 * 16, 0)).outcome == ODMA_PLACED);
    odma_arena_close(arena);
}

static void a_claim_that_nobody_renews_lapses(void) {
    uint64_t named, other;
    odma_arena *arena = lent_out(&named, &other);
    CHECK(ask(arena, tenant_op("mine", 100 * 16, 0)).outcome == ODMA_REFUSED);
    CHECK(ask(arena, free_op(named, 0)).outcome == ODMA_FREED);
    for (int i = ODMA_CLAIM_CALLS / ODMA_CLAIM_TURNS + 1; i < ODMA_CLAIM_CALLS; i++)
        CHECK(ask(arena, tenant_op("late", 16, 2)).reason == ODMA_REASON_CLAIMED);
    CHECK(ask(arena, tenant_op("late", 16, 2)).outcome == ODMA_PLACED);
    odma_arena_close(arena);
}

static void other_tenants_end_a_claim_and_the_same_ones_keep_it(void) {
    uint64_t named, other;
    odma_arena *arena = lent_out(&named, &other);
    CHECK(ask(arena, tenant_op("mine", 100 * 16, 0)).outcome == ODMA_REFUSED);
    odma_policy policy;
    OK(odma_arena_policy(arena, &policy));
    policy.growth = 2;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    CHECK(use_of(arena, 0).claimed == 100);
    policy.tenants[1].maximum_share = 0.9;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    CHECK(use_of(arena, 0).claimed == 0);
    checked(arena);
    odma_arena_close(arena);
}

/* More tenants come and go than there are accounts. */
static void accounts_are_kept_for_any_number_of_tenants(void) {
    odma_arena *arena = fresh();
    odma_policy policy = POLICY;
    policy.start = ODMA_START_MAXIMUM;
    policy.tenant_share = 0.5;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    for (uint32_t i = 0; i < 2000; i++) {
        char id[ODMA_ID_BYTES];
        snprintf(id, sizeof id, "%u", i);
        odma_result first = ask(arena, tenant_op(id, 100 * 16, i));
        CHECK(first.outcome == ODMA_PLACED);
        CHECK(ask(arena, tenant_op("more", 29 * 16, i)).reason == ODMA_REASON_QUOTA);
        CHECK(ask(arena, free_op(first.handle, 0)).outcome == ODMA_FREED);
    }
    odma_arena_close(arena);
}

/* --- dying between two stores --- */

static int stores_to_live = -1;

void before_store(void);

void before_store(void) {
    if (stores_to_live >= 0 && stores_to_live-- == 0) _exit(9);
}

static void copy_file(const char *from, const char *to) {
    int source = open(from, O_RDONLY | O_CLOEXEC);
    int target = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(source >= 0 && target >= 0);
    static char bytes[1 << 20];
    ssize_t count;
    while ((count = read(source, bytes, sizeof bytes)) > 0)
        CHECK(write(target, bytes, (size_t)count) == count);
    CHECK(count == 0 && close(source) == 0 && close(target) == 0);
}

/* Let a child attach and do the step at hand, and die before its `number`th
 * store, counted from its attach (`recovering`) or from the step. */
static bool dies_at_store(int number, bool recovering) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        if (recovering) stores_to_live = number;
        odma_arena *arena = attached();
        if (recovering) _exit(0);
        stores_to_live = number;
        OK(run_step(arena));
        odma_arena_close(arena);
        _exit(0);
    }
    int ended = -1;
    CHECK(waitpid(child, &ended, 0) == child && WIFEXITED(ended));
    CHECK(WEXITSTATUS(ended) == 9 || WEXITSTATUS(ended) == 0);
    return WEXITSTATUS(ended) == 9;
}

static bool is_compacting(void) {
    uint32_t others = 0;
    for (uint32_t i = 0; i < step.answer.copy_count; i++)
        others += step.copies[i].handle != step.results[0].handle;
    return others > 1 && step.answer.moved_count > 1;
}

/* The step at hand, and the books after it. */
static struct step whole;
static odma_region books[ROOM];

/* The answer and the books are those of a process that did not die: the step at hand dies at
 * each of its stores, on books as they are at `saved`. What `hits` finds afterwards is the same. */
static void dies_at_each_store_of_its_step(const char *saved, uint32_t (*hits)(odma_arena *)) {
    whole = step;
    copy_file(saved, path);
    odma_arena *arena = attached();
    OK(run_step(arena));
    list_regions(arena);
    uint32_t book_count = region_count;
    memcpy(books, regions, sizeof books);
    odma_report report = report_of(arena);
    uint32_t found = hits == NULL ? 0 : hits(arena);
    odma_arena_close(arena);

    bool died = true;
    uint32_t before = 0, after = 0, recoveries = 0;
    for (int number = 0; died; number++) {
        copy_file(saved, path);
        step.batch = whole.batch;
        memcpy(step.ops, whole.ops, sizeof step.ops);
        memcpy(step.used, whole.used, sizeof step.used);
        died = dies_at_store(number, false);
        for (int again = number % 61; dies_at_store(again, true); again += 61) recoveries++;
        arena = attached();
        checked(arena);
        bool done = report_of(arena).seq == whole.batch.seq;
        *(done ? &after : &before) += 1;
        CHECK(done || report_of(arena).seq == whole.batch.seq - 1);
        memset(&step.results, 0, sizeof step.results);
        OK(run_step(arena));
        CHECK(step.answer.replayed == (done ? 1 : 0));
        CHECK(memcmp(step.results, whole.results, sizeof step.results) == 0);
        CHECK(step.answer.copy_count == whole.answer.copy_count);
        size_t copy_bytes = whole.answer.copy_count * sizeof *step.copies;
        CHECK(memcmp(step.copies, whole.copies, copy_bytes) == 0);
        list_regions(arena);
        CHECK(region_count == book_count);
        CHECK(memcmp(books, regions, region_count * sizeof *books) == 0);
        odma_report now = report_of(arena);
        now.recovery = report.recovery;
        CHECK(memcmp(&now, &report, sizeof now) == 0);
        CHECK(hits == NULL || hits(arena) == found);
        odma_arena_close(arena);
    }
    CHECK(before > 4 && after > 4 && recoveries > 4);
}

static void a_process_that_dies_at_any_store_has_done_all_or_nothing(void) {
    odma_arena *arena = fresh();
    odma_policy policy = POLICY;
    name_tenants(&policy);
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    char saved[sizeof path + 8];
    snprintf(saved, sizeof saved, "%s.saved", path);
    int steps = 0;
    do { /* until a step slides regions */
        CHECK(steps++ < 1000);
        random_step(arena);
        for (int i = 0; i < 4; i++) add_op(random_op());
        odma_arena_close(arena);
        copy_file(path, saved);
        arena = attached();
        OK(run_step(arena));
    } while (!is_compacting());
    odma_arena_close(arena);
    dies_at_each_store_of_its_step(saved, NULL);
}

/* What a caller can see of the books. */
struct view {
    odma_report report;
    odma_policy policy;
    odma_region regions[ROOM];
    uint32_t count;
    odma_tenant_use uses[ODMA_TENANTS];
    uint32_t tenants;
};

static void look(odma_arena *arena, struct view *view) {
    memset(view, 0, sizeof *view);
    view->report = report_of(arena);
    view->report.recovery = 0;
    OK(odma_arena_policy(arena, &view->policy));
    OK(odma_arena_regions(arena, 0, view->regions, ROOM, &view->count));
    OK(odma_arena_tenants(arena, view->uses, &view->tenants));
}

static void allocates_alone(odma_arena *arena) {
    odma_result result;
    odma_op op = allocate_op("alone", 20);
    OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
    CHECK(result.outcome == ODMA_PLACED);
}

static void claims_alone(odma_arena *arena) {
    odma_result result;
    odma_op op = tenant_op("claim", 128 * 16, 0);
    OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
    CHECK(result.outcome == ODMA_REFUSED && use_of(arena, 0).claimed > 0);
}

static void frees_alone(odma_arena *arena) {
    odma_result result;
    odma_op op = free_op(regions[0].handle, 30);
    OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
    CHECK(result.outcome == ODMA_FREED);
}

static void reconciles(odma_arena *arena) {
    uint64_t freed[REGIONS];
    uint32_t count;
    odma_place kept;
    const odma_region *live = regions;
    while (live->state != ODMA_REGION_LIVE) live++;
    OK(odma_arena_reconcile(arena, EPOCH(1), 0, &live->handle, 1, &kept, freed, &count));
    CHECK(count > 0 && kept.length == live->length);
}

static void sets_a_policy(odma_arena *arena) {
    odma_policy policy = POLICY;
    policy.growth = 2;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
}

static void ends_its_epoch(odma_arena *arena) { OK(odma_arena_end_epoch(arena, EPOCH(1))); }

static void opens_another_epoch(odma_arena *arena) {
    OK(odma_arena_open_epoch(arena, 7, &ENGINE, "boot", "new words", 9));
}

static bool dies_while_it(void (*acts)(odma_arena *), int number) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        odma_arena *arena = attached();
        stores_to_live = number;
        acts(arena);
        odma_arena_close(arena);
        _exit(0);
    }
    int ended = -1;
    CHECK(waitpid(child, &ended, 0) == child && WIFEXITED(ended));
    CHECK(WEXITSTATUS(ended) == 9 || WEXITSTATUS(ended) == 0);
    return WEXITSTATUS(ended) == 9;
}

/* Let each act die at each of its stores, on books as they are at `path`. */
static void dies_in_each(void (*const acts[])(odma_arena *), size_t count) {
    char saved[sizeof path + 8];
    snprintf(saved, sizeof saved, "%s.saved", path);
    copy_file(path, saved);
    static struct view before, after, now;
    odma_arena *arena;
    for (size_t i = 0; i < count; i++) {
        copy_file(saved, path);
        arena = attached();
        look(arena, &before);
        acts[i](arena);
        look(arena, &after);
        odma_arena_close(arena);
        CHECK(memcmp(&before, &after, sizeof before) != 0);

        bool died = true;
        uint32_t undone = 0, done = 0;
        for (int number = 0; died; number++) {
            copy_file(saved, path);
            died = dies_while_it(acts[i], number);
            arena = attached();
            checked(arena);
            look(arena, &now);
            bool is_done = memcmp(&now, &after, sizeof now) == 0;
            CHECK(is_done || memcmp(&now, &before, sizeof now) == 0);
            *(is_done ? &done : &undone) += 1;
            odma_arena_close(arena);
        }
        CHECK(undone > 2 && done > 2);
    }
}

static void a_process_that_dies_in_any_call_has_done_all_or_nothing(void) {
    void (*const acts[])(odma_arena *) = {
        allocates_alone, claims_alone,   frees_alone,        reconciles,
        sets_a_policy,   ends_its_epoch, opens_another_epoch};
    odma_arena *arena = fresh();
    for (int i = 0; i < 12; i++) {
        random_step(arena);
        OK(run_step(arena));
    }
    for (int i = 0; i < 3; i++) allocate_one(arena, (const char *[]){"x", "y", "z"}[i], 20);
    odma_policy policy = POLICY;
    name_tenants(&policy);
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    list_regions(arena);
    for (uint32_t i = 0; use_of(arena, 0).held > 0; i++) ask(arena, free_op(regions[i].handle, 0));
    while (report_of(arena).largest_run > 12) {
        char id[ODMA_ID_BYTES];
        snprintf(id, sizeof id, "lent %u", report_of(arena).live);
        ask(arena, tenant_op(id, (report_of(arena).largest_run - 12) * 16, 9));
    }
    list_regions(arena);
    odma_arena_close(arena);
    dies_in_each(acts, sizeof acts / sizeof *acts);
}
/* --- dying with kept runs --- */

enum { TALK_KEYS = 8 };

/* Keys of talk number `talk`: each names all tokens before it. */
static const uint8_t *keys_of(uint8_t talk) {
    static uint8_t keys[4][TALK_KEYS * ODMA_KEY_BYTES];
    for (uint32_t i = 0; i < TALK_KEYS * ODMA_KEY_BYTES; i++)
        keys[talk][i] = (uint8_t)(i % ODMA_KEY_BYTES < 2 ? i / ODMA_KEY_BYTES + 1 : talk);
    return keys[talk];
}

static odma_op talk_op(const char *id, uint8_t talk, uint32_t granules) {
    odma_op op = allocate_op(id, granules * 64 + 1);
    op.max_total_tokens = granules * 64 + 64;
    op.keys = keys_of(talk);
    op.key_bytes = granules * ODMA_KEY_BYTES;
    return op;
}

static odma_op keep_op(uint64_t handle, uint32_t keep_tokens) {
    odma_op op = free_op(handle, 0);
    op.end = ODMA_END_ABORTED;
    op.keep_tokens = keep_tokens;
    return op;
}

static uint64_t talks(odma_arena *arena, const char *id, uint8_t talk, uint32_t granules) {
    odma_result placed = ask(arena, talk_op(id, talk, granules));
    CHECK(placed.outcome == ODMA_PLACED);
    return placed.handle;
}

/* Of two talks that are kept, of one that runs, and of what is found then. */
static uint32_t hits_of(odma_arena *arena) {
    uint32_t found = 0;
    for (uint8_t talk = 0; talk < 4; talk++) {
        char id[ODMA_ID_BYTES] = "hit 0";
        id[4] = (char)('0' + talk);
        odma_result result = ask(arena, talk_op(id, talk, TALK_KEYS));
        found = found * 16 + (result.outcome == ODMA_PLACED ? result.reused_tokens / 64 : 15);
    }
    return found;
}

/* Two talks are kept, and one runs that may be copied from. Answers its handle. */
static uint64_t begin_talks(odma_arena *arena) {
    CHECK(ask(arena, keep_op(talks(arena, "a", 0, 4), 256)).outcome == ODMA_FREED);
    CHECK(ask(arena, keep_op(talks(arena, "b", 1, 6), 384)).outcome == ODMA_FREED);
    uint64_t runs = talks(arena, "c", 2, 3);
    CHECK(report_of(arena).reuse.kept_runs == 2);
    return runs;
}

static void a_death_loses_nothing_that_was_kept(void) {
    geometry_of_all = &KEEPING;
    odma_arena *arena = fresh();
    char saved[sizeof path + 8];
    snprintf(saved, sizeof saved, "%s.saved", path);
    uint64_t runs = begin_talks(arena);
    begin_step(arena);
    step.used[step.batch.used_count++] =
        (odma_used){.handle = runs, .used_tokens = 193, .shareable_tokens = 193};
    add_op(talk_op("adopts", 0, 6));
    add_op(talk_op("gathers", 2, 3));
    add_op(keep_op(runs, 192));
    add_op(allocate_op("needs room", 256 * 16 - 1500));
    add_op(allocate_op("and more", 300));
    odma_arena_close(arena);
    copy_file(path, saved);
    arena = attached();
    OK(run_step(arena));
    CHECK(step.results[0].reused_tokens == 256 && step.results[1].reused_tokens == 192);
    CHECK(step.results[3].outcome == ODMA_PLACED && step.results[4].outcome == ODMA_PLACED);
    CHECK(report_of(arena).reuse.given_up_tokens > 0);
    odma_arena_close(arena);
    dies_at_each_store_of_its_step(saved, hits_of);
}

static void adopts_alone(odma_arena *arena) {
    odma_result result;
    odma_op op = talk_op("alone", 0, 5);
    OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
    CHECK(result.reused_tokens == 256);
}

static void keeps_alone(odma_arena *arena) {
    odma_result result;
    for (uint32_t i = 0; i < region_count; i++) {
        if (regions[i].state != ODMA_REGION_LIVE) continue;
        odma_op op = keep_op(regions[i].handle, 130);
        OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
        CHECK(result.outcome == ODMA_FREED);
        return;
    }
}

static void a_death_in_any_call_keeps_all_or_nothing(void) {
    void (*const acts[])(odma_arena *) = {adopts_alone, keeps_alone, reconciles, ends_its_epoch,
                                          opens_another_epoch};
    geometry_of_all = &KEEPING;
    odma_arena *arena = fresh();
    begin_talks(arena);
    talks(arena, "d", 3, 2);
    list_regions(arena);
    odma_arena_close(arena);
    dies_in_each(acts, sizeof acts / sizeof *acts);
}

/* --- fencing --- */

static odma_caller owner_1(uint64_t number) {
    return (odma_caller){.epoch = 1, .owner = 1, .number = number};
}

static odma_arena *fenced(void) {
    odma_arena *arena = fresh();
    OK(odma_arena_describe(arena, 1, "an owner", 8));
    return arena;
}

static odma_status allocates_as(odma_arena *arena, odma_caller caller, const char *id,
                                uint32_t prompt_tokens, odma_result *result) {
    odma_op op = allocate_op(id, prompt_tokens);
    return odma_arena_unary(arena, caller, &op, result);
}

static void an_owner_number_shuts_out_all_others(void) {
    odma_arena *arena = fenced();
    odma_result result;
    OK(allocates_as(arena, owner_1(1), "a", 10, &result));
    uint64_t freed[REGIONS];
    uint32_t count;
    struct view before, after;
    look(arena, &before);
    odma_policy policy = POLICY;
    const odma_caller wrong[] = {EPOCH(1), {1, 2, 9}, {2, 1, 9}, owner_1(0)};
    const odma_status given[] = {ODMA_UNFENCED, ODMA_FENCED, ODMA_EPOCH, ODMA_LATE};
    for (int i = 0; i < 4; i++) {
        GIVES(given[i], allocates_as(arena, wrong[i], "b", 10, &result));
        GIVES(given[i], odma_arena_reconcile(arena, wrong[i], 0, NULL, 0, NULL, freed, &count));
        GIVES(given[i], odma_arena_set_policy(arena, &wrong[i], &policy, 0));
        if (wrong[i].number != 0) GIVES(given[i], odma_arena_spend(arena, wrong[i]));
        if (wrong[i].owner != 0) GIVES(given[i], odma_arena_end_epoch(arena, wrong[i]));
        begin_step(arena);
        step.batch.epoch = wrong[i].epoch;
        step.batch.owner = wrong[i].owner;
        step.batch.number = wrong[i].number;
        GIVES(given[i], run_step(arena));
    }
    GIVES(ODMA_INVALID, odma_arena_describe(arena, 0, "", 0));
    GIVES(ODMA_INVALID, odma_arena_describe(arena, (uint64_t)1 << 53, "", 0));
    GIVES(ODMA_INVALID, odma_arena_describe(arena, 2, NULL, 1));
    look(arena, &after);
    CHECK(memcmp(&before, &after, sizeof before) == 0);
    OK(odma_arena_describe(arena, 2, "another", 7));
    CHECK(report_of(arena).number == 0);
    GIVES(ODMA_FENCED, allocates_as(arena, owner_1(2), "b", 10, &result));
    OK(odma_arena_end_epoch(arena, EPOCH(1)));
    GIVES(ODMA_INVALID, odma_arena_describe(arena, 1, "", 0));
    CHECK(report_of(arena).owner == 0);
    checked(arena);
    odma_arena_close(arena);
}

static void a_late_message_changes_nothing(void) {
    odma_arena *arena = fenced();
    odma_result first, again;
    OK(allocates_as(arena, owner_1(3), "a", 10, &first));
    OK(allocates_as(arena, owner_1(3), "a", 10, &again));
    CHECK(again.handle == first.handle && report_of(arena).number == 3);
    GIVES(ODMA_LATE, allocates_as(arena, owner_1(2), "b", 10, &again));

    OK(allocates_as(arena, owner_1(4), "too long", 256 * 16, &again));
    CHECK(again.outcome == ODMA_REFUSED);
    GIVES(ODMA_LATE, allocates_as(arena, owner_1(4), "b", 10, &again));
    OK(odma_arena_spend(arena, owner_1(4)));
    OK(odma_arena_spend(arena, owner_1(5)));
    GIVES(ODMA_LATE, allocates_as(arena, owner_1(5), "b", 10, &again));

    begin_step(arena);
    step.batch.owner = 1;
    step.batch.number = 6;
    OK(run_step(arena));
    OK(run_step(arena));
    CHECK(step.answer.replayed == 1);
    step.batch.number = 7; /* in no fingerprint */
    OK(run_step(arena));
    CHECK(step.answer.replayed == 1 && report_of(arena).number == 6);
    begin_step(arena); /* the next batch under the number of the last */
    step.batch.owner = 1;
    step.batch.number = 6;
    GIVES(ODMA_LATE, run_step(arena));
    step.batch.number = 5;
    GIVES(ODMA_LATE, run_step(arena));
    step.batch.number = 8;
    OK(run_step(arena));
    checked(arena);
    odma_arena_close(arena);
}

static void allocates_by_number(odma_arena *arena) {
    odma_result result;
    OK(allocates_as(arena, owner_1(2), "second", 20, &result));
    CHECK(result.outcome == ODMA_PLACED);
}

static void is_refused_by_number(odma_arena *arena) {
    odma_result result;
    OK(allocates_as(arena, owner_1(2), "too long", 256 * 16, &result));
    CHECK(result.outcome == ODMA_REFUSED);
}

static void reconciles_by_number(odma_arena *arena) {
    uint64_t freed[REGIONS];
    uint32_t count;
    OK(odma_arena_reconcile(arena, owner_1(2), 0, NULL, 0, NULL, freed, &count));
    CHECK(count == 1);
}

static void applies_by_number(odma_arena *arena) {
    begin_step(arena);
    step.batch.owner = 1;
    step.batch.number = 2;
    add_op(allocate_op("in a batch", 20));
    OK(run_step(arena));
}

static void sets_a_policy_by_number(odma_arena *arena) {
    odma_policy policy = POLICY;
    policy.growth = 2;
    OK(odma_arena_set_policy(arena, &(odma_caller){1, 1, 2}, &policy, 0));
}

static void ends_its_epoch_by_number(odma_arena *arena) {
    OK(odma_arena_end_epoch(arena, owner_1(2)));
}

static void spends_a_number(odma_arena *arena) { OK(odma_arena_spend(arena, owner_1(2))); }

static void has_another_owner(odma_arena *arena) {
    OK(odma_arena_describe(arena, 2, "another owner", 13));
}

static void a_number_and_its_effect_are_both_there_or_neither(void) {
    void (*const acts[])(odma_arena *) = {
        allocates_by_number, is_refused_by_number,    reconciles_by_number,
        applies_by_number,   sets_a_policy_by_number, ends_its_epoch_by_number,
        spends_a_number,     has_another_owner};
    odma_arena *arena = fenced();
    odma_result result;
    OK(allocates_as(arena, owner_1(1), "first", 20, &result));
    odma_arena_close(arena);
    dies_in_each(acts, sizeof acts / sizeof *acts);
}

/* --- extremes --- */

static void the_largest_arena_is_usable(void) {
    odma_geometry geometry = {.blocks = ODMA_MAX_BLOCKS,
                              .block_tokens = 16,
                              .max_regions = ODMA_MAX_REGIONS,
                              .max_ops = ODMA_MAX_OPS,
                              .max_copies = ODMA_MAX_COPIES,
                              .model_length_tokens = 1 << 28};
    odma_arena *arena = NULL;
    odma_policy policy = POLICY;
    unlink(path);
    OK(odma_arena_create(path, &geometry, &arena, reason));
    policy.start = ODMA_START_MAXIMUM;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 1, &ENGINE, "boot", NULL, 0));
    uint64_t handle = allocate_one(arena, "all of it", 1);
    CHECK(step.results[0].length == ODMA_MAX_BLOCKS && report_of(arena).free_blocks == 0);

    policy.start = ODMA_START_STEP;
    policy.step_tokens = 1 << 20;
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    begin_step(arena);
    step.used[step.batch.used_count++] = (odma_used){handle, (1U << 28) - 17, 0, 0, 0};
    add_op((odma_op){.kind = ODMA_OP_TRIM, .handle = handle, .least_tokens = (1U << 28) - 16});
    add_op(allocate_op("the rest", 16));
    step.ops[1].max_total_tokens = 16;
    add_op((odma_op){.kind = ODMA_OP_EXTEND,
                     .handle = handle,
                     .least_tokens = 1U << 28,
                     .want_tokens = 1U << 28});
    OK(run_step(arena));
    CHECK(step.results[1].start == ODMA_MAX_BLOCKS - 1);
    CHECK(step.results[2].reason == ODMA_REASON_NO_SPACE);
    CHECK(step.results[2].preempt_handle == step.results[1].handle);
    CHECK(report_of(arena).used_tokens == (1U << 28) - 17);
    checked(arena);
    odma_arena_close(arena);
}

/* Lengths beyond those that have a bin of their own. */
static void long_runs_are_fitted_best_too(void) {
    odma_geometry geometry = GEOMETRY;
    odma_policy policy = POLICY;
    odma_arena *arena = NULL;
    geometry.blocks = 4000000;
    geometry.model_length_tokens = 1 << 26;
    policy.start = ODMA_START_MAXIMUM;
    policy.overflow = ODMA_OVERFLOW_PREEMPT;
    unlink(path);
    OK(odma_arena_create(path, &geometry, &arena, reason));
    OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    OK(odma_arena_open_epoch(arena, 1, &ENGINE, "boot", NULL, 0));
    for (int round = 0; round < 3000; round++) {
        list_regions(arena);
        uint32_t wanted = 1 + below(1U << (1 + below(21))), at = 0, best = UINT32_MAX, longest = 0;
        for (uint32_t i = 0; i <= region_count; i++) {
            uint32_t end = i < region_count ? regions[i].start : geometry.blocks;
            if (end - at >= wanted && end - at < best) best = end - at;
            if (end - at > longest) longest = end - at;
            if (i < region_count) at = end + regions[i].length;
        }
        CHECK(report_of(arena).largest_run == longest);
        odma_result result;
        char id[16];
        snprintf(id, sizeof id, "%d", round);
        odma_op op = allocate_op(id, 1);
        op.max_total_tokens = wanted * 16;
        OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
        if (region_count == REGIONS) {
            CHECK(result.reason == ODMA_REASON_TABLE_FULL);
        } else if (best == UINT32_MAX) {
            CHECK(result.outcome == ODMA_REFUSED);
        } else {
            CHECK(result.outcome == ODMA_PLACED && result.length == wanted);
            uint32_t low = 0, high = geometry.blocks;
            for (uint32_t i = 0; i < region_count; i++) {
                uint32_t end = regions[i].start + regions[i].length;
                if (end <= result.start) low = end;
                if (regions[i].start >= result.start + wanted && regions[i].start < high)
                    high = regions[i].start;
            }
            CHECK(high - low == best);
        }
        if (region_count > 20 + below(40)) {
            op = free_op(regions[below(region_count)].handle, 1);
            OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
            CHECK(result.outcome == ODMA_FREED);
        }
        if (round % 100 == 0) checked(arena);
    }
    odma_arena_close(arena);
}

static double weight_of(odma_arena *arena) {
    static odma_histogram histogram;
    double weight = 0;
    OK(odma_arena_histogram(arena, ODMA_CLASS_POOL, &histogram));
    for (int i = 0; i < ODMA_BINS; i++)
        weight += histogram.output_finished[i] + histogram.output_censored[i];
    return weight;
}

/* Each weighs 2^(-1/512) of the next, for ever: also when all are scaled down,
 * which happens once in 20,480. */
static void old_completions_fade_at_one_pace(void) {
    odma_arena *arena = fresh();
    const double fade = exp2(-1.0 / 512);
    double expected = 0;
    for (uint32_t round = 0; round < 21500; round++) {
        odma_result result;
        odma_op op = allocate_op("again", 1 + below(100));
        OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
        op = free_op(result.handle, below(2000));
        if (below(4) == 0) op.end = ODMA_END_HIT_LIMIT;
        OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
        expected = expected * fade + 1;
        if (round % 50 && round < 20400) continue;
        CHECK(fabs(weight_of(arena) - expected) < 1e-6 * expected);
    }
    checked(arena);
    odma_arena_close(arena);
    arena = attached();
    CHECK(fabs(weight_of(arena) - expected) < 1e-6 * expected);
    odma_arena_close(arena);
}

static void *allocates_and_frees(void *arena) {
    for (uint32_t i = 0; i < 2000; i++) {
        odma_result result;
        char id[32];
        snprintf(id, sizeof id, "%p %u", (void *)&result, i);
        odma_op op = allocate_op(id, 20);
        OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
        if (result.outcome != ODMA_PLACED) continue;
        op = free_op(result.handle, 5);
        OK(odma_arena_unary(arena, EPOCH(1), &op, &result));
        CHECK(result.outcome == ODMA_FREED);
    }
    return NULL;
}

static void *applies_batches(void *arena) {
    for (uint32_t i = 0; i < 300; i++) {
        uint64_t handle = allocate_one(arena, "batched", 20);
        begin_step(arena);
        add_op(free_op(handle, 5));
        OK(run_step(arena));
    }
    return NULL;
}

static void *reads(void *arena) {
    static odma_region listed[ROOM];
    static odma_histogram histogram;
    static const char name[ODMA_NAME_BYTES] = "chat";
    for (uint32_t i = 0; i < 300; i++) {
        uint32_t count, classes;
        odma_policy policy;
        odma_report report = report_of(arena);
        CHECK(report.live <= REGIONS);
        OK(odma_arena_regions(arena, 0, listed, ROOM, &count));
        OK(odma_arena_histogram(arena, ODMA_CLASS_POOL, &histogram));
        OK(odma_arena_class_index(arena, name, &classes));
        OK(odma_arena_policy(arena, &policy));
        OK(odma_arena_set_policy(arena, NULL, &policy, 0));
    }
    return NULL;
}

/* Compiled with the thread sanitizer too. */
static void threads_take_turns(void) {
    odma_arena *arena = fresh();
    void *(*const work[6])(void *) = {applies_batches,     reads,
                                      allocates_and_frees, allocates_and_frees,
                                      allocates_and_frees, allocates_and_frees};
    pthread_t threads[6];
    for (int i = 0; i < 6; i++) CHECK(pthread_create(&threads[i], NULL, work[i], arena) == 0);
    for (int i = 0; i < 100; i++) checked(arena);
    for (int i = 0; i < 6; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    odma_report report = report_of(arena);
    CHECK(report.live == 0 && report.free_blocks == GEOMETRY.blocks);
    CHECK(report.counters.allocates == report.counters.frees && report.counters.frees > 2000);
    checked(arena);
    odma_arena_close(arena);
}

/* --- limits --- */

static double waste_of(const double *weights, const uint32_t *upper, const double *tolls,
                       uint32_t bins, const uint32_t *limits, uint32_t count) {
    double waste = 0;
    for (uint32_t i = 0; i < bins; i++) {
        uint32_t k = 0;
        while (k < count && limits[k] < upper[i]) k++;
        CHECK(k < count);
        waste += weights[i] * (limits[k] - upper[i]);
        if (limits[k] == upper[i] && k + 1 < count) waste += tolls[i];
    }
    return waste;
}

/* Try every choice of at most `most` bins that holds the last one. */
static double least_waste(const double *weights, const uint32_t *upper, const double *tolls,
                          uint32_t bins, uint32_t most) {
    double least = INFINITY;
    for (uint32_t choice = 0; choice < 1U << (bins - 1); choice++) {
        uint32_t limits[16], count = 0;
        for (uint32_t i = 0; i < bins; i++)
            if (i == bins - 1 || choice >> i & 1) limits[count++] = upper[i];
        if (count > most) continue;
        double waste = waste_of(weights, upper, tolls, bins, limits, count);
        if (waste < least) least = waste;
    }
    return least;
}

static void the_best_limits_are_the_best_of_all(void) {
    for (int round = 0; round < 600; round++) {
        double weights[10], tolls[10], waste = -1;
        bool free = below(2);
        uint32_t upper[10], limits[ODMA_LIMITS], found = 0, last = 0;
        uint32_t bins = 1 + below(10), most = 1 + below(6);
        for (uint32_t i = 0; i < bins; i++) {
            weights[i] = below(3) ? below(50) : 0;
            tolls[i] = free || below(3) == 0 ? 0 : below(2000);
            last = upper[i] = last + 1 + below(100);
        }
        OK(odma_optimal_limits(weights, upper, free ? NULL : tolls, bins, most, limits, &found,
                               &waste));
        CHECK(found >= 1 && found <= most && limits[found - 1] == upper[bins - 1]);
        for (uint32_t i = 1; i < found; i++) CHECK(limits[i - 1] < limits[i]);
        for (uint32_t i = 0; i < found; i++) {
            uint32_t k = 0;
            while (k < bins && upper[k] != limits[i]) k++;
            CHECK(k < bins);
        }
        CHECK(fabs(waste - waste_of(weights, upper, tolls, bins, limits, found)) < 1e-6);
        CHECK(fabs(waste - least_waste(weights, upper, tolls, bins, most)) < 1e-6);
    }
}

static void limits_of_nonsense_are_invalid(void) {
    double weights[4] = {1, 1, 1, 1}, waste;
    uint32_t upper[4] = {1, 2, 3, 4}, limits[ODMA_LIMITS], found;
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, NULL, 0, 1, limits, &found, &waste));
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, NULL, 4097, 1, limits, &found, &waste));
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, NULL, 4, 0, limits, &found, &waste));
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, NULL, 4, 17, limits, &found, &waste));
    weights[2] = -1;
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, NULL, 4, 2, limits, &found, &waste));
    weights[2] = (double)NAN;
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, NULL, 4, 2, limits, &found, &waste));
    weights[2] = 1;
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, (double[4]){0, -1, 0, 0}, 4, 2, limits,
                                            &found, &waste));
    upper[2] = 2;
    GIVES(ODMA_INVALID, odma_optimal_limits(weights, upper, NULL, 4, 2, limits, &found, &waste));
}

static void a_status_has_a_name(void) {
    for (int i = -1; i < 40; i++) {
        const char *name = odma_status_name((odma_status)i);
        CHECK(name != NULL && name[0] != 0);
    }
}

#define FACT(name) {#name, name}

static const struct {
    const char *name;
    void (*test)(void);
} FACTS[] = {
    FACT(an_arena_is_made_once_and_attached_once),
    FACT(a_file_that_is_not_ours_is_foreign),
    FACT(a_file_of_another_size_is_corrupt_and_stays_as_it_is),
    FACT(a_file_that_shrinks_under_an_arena_breaks_it),
    FACT(a_file_that_has_shrunk_is_found_by_a_check),
    FACT(a_wild_byte_never_goes_unnoticed),
    FACT(a_null_is_invalid),
    FACT(a_bad_geometry_makes_no_file),
    FACT(a_bad_engine_or_epoch_changes_nothing),
    FACT(a_bad_policy_is_not_installed),
    FACT(a_bad_batch_consumes_no_seq),
    FACT(a_bad_value_is_the_result_of_its_operation),
    FACT(a_zeroed_struct_asks_for_the_defaults),
    FACT(a_zero_that_is_meant_is_given),
    FACT(an_epoch_ends_with_its_books_and_keeps_what_was_learnt),
    FACT(an_epoch_ends_while_runs_wait),
    FACT(a_batch_may_move_more_regions_than_live_at_once),
    FACT(the_stored_answer_survives_and_knows_its_body),
    FACT(a_forked_child_must_attach_for_itself),
    FACT(random_steps_keep_every_rule),
    FACT(the_largest_batch_is_answered),
    FACT(a_plan_that_keeps_the_budget_is_found),
    FACT(neighbours_make_way_for_a_region_that_grows),
    FACT(batches_on_many_regions_keep_every_rule),
    FACT(a_tenant_gets_back_what_it_is_guaranteed),
    FACT(a_claim_that_nobody_renews_lapses),
    FACT(other_tenants_end_a_claim_and_the_same_ones_keep_it),
    FACT(accounts_are_kept_for_any_number_of_tenants),
    FACT(a_process_that_dies_at_any_store_has_done_all_or_nothing),
    FACT(a_process_that_dies_in_any_call_has_done_all_or_nothing),
    FACT(a_death_loses_nothing_that_was_kept),
    FACT(a_death_in_any_call_keeps_all_or_nothing),
    FACT(an_owner_number_shuts_out_all_others),
    FACT(a_late_message_changes_nothing),
    FACT(a_number_and_its_effect_are_both_there_or_neither),
    FACT(the_largest_arena_is_usable),
    FACT(long_runs_are_fitted_best_too),
    FACT(old_completions_fade_at_one_pace),
    FACT(threads_take_turns),
    FACT(the_best_limits_are_the_best_of_all),
    FACT(limits_of_nonsense_are_invalid),
    FACT(a_status_has_a_name),
};

/* test_arena DIRECTORY FACT: exit 0 if it holds. test_arena: list the facts. */
int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof FACTS / sizeof *FACTS; i++) {
        if (argc < 3) {
            puts(FACTS[i].name);
        } else if (strcmp(argv[2], FACTS[i].name) == 0) {
            snprintf(path, sizeof path, "%s/arena", argv[1]);
            FACTS[i].test();
            return 0;
        }
    }
    return argc < 3 ? 0 : 2;
}
