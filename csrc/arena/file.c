/* file.c - a pool's file made, attached and closed, with all the memory an arena uses. */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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

static void take_reuse_memory(odma_arena *arena, bool *enough) {
    const struct layout *layout = &arena->layout;
    uint32_t heads = 16;
    while (heads < 2 * layout->key_room) heads *= 2;
    arena->holds = zeroed(layout->table_size, sizeof *arena->holds, enough);
    arena->tied = zeroed(layout->table_size, sizeof *arena->tied, enough);
    arena->links = zeroed(layout->key_room, sizeof *arena->links, enough);
    arena->spare_keys = zeroed(layout->key_room, sizeof *arena->spare_keys, enough);
    arena->key_heads = zeroed(heads, sizeof *arena->key_heads, enough);
    arena->key_heads_mask = heads - 1;
    arena->step.reused = zeroed(layout->most_moved, sizeof *arena->step.reused, enough);
    arena->step.gathers = zeroed(arena->geometry.max_ops, sizeof *arena->step.gathers, enough);
}

static odma_status take_memory(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    const odma_geometry *geometry = &arena->geometry;
    const struct layout *layout = &arena->layout;
    uint32_t table = layout->table_size;
    uint64_t grains = layout->books_bytes / GRAIN_BYTES;
    uint32_t ids = 4;
    while (ids < 4 * geometry->max_regions) ids *= 2;
    uint32_t accounts = 4 * ODMA_TENANTS;
    while (accounts < 4 * geometry->max_regions + 2 * geometry->max_ops) accounts *= 2;
    bool enough = true;
    arena->books = zeroed_lines(1, layout->books_bytes, &enough);
    arena->dirty = zeroed(grains, sizeof *arena->dirty, &enough);
    arena->dirty_bits = zeroed(grains / 64 + 1, sizeof *arena->dirty_bits, &enough);
    arena->runs = zeroed_lines(2 * (size_t)table + 2, sizeof *arena->runs, &enough);
    arena->spare_slots = zeroed(table, sizeof(uint32_t), &enough);
    arena->waits = zeroed(table, sizeof(uint32_t), &enough);
    arena->ids = zeroed(ids, sizeof *arena->ids, &enough);
    arena->ids_mask = ids - 1;
    arena->accounts = zeroed(accounts, sizeof *arena->accounts, &enough);
    arena->accounts_mask = accounts - 1;
    arena->step.hashes = zeroed(geometry->max_ops, sizeof *arena->step.hashes, &enough);
    arena->step.held_up = zeroed(geometry->max_ops, sizeof *arena->step.held_up, &enough);
    arena->step.freed_slots = zeroed(geometry->max_ops, sizeof *arena->step.freed_slots, &enough);
    arena->step.moved = zeroed(geometry->max_copies, sizeof *arena->step.moved, &enough);
    arena->step.results = zeroed(geometry->max_ops, sizeof *arena->step.results, &enough);
    arena->step.copies = zeroed(geometry->max_copies, sizeof *arena->step.copies, &enough);
    arena->step.places = zeroed(layout->most_moved, sizeof *arena->step.places, &enough);
    if (layout->key_room > 0) take_reuse_memory(arena, &enough);
    arena->sides = zeroed(2 * (size_t)table + 2, sizeof *arena->sides, &enough);
    if (!enough) return refuse(reason, ODMA_IO, "not enough memory for the indexes");
    arena->cells = (struct cell *)((uint8_t *)arena->books + sizeof(struct books));
    arena->request_ids = (char (*)[ODMA_ID_BYTES])(arena->cells + table);
    arena->predictions = (struct prediction *)(arena->request_ids + table);
    if (layout->key_room > 0) {
        arena->reuse = (struct reuse *)(arena->predictions + table);
        arena->marks = (struct mark *)(arena->reuse + 1);
        arena->keys = (struct key *)(arena->marks + table);
        arena->granule_blocks = geometry->granule_tokens / geometry->block_tokens;
    }

    void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return refuse(reason, ODMA_IO, "not enough memory for a page");
    arena->fork_mark = page;
    *arena->fork_mark = 1;
    if (madvise(page, PAGE_BYTES, MADV_WIPEONFORK) != 0)
        return refuse(reason, ODMA_IO, "the system cannot mark memory for forks: %s",
                      strerror(errno));
    return ODMA_OK;
}

