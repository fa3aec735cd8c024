/* file.c - the file of a pool: how it is laid out, and how it changes.
 *
 *   Rule 1   Only store() writes the mapped file.
 *   Rule 2   A commit writes a record, then its commit word, then the books,
 *            then the progress (lsn, sum). What the file says is decided by
 *            the commit word alone: before it nothing happened, after it
 *            everything did, for the next attach applies the record again.
 *   Rule 3   `sum` is the exclusive or of a hash of each 8-byte word of the
 *            books and its place, so it is kept up with the changed words
 *            only, and a wild byte anywhere in the books is found at attach.
 *
 * A process that is killed leaves every store it has made and none it has not,
 * so the order of stores is the whole of crash safety, and the compiler is the
 * only one to be kept from changing it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arena.h"

#ifdef ODMA_STORE_HOOK
void ODMA_STORE_HOOK(void);
#endif

enum { HEADER_BYTES = 4096, PAGE_BYTES = 4096 };

static const char MAGIC[8] = "odma kv";

struct header {
    char magic[8];
    uint32_t layout_version;
    uint32_t pad;
    odma_geometry geometry;
    uint64_t sum; /* of all above */
};

struct progress {
    uint64_t lsn;
    uint64_t sum;
};

enum { PROGRESS_OFFSET = 2048 };

struct record {
    uint64_t commit; /* the lsn, once the rest is written; else 0 */
    uint64_t sum;    /* of all below and of the answer */
    uint64_t lsn;
    uint64_t books_sum;
    uint64_t changes_sum; /* of the granules, at their places in the books */
    uint64_t epoch, seq;
    uint64_t fingerprint[2];
    uint32_t policy_version;
    uint32_t results, copies, moved; /* counts */
    uint32_t granules;
    uint32_t pad;
};

static uint64_t align_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

odma_status refuse(char reason[ODMA_REASON_BYTES], odma_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (reason != NULL) vsnprintf(reason, ODMA_REASON_BYTES, format, arguments);
    va_end(arguments);
    return status;
}

/* --- sums --- */

uint64_t hash_bytes(const void *bytes, size_t count) {
    const uint8_t *from = bytes;
    uint64_t hash = count;
    for (; count >= 8; count -= 8, from += 8) {
        uint64_t word;
        memcpy(&word, from, 8);
        hash = stir(hash, word);
    }
    uint64_t rest = 0;
    memcpy(&rest, from, count);
    return mix(stir(hash, rest));
}

