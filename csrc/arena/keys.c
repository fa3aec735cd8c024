/* keys.c - the keys of runs, and where a key stands.
 *
 *   Rule 1   Granule i of a run has at most one key; runs have their first `given`.
 *   Rule 2   The keys of the first `keyed` stand: they are found by what they are. Two
 *            runs that begin alike have each their own, for each may end first.
 *   Rule 3   Every key is a run's, or room for another. A granule's key stands for
 *            whole blocks of a run, so there is always room.
 *
 * Keys that a living run loses are cleared. Those of a run that ends are left as they
 * are: no later run has its slot and its generation, so ending it is one store.
 */
#include <string.h>

static uint32_t granules_in(const odma_arena *arena, uint32_t tokens) {
    return tokens / arena->geometry.granule_tokens;
}

static void mark_mark(odma_arena *arena, uint32_t slot) {
    books_mark(arena, &arena->marks[slot], sizeof *arena->marks);
}

/* --- keys that stand --- */

static uint32_t *head_of(const odma_arena *arena, const uint8_t bytes[ODMA_KEY_BYTES]) {
    uint64_t hash = mix(word_at(bytes) ^ word_at(bytes + 8));
    return &arena->key_heads[hash & arena->key_heads_mask];
}

static void stand(odma_arena *arena, uint32_t key) {
    uint32_t *head = head_of(arena, arena->keys[key].bytes);
    arena->links[key].prev = NONE;
    arena->links[key].next = *head;
    if (*head != NONE) arena->links[*head].prev = key;
    *head = key;
}

static void fall(odma_arena *arena, uint32_t key) {
    struct key_links links = arena->links[key];
    if (links.prev != NONE)
        arena->links[links.prev].next = links.next;
    else
        *head_of(arena, arena->keys[key].bytes) = links.next;
    if (links.next != NONE) arena->links[links.next].prev = links.prev;
}

/* From `key` on among those of one hash, the first that is `bytes` as granule `index`. */
static uint32_t same_from(odma_arena *arena, uint32_t key, const uint8_t bytes[ODMA_KEY_BYTES],
                          uint32_t index) {
    for (; key != NONE; key = arena->links[key].next) {
        arena->steps++;
        if (arena->keys[key].index == index &&
            memcmp(arena->keys[key].bytes, bytes, ODMA_KEY_BYTES) == 0)
            return key;
    }
    return NONE;
}

/* --- keys of a run --- */

/* Give the run of a slot the key of its next granule. */
static void add_key(odma_arena *arena, uint32_t slot, const uint8_t bytes[ODMA_KEY_BYTES]) {
    struct mark *mark = &arena->marks[slot];
    uint32_t id = arena->spare_keys[--arena->spare_key_count];
    struct key *key = &arena->keys[id];
    *key = (struct key){.slot = slot, .generation = mark->generation, .index = mark->given++};
    memcpy(key->bytes, bytes, ODMA_KEY_BYTES);
    books_mark(arena, key, sizeof *key);
    mark_mark(arena, slot);
    arena->links[id].below = arena->holds[slot].top_key;
    arena->holds[slot].top_key = id;
}

/* Take from a run its last key, and answer which that was. */
static uint32_t pop_key(odma_arena *arena, uint32_t slot) {
    struct mark *mark = &arena->marks[slot];
    uint32_t id = arena->holds[slot].top_key;
    if (--mark->given < mark->keyed) {
        fall(arena, id);
        mark->keyed = mark->given;
    }
    arena->holds[slot].top_key = arena->links[id].below;
    arena->spare_keys[arena->spare_key_count++] = id;
    return id;
}

/* Take from a run the keys of all but its first `count` granules. */
static void cut_keys(odma_arena *arena, uint32_t slot, uint32_t count) {
    while (arena->marks[slot].given > count) {
        struct key *key = &arena->keys[pop_key(arena, slot)];
        *key = (struct key){0};
        books_mark(arena, key, sizeof *key);
        mark_mark(arena, slot);
    }
}