static bool is_forked(const odma_arena *arena) {
    return arena->fork_mark != NULL && *arena->fork_mark == 0;
}

/* A child may have closed its copy of the descriptor and have opened another file under it. */
static bool has_its_file(const odma_arena *arena) {
    struct stat opened;
    return arena->descriptor >= 0 && fstat(arena->descriptor, &opened) == 0 &&
           opened.st_ino == arena->inode && opened.st_dev == arena->device;
}

/* A child has no map: whatever lies at its address there is not the arena's. */
void odma_arena_close(odma_arena *arena) {
    if (arena == NULL) return;
    bool forked = is_forked(arena);
    if (arena->map != NULL && !forked) {
        UNMAPPING(arena);
        munmap(arena->map, arena->layout.file_bytes);
    }
    if (arena->fork_mark != NULL) munmap((void *)(uintptr_t)arena->fork_mark, PAGE_BYTES);
    if (forked ? has_its_file(arena) : arena->descriptor >= 0) close(arena->descriptor);
    free(arena->books);
    free(arena->dirty);
    free(arena->dirty_bits);
    free(arena->runs);
    free(arena->spare_slots);
    free(arena->waits);
    free(arena->ids);
    free(arena->accounts);
    free(arena->step.hashes);
    free(arena->step.held_up);
    free(arena->step.freed_slots);
    free(arena->step.moved);
    free(arena->step.results);
    free(arena->step.copies);
    free(arena->step.places);
    free(arena->sides);
    free(arena->holds);
    free(arena->tied);
    free(arena->links);
    free(arena->spare_keys);
    free(arena->key_heads);
    free(arena->step.reused);
    free(arena->step.gathers);
    if (!forked) pthread_mutex_destroy(&arena->lock); /* a thread may have held it at the fork */
    free(arena);
}

static odma_arena *new_arena(void) {
    odma_arena *arena = calloc(1, sizeof *arena);
    if (arena == NULL) return NULL;
    pthread_mutex_init(&arena->lock, NULL);
    arena->descriptor = -1;
    arena->step.seq = NO_BATCH;
    return arena;
}

/* --- create --- */

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
    MAPPED(arena);
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

static odma_status note_file(odma_arena *arena, struct stat *opened,
                             char reason[ODMA_REASON_BYTES]) {
    if (fstat(arena->descriptor, opened) != 0)
        return refuse(reason, ODMA_IO, "cannot look at it: %s", strerror(errno));
    arena->inode = opened->st_ino;
    arena->device = opened->st_dev;
    return ODMA_OK;
}

/* Take all blocks of the file, so that no store through the map is the first to want one. */
static odma_status reserve(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    int error;
    do error = posix_fallocate(arena->descriptor, 0, (off_t)arena->layout.file_bytes);
    while (error == EINTR);
    if (error == 0) return ODMA_OK;
    bool full = error == ENOSPC || error == EFBIG || error == EDQUOT;
    return refuse(reason, full ? ODMA_NO_SPACE : ODMA_IO, "cannot reserve %llu bytes: %s",
                  (unsigned long long)arena->layout.file_bytes, strerror(error));
}