static inline uint64_t word_at(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

/* What the place of a word is mixed in by: from one word to the next it grows. */
static const uint64_t PLACE_STEP = 0x9e3779b97f4a7c15ULL;

/* A bijection of the word for each place, so one changed word is always seen. */
static inline uint64_t word_sum(uint64_t place_key, uint64_t word) {
    word ^= place_key;
    word ^= word >> 32;
    return word * 0xd6e8feb86659fd93ULL;
}

/* Sum of a granule that belongs at `place`, its words side by side. */
static inline uint64_t granule_sum(const uint8_t *bytes, uint64_t place) {
    uint64_t key = (place + 1) * PLACE_STEP;
    return word_sum(key, word_at(bytes)) ^ word_sum(key + 8 * PLACE_STEP, word_at(bytes + 8)) ^
           word_sum(key + 16 * PLACE_STEP, word_at(bytes + 16)) ^
           word_sum(key + 24 * PLACE_STEP, word_at(bytes + 24));
}

/* Sum of `count` bytes, whole words, that belong at `place`. */
static inline uint64_t place_sum(const void *from, uint64_t place, uint64_t count) {
    const uint8_t *bytes = from;
    uint64_t sum = 0, i = 0;
    for (; i + GRANULE_BYTES <= count; i += GRANULE_BYTES) sum ^= granule_sum(bytes + i, place + i);
    for (; i < count; i += 8) sum ^= word_sum((place + i + 1) * PLACE_STEP, word_at(bytes + i));
    return sum;
}

/* --- layout --- */

static const char *geometry_fault(const odma_geometry *geometry) {
    uint32_t tokens = geometry->block_tokens;
    if (geometry->blocks < 1 || geometry->blocks > ODMA_MAX_BLOCKS) return "blocks: 1 to 16777216";
    if (tokens < 1 || tokens > 1024 || (tokens & (tokens - 1)) != 0)
        return "block_tokens: a power of two from 1 to 1024";
    if ((uint64_t)geometry->blocks * tokens > (1U << 28)) return "blocks: at most 2^28 tokens";
    if (geometry->max_regions < 1 || geometry->max_regions > ODMA_MAX_REGIONS)
        return "max_regions: 1 to 65536";
    if (geometry->max_ops < 1 || geometry->max_ops > ODMA_MAX_OPS) return "max_ops: 1 to 4096";
    if (geometry->max_copies < 1 || geometry->max_copies > ODMA_MAX_COPIES)
        return "max_copies: 1 to 4096";
    if (geometry->model_length_tokens < 1 || geometry->model_length_tokens > (1U << 28))
        return "model_length_tokens: 1 to 2^28";
    return NULL;
}

/* The most granules that one commit may change: every region's used; for each
 * operation a slot, a request, a tail that waits and what is learnt; for each
 * move a slot and a waiting one; the head of the books with its description;
 * or a whole histogram. */
static uint32_t most_granules(const odma_geometry *geometry, uint32_t table_size) {
    uint32_t head = (uint32_t)(offsetof(struct books, stats) / GRANULE_BYTES) + 1;
    uint32_t histogram = (uint32_t)(sizeof(struct stats) / GRANULE_BYTES) + 1;
    return 2 * table_size + 18 * geometry->max_ops + 2 * geometry->max_copies + head + histogram;
}

static struct layout layout_of(const odma_geometry *geometry) {
    struct layout layout = {.table_size = 2 * geometry->max_regions};
    layout.record_granules = most_granules(geometry, layout.table_size);
    layout.results = align_up(sizeof(struct record), 64);
    layout.copies = layout.results + geometry->max_ops * sizeof(odma_result);
    layout.moved = layout.copies + geometry->max_copies * sizeof(odma_copy);
    layout.indexes = layout.moved + geometry->max_copies * sizeof(odma_place);
    layout.granules = align_up(layout.indexes + layout.record_granules * sizeof(uint32_t), 64);
    layout.record_bytes =
        align_up(layout.granules + (uint64_t)layout.record_granules * GRANULE_BYTES, PAGE_BYTES);
    layout.books_offset = HEADER_BYTES + RECORDS * layout.record_bytes;
    layout.books_bytes = sizeof(struct books) +
                         layout.table_size * (uint64_t)(sizeof(struct cell) + ODMA_ID_BYTES +
                                                        sizeof(struct prediction));
    layout.file_bytes = align_up(layout.books_offset + layout.books_bytes, PAGE_BYTES);
    return layout;
}

/* --- stores and commits --- */

static inline void store(odma_arena *arena, uint64_t offset, const void *from, size_t bytes) {
#ifdef ODMA_STORE_HOOK
    ODMA_STORE_HOOK();
#endif
    memcpy(arena->map + offset, from, bytes);
}

/* A store of one word that is made after all earlier ones and before all later. */
static inline void store_in_turn(odma_arena *arena, uint64_t offset, const uint64_t *word) {
    atomic_signal_fence(memory_order_seq_cst);
    store(arena, offset, word, sizeof *word);
    atomic_signal_fence(memory_order_seq_cst);
}

static uint64_t record_offset(const odma_arena *arena, uint32_t index) {
    return HEADER_BYTES + index * arena->layout.record_bytes;
}

void mark(odma_arena *arena, const void *object, size_t bytes) {
    size_t offset = (size_t)((const uint8_t *)object - (const uint8_t *)arena->books);
    uint32_t last = (uint32_t)((offset + bytes - 1) / GRANULE_BYTES);
    for (uint32_t i = (uint32_t)(offset / GRANULE_BYTES); i <= last; i++) mark_granule(arena, i);
}

/* Whether two granules differ. */
static inline bool differ(const uint8_t *a, const uint8_t *b) {
    return ((word_at(a) ^ word_at(b)) | (word_at(a + 8) ^ word_at(b + 8)) |
            (word_at(a + 16) ^ word_at(b + 16)) | (word_at(a + 24) ^ word_at(b + 24))) != 0;
}

/* Overwrite whole granules of the books, and mark those that change. */
void put(odma_arena *arena, void *object, const void *from, size_t bytes) {
    uint8_t *into = object;
    const uint8_t *source = from;
    uint32_t granule = (uint32_t)((into - (uint8_t *)arena->books) / GRANULE_BYTES);
    for (size_t i = 0; i < bytes; i += GRANULE_BYTES, granule++) {
        if (!differ(into + i, source + i)) continue;
        memcpy(into + i, source + i, GRANULE_BYTES);
        mark_granule(arena, granule);
    }
}

/* Write the granules that differ from the file's into the record at `at`, and
 * add up what the books will sum to. */
static void store_changes(odma_arena *arena, uint64_t at, struct record *record) {
    const uint8_t *books = (const uint8_t *)arena->books;
    const uint8_t *file = arena->map + arena->layout.books_offset;
    uint64_t indexes = at + arena->layout.indexes, granules = at + arena->layout.granules;
    uint64_t books_sum = arena->sum, changes_sum = 0;
    uint32_t count = 0;
    for (uint32_t i = 0; i < arena->dirty_count; i++) {
        uint32_t granule = arena->dirty[i];
        uint64_t offset = (uint64_t)granule * GRANULE_BYTES;
        const uint8_t *now = books + offset, *before = file + offset;
        arena->dirty_bits[granule / 64] &= ~((uint64_t)1 << (granule % 64));
        if (!differ(now, before)) continue;
        uint64_t sum = granule_sum(now, offset);
        changes_sum ^= sum;
        books_sum ^= sum ^ granule_sum(before, offset);
        store(arena, indexes + count * sizeof granule, &granule, sizeof granule);
        store(arena, granules + (uint64_t)count * GRANULE_BYTES, now, GRANULE_BYTES);
        count++;
    }
    arena->dirty_count = 0;
    record->books_sum = books_sum;
    record->changes_sum = changes_sum;
    record->granules = count;
}

static uint64_t record_sum(const struct record *record, const void *results, const void *copies,
                           const void *moved) {
    const uint64_t apart = (uint64_t)1 << 40; /* places no two lists share */
    return place_sum(&record->lsn, 0, sizeof *record - offsetof(struct record, lsn)) ^
           place_sum(results, apart, record->results * sizeof(odma_result)) ^
           place_sum(copies, 2 * apart, record->copies * sizeof(odma_copy)) ^
           place_sum(moved, 3 * apart, record->moved * sizeof(odma_place));
}

/* Copy a record's granules into the books, then say so. */
static void apply_changes(odma_arena *arena, uint64_t at) {
    const struct record *record = (const void *)(arena->map + at);
    const uint32_t *indexes = (const void *)(arena->map + at + arena->layout.indexes);
    const uint8_t *granules = arena->map + at + arena->layout.granules;
    for (uint32_t i = 0; i < record->granules; i++)
        store(arena, arena->layout.books_offset + (uint64_t)indexes[i] * GRANULE_BYTES,
              granules + (uint64_t)i * GRANULE_BYTES, GRANULE_BYTES);
    store_in_turn(arena, PROGRESS_OFFSET + offsetof(struct progress, sum), &record->books_sum);
    store_in_turn(arena, PROGRESS_OFFSET + offsetof(struct progress, lsn), &record->lsn);
    arena->lsn = record->lsn;
    arena->sum = record->books_sum;
}

/* Its size is its end; to go there takes half the time of fstat(). */
static bool file_is_whole(const odma_arena *arena) {
    return lseek(arena->descriptor, 0, SEEK_END) == (off_t)arena->layout.file_bytes;
}

static odma_status commit_record(odma_arena *arena, uint32_t index, struct record *record) {
    if (!file_is_whole(arena)) {
        arena->broken = true;
        return ODMA_BROKEN;
    }
    const struct layout *layout = &arena->layout;
    uint64_t at = record_offset(arena, index);
    const uint64_t none = 0;
    store_in_turn(arena, at, &none);
    store_changes(arena, at, record);
    record->lsn = arena->lsn + 1;
    record->epoch = arena->books->epoch;
    record->policy_version = arena->books->policy.version;
    record->sum = record_sum(record, arena->results, arena->copies, arena->places);
    store(arena, at + layout->results, arena->results, record->results * sizeof(odma_result));
    store(arena, at + layout->copies, arena->copies, record->copies * sizeof(odma_copy));
    store(arena, at + layout->moved, arena->places, record->moved * sizeof(odma_place));
    store(arena, at + 8, &record->sum, sizeof *record - 8);
    store_in_turn(arena, at, &record->lsn);

    apply_changes(arena, at);
    return ODMA_OK;
}

odma_status commit(odma_arena *arena) {
    struct record record = {0};
    return commit_record(arena, RECORD_OTHER, &record);
}

odma_status commit_batch(odma_arena *arena, uint64_t seq, const uint64_t fingerprint[2],
                         uint32_t results) {
    struct record record = {.seq = seq,
                            .fingerprint = {fingerprint[0], fingerprint[1]},
                            .results = results,
                            .copies = arena->copy_count,
                            .moved = arena->place_count};
    return commit_record(arena, (uint32_t)(seq % 2), &record);
}

/* --- stored records --- */

/* The record at `index` if it was committed and is whole, else NULL. */
static const struct record *whole_record(const odma_arena *arena, uint32_t index) {
    const uint8_t *at = arena->map + record_offset(arena, index);
    const struct record *record = (const void *)at;
    const struct layout *layout = &arena->layout;
    if (record->commit == 0 || record->commit != record->lsn) return NULL;
    if (record->results > arena->geometry.max_ops || record->copies > arena->geometry.max_copies ||
        record->moved > arena->geometry.max_copies || record->granules > layout->record_granules)
        return NULL;
    if (record->sum !=
        record_sum(record, at + layout->results, at + layout->copies, at + layout->moved))
        return NULL;
    const uint32_t *indexes = (const void *)(at + layout->indexes);
    uint64_t changes = 0;
    for (uint32_t i = 0; i < record->granules; i++) {
        if (indexes[i] >= layout->books_bytes / GRANULE_BYTES) return NULL;
        changes ^= granule_sum(at + layout->granules + (uint64_t)i * GRANULE_BYTES,
                               (uint64_t)indexes[i] * GRANULE_BYTES);
    }
    return changes == record->changes_sum ? record : NULL;
}

odma_status stored_answer(odma_arena *arena, const uint64_t fingerprint[2], odma_answer *answer) {
    uint64_t seq = arena->books->seq;
    const struct record *record =
        file_is_whole(arena) ? whole_record(arena, (uint32_t)(seq % 2)) : NULL;
    if (record == NULL || record->seq != seq || record->epoch != arena->books->epoch) {
        arena->broken = true;
        return ODMA_BROKEN;
    }
    if (memcmp(record->fingerprint, fingerprint, sizeof record->fingerprint) != 0)
        return ODMA_SEQ_CHANGED;
    const uint8_t *at = (const uint8_t *)record;
    answer->seq = seq;
    answer->replayed = 1;
    answer->policy_version = record->policy_version;
    answer->result_count = record->results;
    answer->copy_count = record->copies;
    answer->moved_count = record->moved;
    memcpy(answer->results, at + arena->layout.results, record->results * sizeof(odma_result));
    memcpy(answer->copies, at + arena->layout.copies, record->copies * sizeof(odma_copy));
    memcpy(answer->moved, at + arena->layout.moved, record->moved * sizeof(odma_place));
    return ODMA_OK;
}

/* --- recovery --- */

/* Finish a commit whose record is there but whose books are not. */
static odma_status redo(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    for (uint32_t i = 0; i < RECORDS; i++) {
        const uint8_t *at = arena->map + record_offset(arena, i);
        const struct record *head = (const void *)at;
        if (head->commit == 0 && head->lsn != 0) { /* drop it, and say so once */
            const uint64_t none = 0;
            store_in_turn(arena, record_offset(arena, i) + offsetof(struct record, lsn), &none);
            arena->recovery = ODMA_DROPPED;
        }
        if (head->commit != arena->lsn + 1) continue;
        const struct record *record = whole_record(arena, i);
        if (record == NULL)
            return refuse(reason, ODMA_CORRUPT, "record %u was committed but is damaged", i);
        apply_changes(arena, record_offset(arena, i));
        arena->recovery = ODMA_REDONE;
        return ODMA_OK;
    }
    return ODMA_OK;
}

static odma_status load_books(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    struct progress progress;
    memcpy(&progress, arena->map + PROGRESS_OFFSET, sizeof progress);
    arena->lsn = progress.lsn;
    arena->sum = progress.sum;
    odma_status status = redo(arena, reason);
    if (status != ODMA_OK) return status;

    memcpy(arena->books, arena->map + arena->layout.books_offset, arena->layout.books_bytes);
    if (place_sum(arena->books, 0, arena->layout.books_bytes) != arena->sum)
        return refuse(reason, ODMA_CORRUPT, "the sum of the books is wrong");
    const char *fault = books_fault(arena);
    if (fault != NULL) return refuse(reason, ODMA_CORRUPT, "%s", fault);
    if (arena->books->seq > 0) {
        const struct record *last = whole_record(arena, (uint32_t)(arena->books->seq % 2));
        if (last == NULL || last->seq != arena->books->seq || last->epoch != arena->books->epoch)
            return refuse(reason, ODMA_CORRUPT, "the stored answer of seq %llu is damaged",
                          (unsigned long long)arena->books->seq);
    }
    fault = runs_rebuild(arena);
    if (fault != NULL) return refuse(reason, ODMA_CORRUPT, "%s", fault);
    return ODMA_OK;
}

/* --- memory --- */

static void *zeroed(size_t count, size_t size, bool *enough) {
    void *memory = calloc(count == 0 ? 1 : count, size);
    if (memory == NULL) *enough = false;
    return memory;
}

/* The same, at the beginning of a cache line. */
static void *zeroed_lines(size_t count, size_t size, bool *enough) {
    size_t bytes = align_up(count * size, LINE_BYTES);
    void *memory = aligned_alloc(LINE_BYTES, bytes);
    if (memory == NULL)
        *enough = false;
    else
        memset(memory, 0, bytes);
    return memory;
}

static odma_status take_memory(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    const odma_geometry *geometry = &arena->geometry;
    const struct layout *layout = &arena->layout;
    uint32_t table = layout->table_size;
    uint64_t granules = layout->books_bytes / GRANULE_BYTES;
    uint32_t ids = 4;
    while (ids < 4 * geometry->max_regions) ids *= 2;
    uint32_t accounts = 4 * ODMA_TENANTS < ids ? ids : 4 * ODMA_TENANTS;
    bool enough = true;
    arena->books = zeroed_lines(1, layout->books_bytes, &enough);
    arena->dirty = zeroed(granules, sizeof *arena->dirty, &enough);
    arena->dirty_bits = zeroed(granules / 64 + 1, sizeof *arena->dirty_bits, &enough);
    arena->runs = zeroed_lines(2 * (size_t)table + 2, sizeof *arena->runs, &enough);
    arena->spare_slots = zeroed(table, sizeof(uint32_t), &enough);
    arena->waits = zeroed(table, sizeof(uint32_t), &enough);
    arena->ids = zeroed(ids, sizeof *arena->ids, &enough);
    arena->ids_mask = ids - 1;
    arena->accounts = zeroed(accounts, sizeof *arena->accounts, &enough);
    arena->accounts_mask = accounts - 1;
    arena->hashes = zeroed(geometry->max_ops, sizeof *arena->hashes, &enough);
    arena->freed_slots = zeroed(geometry->max_ops, sizeof *arena->freed_slots, &enough);
    arena->moved = zeroed(geometry->max_copies, sizeof *arena->moved, &enough);
    arena->results = zeroed(geometry->max_ops, sizeof *arena->results, &enough);
    arena->copies = zeroed(geometry->max_copies, sizeof *arena->copies, &enough);
    arena->places = zeroed(geometry->max_copies, sizeof *arena->places, &enough);
    arena->sides = zeroed(2 * (size_t)table + 2, side_bytes(), &enough);
    if (!enough) return refuse(reason, ODMA_NO_SPACE, "not enough memory for the indexes");
    arena->cells = (struct cell *)((uint8_t *)arena->books + sizeof(struct books));
    arena->request_ids = (char (*)[ODMA_ID_BYTES])(arena->cells + table);
    arena->predictions = (struct prediction *)(arena->request_ids + table);

    void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return refuse(reason, ODMA_NO_SPACE, "not enough memory for a page");
    arena->fork_mark = page;
    if (madvise(page, PAGE_BYTES, MADV_WIPEONFORK) != 0)
        return refuse(reason, ODMA_IO, "the system cannot mark memory for forks: %s",
                      strerror(errno));
    *arena->fork_mark = 1;
    return ODMA_OK;
}

void odma_arena_close(odma_arena *arena) {
    if (arena == NULL) return;
    if (arena->map != NULL) munmap(arena->map, arena->layout.file_bytes);
    if (arena->fork_mark != NULL) munmap((void *)(uintptr_t)arena->fork_mark, PAGE_BYTES);
    if (arena->descriptor >= 0) close(arena->descriptor);
    free(arena->books);
    free(arena->dirty);
    free(arena->dirty_bits);
    free(arena->runs);
    free(arena->spare_slots);
    free(arena->waits);
    free(arena->ids);
    free(arena->accounts);
    free(arena->hashes);
    free(arena->freed_slots);
    free(arena->moved);
    free(arena->results);
    free(arena->copies);
    free(arena->places);
    free(arena->sides);
    pthread_mutex_destroy(&arena->lock);
    free(arena);
}

odma_status enter(odma_arena *arena) {
    if (arena == NULL) return ODMA_INVALID;
    if (*arena->fork_mark == 0) return ODMA_FORKED;
    pthread_mutex_lock(&arena->lock);
    if (arena->broken) return leave(arena, ODMA_BROKEN);
    return ODMA_OK;
}

odma_status leave(odma_arena *arena, odma_status status) {
    pthread_mutex_unlock(&arena->lock);
    return status;
}

/* --- create and attach --- */

static odma_arena *new_arena(void) {
    odma_arena *arena = calloc(1, sizeof *arena);
    if (arena == NULL) return NULL;
    pthread_mutex_init(&arena->lock, NULL);
    arena->descriptor = -1;
    arena->batch_seq = UINT64_MAX;
    return arena;
}

/* Take the lock of the open file description: it goes with the last descriptor
 * of it, however its process ends. */
static odma_status take_lock(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(arena->descriptor, F_OFD_SETLK, &whole) == 0) return ODMA_OK;
    if (errno == EAGAIN || errno == EACCES)
        return refuse(reason, ODMA_LOCKED, "another process (or a child it forked) has it open");
    return refuse(reason, ODMA_IO, "cannot lock it: %s", strerror(errno));
}

