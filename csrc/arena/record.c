/* record.c - the bytes of a pool's file, and how they change.
 *
 *     0        header      magic, layout version, geometry, their sum
 *     2048     progress    lsn of the last commit, sum of the books
 *     4096     record 0    of batches with an even seq
 *              record 1    of batches with an odd seq
 *              record 2    of all other commits
 *              books       struct books, then cells, request ids, predictions;
 *                          with granules struct reuse, marks, keys
 *
 *     record = commit word, sums, counts | results | copies | moved | what these
 *              reuse, with granules | places of the grains that change | the grains
 *
 * A record is whole if its commit word is its lsn and both of its sums are right.
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
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#ifdef ODMA_STORE_HOOK
void ODMA_STORE_HOOK(void);
#endif

enum { PROGRESS_OFFSET = 2048, HEADER_BYTES = 4096, PAGE_BYTES = 4096 };

static const char MAGIC[8] = "odma kv";

/* An odma_geometry as the first files of this layout have it. */
struct plain_geometry {
    uint32_t blocks, block_tokens, max_regions, max_ops, max_copies, model_length_tokens;
    uint64_t digest;
};

struct header {
    char magic[8];
    uint32_t layout_version;
    uint32_t granule_tokens;
    struct plain_geometry geometry;
    uint64_t sum; /* of all above */
};

struct progress {
    uint64_t lsn;
    uint64_t sum;
};

struct record {
    uint64_t commit; /* the lsn, once the rest is written; else 0 */
    uint64_t sum;    /* of all below and of the answer */
    uint64_t lsn;
    uint64_t books_sum;
    uint64_t changes_sum; /* of the grains, at their places in the books */
    uint64_t epoch, seq;
    uint64_t fingerprint[2];
    uint32_t policy_version;
    uint32_t results, copies, moved; /* counts */
    uint32_t grains;
    uint32_t pad;
};

static uint64_t align_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

/* --- layout --- */

/* The most grains that one commit may change: every region's used; for each
 * operation a slot, a request, a tail that waits and what is learnt; for each
 * move a slot and a waiting one; the head of the books with its description;
 * or a whole histogram. With granules every mark and every key. */
static uint32_t most_grains(const odma_geometry *geometry, uint32_t table_size,
                            uint32_t key_room) {
    uint32_t head = (uint32_t)(offsetof(struct books, stats) / GRAIN_BYTES) + 1;
    uint32_t histogram = (uint32_t)(sizeof(struct stats) / GRAIN_BYTES) + 1;
    uint32_t reuse = (uint32_t)(sizeof(struct reuse) / GRAIN_BYTES) + table_size + key_room;
    return 2 * table_size + 18 * geometry->max_ops + 2 * geometry->max_copies + head + histogram +
           (key_room > 0 ? reuse : 0);
}

static struct layout layout_of(const odma_geometry *geometry) {
    struct layout layout = {.table_size = 2 * geometry->max_regions,
                            .most_moved = geometry->max_copies};
    uint64_t reused_bytes = 0, reuse_bytes = 0;
    if (geometry->granule_tokens > 0) {
        layout.table_size += geometry->max_regions; /* as many may be kept as may live */
        layout.most_moved += geometry->max_regions;
        layout.key_room = geometry->blocks / (geometry->granule_tokens / geometry->block_tokens);
        reused_bytes = layout.most_moved * sizeof(odma_reused);
        reuse_bytes = sizeof(struct reuse) + layout.table_size * sizeof(struct mark) +
                      layout.key_room * sizeof(struct key);
    }
    layout.record_grains = most_grains(geometry, layout.table_size, layout.key_room);
    layout.results = align_up(sizeof(struct record), 64);
    layout.copies = layout.results + geometry->max_ops * sizeof(odma_result);
    layout.moved = layout.copies + geometry->max_copies * sizeof(odma_copy);
    layout.reused = layout.moved + layout.most_moved * sizeof(odma_place);
    layout.indexes = layout.reused + reused_bytes;
    layout.grains = align_up(layout.indexes + layout.record_grains * sizeof(uint32_t), 64);
    layout.record_bytes =
        align_up(layout.grains + (uint64_t)layout.record_grains * GRAIN_BYTES, PAGE_BYTES);
    layout.books_offset = HEADER_BYTES + RECORDS * layout.record_bytes;
    layout.books_bytes = sizeof(struct books) +
                         layout.table_size * (uint64_t)(sizeof(struct cell) + ODMA_ID_BYTES +
                                                        sizeof(struct prediction)) +
                         reuse_bytes;
    layout.file_bytes = align_up(layout.books_offset + layout.books_bytes, PAGE_BYTES);
    return layout;
}

/* --- sums --- */

/* What the place of a word is mixed in by: from one word to the next it grows. */
static const uint64_t PLACE_STEP = 0x9e3779b97f4a7c15ULL;

/* A bijection of the word for each place, so one changed word is always seen. */
static inline uint64_t word_sum(uint64_t place_key, uint64_t word) {
    word ^= place_key;
    word ^= word >> 32;
    return word * 0xd6e8feb86659fd93ULL;
}

/* Sum of a grain that belongs at `place`, its words side by side. */
static inline uint64_t grain_sum(const uint8_t *bytes, uint64_t place) {
    uint64_t key = (place + 1) * PLACE_STEP;
    return word_sum(key, word_at(bytes)) ^ word_sum(key + 8 * PLACE_STEP, word_at(bytes + 8)) ^
           word_sum(key + 16 * PLACE_STEP, word_at(bytes + 16)) ^
           word_sum(key + 24 * PLACE_STEP, word_at(bytes + 24));
}