static odma_status fill_new_file(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    struct stat opened;
    odma_status status = note_file(arena, &opened, reason);
    if (status == ODMA_OK) status = take_lock(arena, reason);
    if (status == ODMA_OK) status = reserve(arena, reason);
    if (status == ODMA_OK) status = map_file(arena, reason);
    if (status == ODMA_OK) status = take_memory(arena, reason);
    if (status != ODMA_OK) return status;

    struct header header = {.layout_version = ODMA_LAYOUT_VERSION,
                            .granule_tokens = arena->geometry.granule_tokens};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    memcpy(&header.geometry, &arena->geometry, sizeof header.geometry);
    header.sum = hash_bytes(&header, offsetof(struct header, sum));
    arena->sum = place_sum(arena->books, 0, arena->layout.books_bytes); /* all zero */
    forget_books(arena);
    status = commit(arena);
    if (status != ODMA_OK) return refuse(reason, ODMA_IO, "it changed while it was made");
    atomic_signal_fence(memory_order_seq_cst);
    store(arena, 0, &header, sizeof header); /* last: until now it is no arena */
    return ODMA_OK;
}

uint64_t odma_geometry_file_bytes(const odma_geometry *geometry) {
    odma_geometry finished;
    if (geometry == NULL) return 0;
    finished = finished_geometry(*geometry);
    return geometry_fault(&finished) == NULL ? layout_of(&finished).file_bytes : 0;
}

odma_status odma_arena_create(const char *path, const odma_geometry *geometry, odma_arena **out,
                              char reason[ODMA_REASON_BYTES]) {
    if (path == NULL || geometry == NULL || out == NULL)
        return refuse(reason, ODMA_INVALID, "an argument is NULL");
    odma_geometry finished = finished_geometry(*geometry);
    if (odma_geometry_check(&finished, reason) != ODMA_OK) return ODMA_INVALID;
    odma_arena *arena = new_arena();
    if (arena == NULL) return refuse(reason, ODMA_IO, "not enough memory");
    arena->geometry = finished;
    arena->layout = layout_of(&finished);
    bins_init(arena);

    int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
    arena->descriptor = open(path, flags, S_IRUSR | S_IWUSR);
    if (arena->descriptor < 0) {
        odma_status status = errno == EEXIST                      ? ODMA_EXISTS
                             : errno == ENOSPC || errno == EDQUOT ? ODMA_NO_SPACE
                                                                  : ODMA_IO;
        return ready(arena, refuse(reason, status, "cannot make %s: %s", path, strerror(errno)),
                     out);
    }
    odma_status status = fill_new_file(arena, reason);
    if (status != ODMA_OK) unlink(path);
    return ready(arena, status, out);
}

/* --- attach --- */