static odma_status map_file(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    void *map = mmap(NULL, arena->layout.file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                     arena->descriptor, 0);
    if (map == MAP_FAILED) return refuse(reason, ODMA_IO, "cannot map it: %s", strerror(errno));
    arena->map = map;
    if (madvise(map, arena->layout.file_bytes, MADV_DONTFORK) != 0)
        return refuse(reason, ODMA_IO, "cannot keep the map from forks: %s", strerror(errno));
    return ODMA_OK;
}

static odma_status ready(odma_arena *arena, odma_status status, odma_arena **out) {
    if (status != ODMA_OK) {
        odma_arena_close(arena);
        return status;
    }
    *out = arena;
    return ODMA_OK;
}

static odma_status fill_new_file(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    odma_status status = take_lock(arena, reason);
    if (status != ODMA_OK) return status;
    int error = posix_fallocate(arena->descriptor, 0, (off_t)arena->layout.file_bytes);
    if (error != 0)
        return refuse(reason, error == ENOSPC || error == EFBIG ? ODMA_NO_SPACE : ODMA_IO,
                      "cannot reserve %llu bytes: %s", (unsigned long long)arena->layout.file_bytes,
                      strerror(error));
    status = map_file(arena, reason);
    if (status == ODMA_OK) status = take_memory(arena, reason);
    if (status != ODMA_OK) return status;

    struct header header = {.layout_version = ODMA_LAYOUT_VERSION, .geometry = arena->geometry};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    header.sum = hash_bytes(&header, offsetof(struct header, sum));
    arena->sum = place_sum(arena->books, 0, arena->layout.books_bytes); /* all zero */
    forget_books(arena);
    status = commit(arena);
    atomic_signal_fence(memory_order_seq_cst);
    store(arena, 0, &header, sizeof header); /* last: until now it is no arena */
    return status;
}