/* Sum of `count` bytes, whole words, that belong at `place`. */
static inline uint64_t place_sum(const void *from, uint64_t place, uint64_t count) {
    const uint8_t *bytes = from;
    uint64_t sum = 0, i = 0;
    for (; i + GRAIN_BYTES <= count; i += GRAIN_BYTES) sum ^= grain_sum(bytes + i, place + i);
    for (; i < count; i += 8) sum ^= word_sum((place + i + 1) * PLACE_STEP, word_at(bytes + i));
    return sum;
}

static uint64_t record_sum(const struct record *record, const void *results, const void *copies,
                           const void *moved, const void *reused, bool reuses) {
    const uint64_t apart = (uint64_t)1 << 40; /* places no two lists share */
    return place_sum(&record->lsn, 0, sizeof *record - offsetof(struct record, lsn)) ^
           place_sum(results, apart, record->results * sizeof(odma_result)) ^
           place_sum(copies, 2 * apart, record->copies * sizeof(odma_copy)) ^
           place_sum(moved, 3 * apart, record->moved * sizeof(odma_place)) ^
           (reuses ? place_sum(reused, 4 * apart, record->moved * sizeof(odma_reused)) : 0);
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

/* Write the grains that differ from the file's into the record at `at`, and
 * add up what the books will sum to. */
static void store_changes(odma_arena *arena, uint64_t at, struct record *record) {
    const uint8_t *books = (const uint8_t *)arena->books;
    const uint8_t *file = arena->map + arena->layout.books_offset;
    uint64_t indexes = at + arena->layout.indexes, grains = at + arena->layout.grains;
    uint64_t books_sum = arena->sum, changes_sum = 0, *bits = arena->dirty_bits;
    const uint32_t *dirty = arena->dirty, *end = dirty + arena->dirty_count;
    uint32_t count = 0;
    for (; dirty < end; dirty++) {
        uint32_t grain = *dirty;
        uint64_t offset = (uint64_t)grain * GRAIN_BYTES;
        const uint8_t *now = books + offset, *before = file + offset;
        bits[grain / 64] = 0; /* its neighbours are on the list, too */
        if (!differ(now, before)) continue;
        uint64_t sum = grain_sum(now, offset);
        changes_sum ^= sum;
        books_sum ^= sum ^ grain_sum(before, offset);
        store(arena, indexes + count * sizeof grain, &grain, sizeof grain);
        store(arena, grains + (uint64_t)count * GRAIN_BYTES, now, GRAIN_BYTES);
        count++;
    }
    arena->dirty_count = 0;
    record->books_sum = books_sum;
    record->changes_sum = changes_sum;
    record->grains = count;
}

/* Copy a record's grains into the books, then say so. */
static void apply_changes(odma_arena *arena, uint64_t at) {
    const struct record *record = (const void *)(arena->map + at);
    const uint32_t *indexes = (const void *)(arena->map + at + arena->layout.indexes);
    const uint8_t *grains = arena->map + at + arena->layout.grains;
    for (uint32_t i = 0; i < record->grains; i++)
        store(arena, arena->layout.books_offset + (uint64_t)indexes[i] * GRAIN_BYTES,
              grains + (uint64_t)i * GRAIN_BYTES, GRAIN_BYTES);
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
    bool reuses = arena->granule_blocks > 0;
    record->sum = record_sum(record, arena->step.results, arena->step.copies, arena->step.places,
                             arena->step.reused, reuses);
    store(arena, at + layout->results, arena->step.results, record->results * sizeof(odma_result));
    store(arena, at + layout->copies, arena->step.copies, record->copies * sizeof(odma_copy));
    store(arena, at + layout->moved, arena->step.places, record->moved * sizeof(odma_place));
    if (reuses)
        store(arena, at + layout->reused, arena->step.reused, record->moved * sizeof(odma_reused));
    store(arena, at + 8, &record->sum, sizeof *record - 8);
    store_in_turn(arena, at, &record->lsn);

    apply_changes(arena, at);
    return arena->broken ? ODMA_BROKEN : ODMA_OK;
}

static odma_status commit(odma_arena *arena) {
    struct record record = {0};
    return commit_record(arena, RECORD_OTHER, &record);
}

static odma_status commit_batch(odma_arena *arena, uint64_t seq, const uint64_t fingerprint[2],
                         uint32_t results) {
    struct record record = {.seq = seq,
                            .fingerprint = {fingerprint[0], fingerprint[1]},
                            .results = results,
                            .copies = arena->step.copy_count,
                            .moved = arena->step.place_count};
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
        record->moved > layout->most_moved || record->grains > layout->record_grains)
        return NULL;
    if (record->sum != record_sum(record, at + layout->results, at + layout->copies,
                                  at + layout->moved, at + layout->reused,
                                  layout->key_room > 0))
        return NULL;
    const uint32_t *indexes = (const void *)(at + layout->indexes);
    uint64_t changes = 0;
    for (uint32_t i = 0; i < record->grains; i++) {
        if (indexes[i] >= layout->books_bytes / GRAIN_BYTES) return NULL;
        changes ^= grain_sum(at + layout->grains + (uint64_t)i * GRAIN_BYTES,
                               (uint64_t)indexes[i] * GRAIN_BYTES);
    }
    return changes == record->changes_sum ? record : NULL;
}

static odma_status stored_answer(odma_arena *arena, const uint64_t fingerprint[2],
                                 odma_answer *answer) {
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
    if (arena->granule_blocks > 0)
        memcpy(answer->moved_reused, at + arena->layout.reused,
               record->moved * sizeof(odma_reused));
    return arena->broken ? ODMA_BROKEN : ODMA_OK;
}

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
