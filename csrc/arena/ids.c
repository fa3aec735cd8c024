/* ids.c - where the live region of a request id is: open addressing, linear probing. */
#include <string.h>

/* Of the words up to the first that is all padding. */
static inline uint32_t id_hash(const char id[ODMA_ID_BYTES]) {
    uint64_t hash = 0, word;
    for (size_t i = 0; i < ODMA_ID_BYTES; i += sizeof word) {
        memcpy(&word, id + i, sizeof word);
        if (word == 0) break;
        hash = stir(hash, word);
    }
    return (uint32_t)mix(hash);
}

/* The live region of a request id, or NONE. */
static inline uint32_t find_id(const odma_arena *arena, const char id[ODMA_ID_BYTES],
                               uint32_t hash) {
    for (uint32_t i = hash & arena->ids_mask;; i = (i + 1) & arena->ids_mask) {
        struct entry entry = arena->ids[i];
        if (entry.slot == NONE ||
            (entry.hash == hash && memcmp(arena->request_ids[entry.slot], id, ODMA_ID_BYTES) == 0))
            return entry.slot;
    }
}

static void add_id(odma_arena *arena, uint32_t slot, uint32_t hash) {
    uint32_t i = hash & arena->ids_mask;
    while (arena->ids[i].slot != NONE) i = (i + 1) & arena->ids_mask;
    arena->ids[i] = (struct entry){.slot = slot, .hash = hash};
    arena->runs[slot].id_hash = hash;
}

static void drop_id(odma_arena *arena, uint32_t slot) {
    uint32_t hole = arena->runs[slot].id_hash & arena->ids_mask;
    while (arena->ids[hole].slot != slot) hole = (hole + 1) & arena->ids_mask;
    for (uint32_t i = (hole + 1) & arena->ids_mask; arena->ids[i].slot != NONE;
         i = (i + 1) & arena->ids_mask) {
        uint32_t home = arena->ids[i].hash;
        if (((i - home) & arena->ids_mask) < ((i - hole) & arena->ids_mask)) continue;
        arena->ids[hole] = arena->ids[i];
        hole = i;
    }
    arena->ids[hole].slot = NONE;
}