odma_status odma_arena_create(const char *path, const odma_geometry *geometry, odma_arena **out,
                              char reason[ODMA_REASON_BYTES]) {
    if (path == NULL || geometry == NULL || out == NULL)
        return refuse(reason, ODMA_INVALID, "an argument is NULL");
    const char *fault = geometry_fault(geometry);
    if (fault != NULL) return refuse(reason, ODMA_INVALID, "%s", fault);
    odma_arena *arena = new_arena();
    if (arena == NULL) return refuse(reason, ODMA_NO_SPACE, "not enough memory");
    arena->geometry = *geometry;
    arena->layout = layout_of(geometry);
    bins_init(arena);

    int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
    arena->descriptor = open(path, flags, S_IRUSR | S_IWUSR);
    if (arena->descriptor < 0) {
        odma_status status = errno == EEXIST   ? ODMA_EXISTS
                             : errno == ENOSPC ? ODMA_NO_SPACE
                                               : ODMA_IO;
        return ready(arena, refuse(reason, status, "cannot make %s: %s", path, strerror(errno)),
                     out);
    }
    odma_status status = fill_new_file(arena, reason);
    if (status != ODMA_OK) unlink(path);
    return ready(arena, status, out);
}

static odma_status open_file(odma_arena *arena, const char *path, uint64_t *size,
                             char reason[ODMA_REASON_BYTES]) {
    struct stat status;
    if (lstat(path, &status) != 0)
        return refuse(reason, errno == ENOENT || errno == ENOTDIR ? ODMA_NOT_FOUND : ODMA_IO,
                      "%s: %s", path, strerror(errno));
    if (!S_ISREG(status.st_mode)) return refuse(reason, ODMA_FOREIGN, "it is not a regular file");
    if (status.st_uid != geteuid())
        return refuse(reason, ODMA_FOREIGN, "it belongs to user %u, not to %u",
                      (unsigned)status.st_uid, (unsigned)geteuid());
    if ((status.st_mode & (S_IRWXG | S_IRWXO)) != 0)
        return refuse(reason, ODMA_FOREIGN, "others than its owner may use it (mode %o)",
                      (unsigned)(status.st_mode & 07777));
    arena->descriptor = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat opened;
    if (arena->descriptor < 0 || fstat(arena->descriptor, &opened) != 0)
        return refuse(reason, errno == ELOOP ? ODMA_FOREIGN : ODMA_IO, "cannot open it: %s",
                      strerror(errno));
    if (opened.st_ino != status.st_ino || opened.st_dev != status.st_dev)
        return refuse(reason, ODMA_FOREIGN, "it was replaced while it was opened");
    *size = (uint64_t)opened.st_size;
    return ODMA_OK;
}