/* Read `bytes` at `offset`: a page that cannot be read is an error here, and a signal in a map. */
static odma_status read_at(const odma_arena *arena, void *into, uint64_t bytes, uint64_t offset,
                           char reason[ODMA_REASON_BYTES]) {
    uint8_t *to = into;
    while (bytes > 0) {
        ssize_t got = pread(arena->descriptor, to, bytes, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return refuse(reason, ODMA_IO, "cannot read it: %s", strerror(errno));
        if (got == 0) return refuse(reason, ODMA_CORRUPT, "it is shorter than its books");
        to += got;
        offset += (uint64_t)got;
        bytes -= (uint64_t)got;
    }
    return ODMA_OK;
}

/* Read all that the map is read of later, before it is. */
static odma_status read_records(const odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    uint8_t part[16 * 1024];
    uint64_t end = arena->layout.books_offset;
    odma_status status = ODMA_OK;
    for (uint64_t at = 0; at < end && status == ODMA_OK; at += sizeof part)
        status = read_at(arena, part, end - at < sizeof part ? end - at : sizeof part, at, reason);
    return status;
}

static odma_status load_books(odma_arena *arena, char reason[ODMA_REASON_BYTES]) {
    struct progress progress;
    memcpy(&progress, arena->map + PROGRESS_OFFSET, sizeof progress);
    arena->lsn = progress.lsn;
    arena->sum = progress.sum;
    odma_status status = redo(arena, reason);
    if (status != ODMA_OK) return status;

    status = read_at(arena, arena->books, arena->layout.books_bytes, arena->layout.books_offset,
                     reason);
    if (status != ODMA_OK) return status;
    if (place_sum(arena->books, 0, arena->layout.books_bytes) != arena->sum)
        return refuse(reason, ODMA_CORRUPT, "the sum of the books is wrong");
    char room[ODMA_REASON_BYTES];
    const char *fault = books_fault(arena, room);
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
    if (arena->descriptor < 0)
        return refuse(reason, errno == ELOOP ? ODMA_FOREIGN : ODMA_IO, "cannot open it: %s",
                      strerror(errno));
    struct stat opened;
    odma_status noted = note_file(arena, &opened, reason);
    *size = (uint64_t)opened.st_size;
    return noted;
}

/* Whether the path still names the file that was opened, now that nobody else may have it. */
static odma_status check_place(const odma_arena *arena, const char *path,
                               char reason[ODMA_REASON_BYTES]) {
    struct stat named;
    if (lstat(path, &named) != 0)
        return refuse(reason, ODMA_IO, "cannot look at it again: %s", strerror(errno));
    if (named.st_ino == arena->inode && named.st_dev == arena->device) return ODMA_OK;
    return refuse(reason, ODMA_IO, "it was replaced while it was opened");
}

static odma_status read_header(odma_arena *arena, uint64_t size, const odma_geometry *expected,
                               char reason[ODMA_REASON_BYTES]) {
    struct header header;
    if (size < HEADER_BYTES) return refuse(reason, ODMA_CORRUPT, "it is shorter than a header");
    odma_status status = read_at(arena, &header, sizeof header, 0, reason);
    if (status != ODMA_OK) return status;
    if (memcmp(header.magic, MAGIC, sizeof MAGIC) != 0)
        return refuse(reason, ODMA_CORRUPT, "it is not an arena, or was never finished");
    if (header.layout_version != ODMA_LAYOUT_VERSION)
        return refuse(reason, ODMA_MISMATCH, "it has layout version %u, this library %u",
                      header.layout_version, (unsigned)ODMA_LAYOUT_VERSION);
    if (header.sum != hash_bytes(&header, offsetof(struct header, sum)))
        return refuse(reason, ODMA_CORRUPT, "the sum of the header is wrong");
    odma_geometry *geometry = &arena->geometry;
    *geometry = (odma_geometry){.granule_tokens = header.granule_tokens};
    memcpy(geometry, &header.geometry, sizeof header.geometry);
    const char *fault = geometry_fault(geometry);
    if (fault != NULL) return refuse(reason, ODMA_CORRUPT, "its geometry is impossible: %s", fault);
    odma_geometry wanted = expected == NULL ? *geometry : finished_geometry(*expected);
    if (memcmp(geometry, &wanted, sizeof wanted) != 0)
        return refuse(reason, ODMA_MISMATCH, "it has another geometry");
    arena->layout = layout_of(geometry);
    if (size != arena->layout.file_bytes)
        return refuse(reason, ODMA_CORRUPT, "it has %llu bytes, its geometry needs %llu",
                      (unsigned long long)size, (unsigned long long)arena->layout.file_bytes);
    return ODMA_OK;
}

static void pad_boot_id(char into[ODMA_BOOT_BYTES], const char *boot_id) {
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
    if (arena == NULL) return refuse(reason, ODMA_IO, "not enough memory");
    uint64_t size = 0;
    odma_status status = open_file(arena, path, &size, reason);
    if (status == ODMA_OK) status = take_lock(arena, reason);
    if (status == ODMA_OK) status = check_place(arena, path, reason);
    if (status == ODMA_OK) status = read_header(arena, size, geometry, reason);
    if (status == ODMA_OK) status = reserve(arena, reason);
    if (status == ODMA_OK) status = read_records(arena, reason);
    if (status == ODMA_OK) status = map_file(arena, reason);
    if (status == ODMA_OK) status = take_memory(arena, reason);
    if (status == ODMA_OK) {
        bins_init(arena);
        status = load_books(arena, reason);
    }
    if (status == ODMA_OK) status = end_epoch_of_another_boot(arena, boot_id);
    if (arena->broken) status = refuse(reason, ODMA_IO, "a page of it failed while it was read");
    return ready(arena, status, out);
}
