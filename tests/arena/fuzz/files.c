/* files.c - any bytes are damage to a file that was in use.
 *
 * The damaged file is attached or refused with a reason; if it is attached, its
 * books keep every rule and take more batches. Two inputs in three have their sums
 * mended afterwards, or the sum of the books alone would refuse all.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arena/arena.h"
#include "fuzz.h"

enum { REGIONS = 6, OPS = 8, COPIES = 16 };

static const odma_geometry GEOMETRY = {.blocks = 48,
                                       .block_tokens = 16,
                                       .max_regions = REGIONS,
                                       .max_ops = OPS,
                                       .max_copies = COPIES,
                                       .model_length_tokens = 512,
                                       .digest = 1};

static char path[64];
static char reason[ODMA_REASON_BYTES];
static uint8_t *pristine;
static size_t file_bytes, books_offset, books_bytes;
static uint64_t epoch = 1;

static void insist(bool fact, const char *what) {
    if (fact) return;
    fprintf(stderr, "%s: %s\n", what, reason);
    abort();
}

static odma_status apply(odma_arena *arena, uint64_t seq, odma_op *ops, uint32_t count) {
    static odma_result results[OPS];
    static odma_copy copies[COPIES];
    static odma_place moved[COPIES];
    odma_answer answer = {.results = results, .copies = copies, .moved = moved};
    odma_batch batch = {.epoch = epoch,
                        .seq = seq,
                        .completed_seq = seq - 1,
                        .op_count = count,
                        .ops = ops};
    return odma_arena_apply(arena, &batch, &answer);
}

static void fill(odma_op *ops, uint32_t count, char first) {
    memset(ops, 0, count * sizeof *ops);
    for (uint32_t i = 0; i < count; i++)
        ops[i] = (odma_op){.kind = ODMA_OP_ALLOCATE,
                           .prompt_tokens = 40 + 8 * i,
                           .max_total_tokens = 128,
                           .request_id = {(char)(first + (char)i)}};
}

static void write_file(const uint8_t *bytes, size_t size) {
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    insist(file >= 0 && write(file, bytes, size) == (ssize_t)size, "write");
    close(file);
}

/* The sum of record.c, written once more: a file whose sums agree gets further. */
static void mend_books_sum(uint8_t *bytes) {
    uint64_t sum = 0;
    for (uint64_t place = 0; place < books_bytes; place += 8) {
        uint64_t word;
        memcpy(&word, bytes + books_offset + place, 8);
        word ^= (place + 1) * 0x9e3779b97f4a7c15ULL;
        word ^= word >> 32;
        sum ^= word * 0xd6e8feb86659fd93ULL;
    }
    memcpy(bytes + 2048 + 8, &sum, 8);
}

/* That it is the same sum, or nothing would be reached. */
static void check_the_sum(uint8_t *bytes) {
    uint64_t stored, mended;
    memcpy(&stored, bytes + 2048 + 8, 8);
    mend_books_sum(bytes);
    memcpy(&mended, bytes + 2048 + 8, 8);
    insist(stored == mended, "the sum of the books");
}

static void make_pristine(void) {
    odma_arena *arena = NULL;
    odma_engine engine = {.moves = ODMA_MOVES_ANY,
                          .single_ordered_stream = 0,
                          .copies_may_overlap = 1,
                          .planes = 2};
    odma_op ops[OPS];
    unlink(path);
    insist(odma_arena_create(path, &GEOMETRY, &arena, reason) == ODMA_OK, "create");
    insist(odma_arena_open_epoch(arena, 1, &engine, NULL, "x", 1) == ODMA_OK, "open");
    fill(ops, 5, 'a');
    insist(apply(arena, 1, ops, 5) == ODMA_OK, "first");
    ops[0] = (odma_op){
        .kind = ODMA_OP_FREE, .handle = (uint64_t)1 << SLOT_BITS | 1, .end = ODMA_END_FINISHED};
    insist(apply(arena, 2, ops, 1) == ODMA_OK, "second");
    file_bytes = arena->layout.file_bytes;
    books_offset = arena->layout.books_offset;
    books_bytes = arena->layout.books_bytes;
    odma_arena_close(arena);
    pristine = malloc(file_bytes);
    int file = open(path, O_RDONLY);
    insist(pristine != NULL && read(file, pristine, file_bytes) == (ssize_t)file_bytes, "read");
    close(file);
    check_the_sum(pristine);
}

/* Damage: (where, 3 bytes; value, 1 byte) again and again. Places are folded
 * into the parts of the file that mean something. */
static size_t damage(uint8_t *bytes, const uint8_t *data, size_t size) {
    size_t length = file_bytes, slots = sizeof(struct books);
    uint32_t mend = size > 0 ? data[0] % 3 : 0;
    for (size_t i = 1; i + 4 <= size; i += 4) {
        size_t where = (size_t)data[i] << 16 | (size_t)data[i + 1] << 8 | data[i + 2];
        switch (data[i] % 5) {
            case 0: where %= 4096; break;
            case 1: where = 4096 + where % (books_offset - 4096); break;
            case 2: where = books_offset + where % 512; break;
            case 3: where = books_offset + slots + where % (books_bytes - slots); break;
            default: where %= file_bytes;
        }
        bytes[where] = data[i + 3];
        if (data[i] == 255) length = where;
    }
    if (mend != 0) mend_books_sum(bytes);
    return length;
}

static void go_on(odma_arena *arena) {
    odma_report report;
    odma_op ops[3];
    insist(odma_arena_check(arena, reason) == ODMA_OK, "check");
    insist(odma_arena_report(arena, &report) == ODMA_OK, "report");
    epoch = report.epoch;
    for (uint64_t seq = report.seq + 1; seq < report.seq + 4; seq++) {
        fill(ops, 3, (char)('h' + 3 * (char)(seq - report.seq)));
        odma_status status = apply(arena, seq, ops, 3);
        insist(status == ODMA_OK || status == ODMA_EPOCH || status == ODMA_INVALID ||
                   status == ODMA_SEQ_GAP || status == ODMA_SEQ_OLD,
               odma_status_name(status));
        insist(odma_arena_check(arena, reason) == ODMA_OK, "check");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    snprintf(path, sizeof path, "/dev/shm/odma-fuzz-file-%d", (int)getpid());
    if (pristine == NULL) make_pristine();
    uint8_t *bytes = malloc(file_bytes);
    insist(bytes != NULL, "memory");
    memcpy(bytes, pristine, file_bytes);
    size_t length = damage(bytes, data, size);
    write_file(bytes, length);
    free(bytes);

    odma_arena *arena = NULL;
    reason[0] = 0;
    odma_status status = odma_arena_attach(path, NULL, NULL, &arena, reason);
    insist(status == ODMA_OK || reason[0] != 0, "a refusal has a reason");
    if (status == ODMA_OK) {
        go_on(arena);
        odma_arena_close(arena);
    }
    unlink(path);
    return 0;
}