static odma_status read_header(odma_arena *arena, uint64_t size, const odma_geometry *expected,
                               char reason[ODMA_REASON_BYTES]) {
    struct header header;
    if (size < HEADER_BYTES ||
        pread(arena->descriptor, &header, sizeof header, 0) != (ssize_t)sizeof header)
        return refuse(reason, ODMA_CORRUPT, "it is shorter than a header");
    if (memcmp(header.magic, MAGIC, sizeof MAGIC) != 0)
        return refuse(reason, ODMA_CORRUPT, "it is not an arena, or was never finished");
    if (header.layout_version != ODMA_LAYOUT_VERSION)
        return refuse(reason, ODMA_MISMATCH, "it has layout version %u, this library %u",
                      header.layout_version, (unsigned)ODMA_LAYOUT_VERSION);
    if (header.sum != hash_bytes(&header, offsetof(struct header, sum)))
        return refuse(reason, ODMA_CORRUPT, "the sum of the header is wrong");
    const char *fault = geometry_fault(&header.geometry);
    if (fault != NULL) return refuse(reason, ODMA_CORRUPT, "its geometry is impossible: %s", fault);
    arena->geometry = header.geometry;
    if (expected != NULL && memcmp(&header.geometry, expected, sizeof *expected) != 0)
        return refuse(reason, ODMA_MISMATCH, "it has another geometry");
    arena->layout = layout_of(&header.geometry);
    if (size != arena->layout.file_bytes)
        return refuse(reason, ODMA_CORRUPT, "it has %llu bytes, its geometry needs %llu",
                      (unsigned long long)size, (unsigned long long)arena->layout.file_bytes);
    return ODMA_OK;
}