/* The first `granules` of a run are final, as far as they have keys. */
static void set_keyed(odma_arena *arena, uint32_t slot, uint32_t granules) {
    struct mark *mark = &arena->marks[slot];
    uint32_t keyed = granules < mark->given ? granules : mark->given;
    if (keyed <= mark->keyed) return;
    uint32_t id = arena->holds[slot].top_key;
    for (uint32_t i = mark->given; i-- > mark->keyed; id = arena->links[id].below)
        if (i < keyed) stand(arena, id);
    mark->keyed = keyed;
    mark_mark(arena, slot);
}

/* A run begins in a slot, under its handle. */
static void begin_mark(odma_arena *arena, uint32_t slot) {
    arena->marks[slot] = (struct mark){.generation = arena->cells[slot].slot.generation};
    mark_mark(arena, slot);
}

/* Take its keys from a living run for good: a later one would continue what nobody knows. */
static void void_mark(odma_arena *arena, uint32_t slot) {
    cut_keys(arena, slot, 0);
    arena->marks[slot].generation = 0;
    mark_mark(arena, slot);
}

/* It ends. */
static void end_mark(odma_arena *arena, uint32_t slot) {
    while (arena->marks[slot].given > 0) pop_key(arena, slot);
    const struct mark none = {0};
    books_put(arena, &arena->marks[slot], &none, sizeof none);
}

/* --- all of them --- */

/* Indexes without keys. */
static void keys_reset(odma_arena *arena) {
    uint32_t room = arena->layout.key_room;
    memset(arena->key_heads, 0xff, ((size_t)arena->key_heads_mask + 1) * sizeof(uint32_t));
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        arena->holds[i] = (struct hold){.top_key = NONE};
    arena->spare_key_count = room;
    for (uint32_t i = 0; i < room; i++) arena->spare_keys[i] = room - 1 - i;
    arena->kept = arena->kept_blocks = arena->kept_granules = 0;
    arena->spare_blocks = arena->tied_count = 0;
}

/* Whether a key is a granule's of a run that there is. */
static bool is_given(const odma_arena *arena, const struct key *key) {
    if (key->slot >= arena->layout.table_size || key->generation == 0) return false;
    const struct mark *mark = &arena->marks[key->slot];
    return mark->generation == key->generation && key->index < mark->given;
}

/* Build the keys of all runs from the books. Answers the rule that they break, or NULL. */
static const char *keys_rebuild(odma_arena *arena) {
    uint32_t room = arena->layout.key_room, *order = arena->spare_keys;
    uint64_t given = 0;
    for (uint32_t slot = 0; slot < arena->layout.table_size; slot++) {
        arena->holds[slot].top_key = (uint32_t)given; /* where its keys begin in `order` */
        given += arena->marks[slot].given;
        if (given > room) return "there are too many keys";
    }
    memset(order, 0xff, room * sizeof *order);
    for (uint32_t id = 0; id < room; id++) {
        const struct key *key = &arena->keys[id];
        if (!is_given(arena, key)) continue;
        uint32_t *place = &order[arena->holds[key->slot].top_key + key->index];
        if (*place != NONE) return "a granule has two keys";
        *place = id;
    }
    uint32_t at = 0;
    for (uint32_t slot = 0; slot < arena->layout.table_size; slot++) {
        uint32_t top = NONE;
        for (uint32_t i = 0; i < arena->marks[slot].given; i++) {
            uint32_t id = order[at++];
            if (id == NONE) return "a granule has lost its key";
            arena->links[id].below = top;
            top = id;
            if (i < arena->marks[slot].keyed) stand(arena, id);
        }
        arena->holds[slot].top_key = top;
    }
    arena->spare_key_count = 0;
    for (uint32_t id = room; id-- > 0;)
        if (!is_given(arena, &arena->keys[id])) arena->spare_keys[arena->spare_key_count++] = id;
    return NULL;
}