void pad_boot_id(char into[ODMA_BOOT_BYTES], const char *boot_id) {
    memset(into, 0, ODMA_BOOT_BYTES);
    memcpy(into, boot_id, strnlen(boot_id, ODMA_BOOT_BYTES - 1));
}

static odma_status end_epoch_of_another_boot(odma_arena *arena, const char *boot_id) {
    char id[ODMA_BOOT_BYTES];
    if (boot_id == NULL || arena->books->epoch == 0) return ODMA_OK;
    pad_boot_id(id, boot_id);
    if (memcmp(id, arena->books->boot_id, sizeof id) == 0) return ODMA_OK;
    arena->rebooted = true;
    forget_books(arena);
    return commit(arena);
}

odma_status odma_arena_attach(const char *path, const odma_geometry *geometry, const char *boot_id,
                              odma_arena **out, char reason[ODMA_REASON_BYTES]) {
    if (path == NULL || out == NULL) return refuse(reason, ODMA_INVALID, "an argument is NULL");
    odma_arena *arena = new_arena();
    if (arena == NULL) return refuse(reason, ODMA_NO_SPACE, "not enough memory");
    uint64_t size = 0;
    odma_status status = open_file(arena, path, &size, reason);
    if (status == ODMA_OK) status = take_lock(arena, reason);
    if (status == ODMA_OK) status = read_header(arena, size, geometry, reason);
    if (status == ODMA_OK) status = map_file(arena, reason);
    if (status == ODMA_OK) status = take_memory(arena, reason);
    if (status == ODMA_OK) {
        bins_init(arena);
        status = load_books(arena, reason);
    }
    if (status == ODMA_OK) status = end_epoch_of_another_boot(arena, boot_id);
    return ready(arena, status, out);
}
