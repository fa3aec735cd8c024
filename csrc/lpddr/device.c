/* device.c - channels behind an interleave, and the traffic that they get.
 *
 * A chunk (a block, a run) is in flight from when the descriptor engine starts
 * it until its last byte has been moved. It touches each channel in one piece:
 * consecutive slices of a channel are consecutive in its own address space. The
 * pieces wait in order before each channel.
 *
 * The channels know nothing of each other, so the one whose next step comes
 * first is stepped; a chunk that ends or starts is an event between the steps.
 */
#include <stdlib.h>
#include <string.h>

enum {
    PIECES_AHEAD = 16,
    LEAST_PIECES = 64,
    SEEN_AFTER_CK = 1 /* a chunk that ended makes room in the next CK */
};

/* A chunk in flight. */
struct chunk {
    uint64_t requests_left;
    uint64_t ends_at;
    uint32_t next_free;
};

struct source {
    const odma_lpddr_device *device;
    const odma_lpddr_traffic *traffic;
    uint64_t random;
    uint64_t next_offset;         /* SEQUENTIAL */
    uint32_t next_run;

    struct chunk *chunks;
    uint32_t free_chunk, in_flight, window;
    uint32_t *ending;             /* chunks whose last request was issued, by end */
    uint32_t ending_count;
    uint64_t engine_free_at;
    odma_run waiting_run;         /* the next chunk, once it is known */
    uint32_t waiting_kind;
    bool has_waiting;
};

struct machine {
    const odma_lpddr_device *device;
    struct decoder decoder;
    struct channel *channels;
    struct piece *pieces;
    uint64_t *next;               /* when each channel steps */
    struct source source;
};

/* xorshift64* (Vigna, 2016). */
static uint64_t random_next(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 2685821657736338717U;
}

static uint64_t random_below(uint64_t *state, uint64_t most) {
    return (random_next(state) >> 8) % most;
}

/* --- the source --- */

/* Find out what the next chunk is; false if there is none. */
static bool next_chunk(struct source *source) {
    if (source->has_waiting) return true;
    const odma_lpddr_traffic *traffic = source->traffic;
    uint64_t capacity = channel_bytes(&source->device->organisation) * source->device->channels;
    odma_run *run = &source->waiting_run;
    switch (traffic->pattern) {
        case ODMA_LPDDR_RUNS:
            if (source->next_run == traffic->run_count) return false;
            *run = traffic->runs[source->next_run++];
            break;
        case ODMA_LPDDR_RANDOM:
            run->length_bytes = traffic->chunk_bytes;
            run->offset_bytes = traffic->chunk_bytes *
                                random_below(&source->random, capacity / traffic->chunk_bytes);
            break;
        default:
            run->length_bytes = traffic->chunk_bytes;
            if (source->next_offset + run->length_bytes > capacity) source->next_offset = 0;
            run->offset_bytes = source->next_offset;
            source->next_offset += run->length_bytes;
    }
    source->waiting_kind = READ;
    if (traffic->write_fraction > 0) {
        double drawn = (double)(random_next(&source->random) >> 11) / 9007199254740992.0;
        source->waiting_kind = drawn < traffic->write_fraction ? WRITE : READ;
    }
    source->has_waiting = true;
    return true;
}

static void push_piece(struct machine *machine, uint32_t index, struct piece piece, uint64_t now) {
    struct channel *channel = &machine->channels[index];
    uint32_t last = channel->piece_first + channel->piece_count;
    if (last >= channel->piece_room) last -= channel->piece_room;
    channel->pieces[last] = piece;
    channel->piece_count++;
    if (machine->next[index] > now) machine->next[index] = now;
    if (channel->piece_count == 1) channel->filled_at = now;
}

/* Cut a chunk into one piece for each channel it touches. Returns its requests. */
static uint64_t scatter(struct machine *machine, odma_run run, uint32_t kind, uint32_t chunk,
                        uint64_t now) {
    const odma_lpddr_device *device = machine->device;
    uint32_t burst_shift = log2_of(device->organisation.burst_bytes);
    uint64_t slice_bytes = device->interleave_bytes, channels = device->channels;
    uint64_t begin = run.offset_bytes >> burst_shift << burst_shift;
    uint64_t end = run.offset_bytes + run.length_bytes;
    uint64_t first = begin / slice_bytes, last = (end - 1) / slice_bytes, requests = 0;
    uint64_t touched = last - first + 1 < channels ? last - first + 1 : channels;
    for (uint64_t i = 0; i < touched; i++) {
        uint64_t slice = first + i;
        uint64_t final = slice + (last - slice) / channels * channels;
        uint64_t from = slice / channels * slice_bytes + (i == 0 ? begin % slice_bytes : 0);
        uint64_t to = final / channels * slice_bytes +
                      (final == last ? (end - 1) % slice_bytes + 1 : slice_bytes);
        uint64_t count = ((to - 1) >> burst_shift) - (from >> burst_shift) + 1;
        struct piece piece = {from, (uint32_t)count, chunk, kind};
        push_piece(machine, (uint32_t)(slice % channels), piece, now);
        requests += count;
    }
    return requests;
}

static bool has_room(const struct machine *machine) {
    bool short_of_work = machine->source.traffic->window > 0;
    for (uint32_t i = 0; i < machine->device->channels; i++) {
        const struct channel *channel = &machine->channels[i];
        if (channel->piece_count == channel->piece_room) return false;
        if (channel->piece_count < PIECES_AHEAD) short_of_work = true;
    }
    return short_of_work;
}

/* Start all the chunks that may start at `now`. Returns when to come again. */
static uint64_t start_chunks(struct machine *machine, uint64_t now) {
    struct source *source = &machine->source;
    while (source->in_flight < source->window && has_room(machine) && next_chunk(source)) {
        if (source->engine_free_at > now) return source->engine_free_at;
        uint32_t index = source->free_chunk;
        struct chunk *chunk = &source->chunks[index];
        source->free_chunk = chunk->next_free;
        source->in_flight++;
        source->has_waiting = false;
        chunk->requests_left = scatter(machine, source->waiting_run, source->waiting_kind, index,
                                       now);
        chunk->ends_at = 0;
        source->engine_free_at = now + source->traffic->descriptor_ck;
    }
    return NEVER;
}

/* Note that a request of a chunk was issued, and with the last when it ends. */
static void note_done(struct source *source, const struct channel *channel) {
    struct chunk *chunk = &source->chunks[channel->done_block];
    if (channel->done_at > chunk->ends_at) chunk->ends_at = channel->done_at;
    if (--chunk->requests_left > 0) return;
    uint32_t i = source->ending_count++;
    for (; i > 0 && source->chunks[source->ending[i - 1]].ends_at < chunk->ends_at; i--)
        source->ending[i] = source->ending[i - 1];
    source->ending[i] = channel->done_block;
}

static uint64_t first_end(const struct source *source) {
    if (source->ending_count == 0) return NEVER;
    return source->chunks[source->ending[source->ending_count - 1]].ends_at + SEEN_AFTER_CK;
}

static void end_chunk(struct source *source) {
    uint32_t index = source->ending[--source->ending_count];
    source->chunks[index].next_free = source->free_chunk;
    source->free_chunk = index;
    source->in_flight--;
}

/* --- the run --- */

static uint32_t first_channel(const struct machine *machine) {
    uint32_t first = 0;
    for (uint32_t i = 1; i < machine->device->channels; i++)
        if (machine->next[i] < machine->next[first]) first = i;
    return first;
}

static void add_counts(const struct machine *machine, odma_lpddr_result *sum) {
    memset(sum, 0, sizeof *sum);
    for (uint32_t i = 0; i < machine->device->channels; i++) {
        const odma_lpddr_result *counts = &machine->channels[i].counts;
        sum->requests += counts->requests;
        sum->row_hits += counts->row_hits;
        sum->activates += counts->activates;
        sum->reads += counts->reads;
        sum->writes += counts->writes;
        sum->precharges += counts->precharges;
        sum->precharges_all += counts->precharges_all;
        sum->refreshes_all += counts->refreshes_all;
        sum->refreshes_bank += counts->refreshes_bank;
        sum->wck_syncs += counts->wck_syncs;
    }
}

static void subtract(odma_lpddr_result *sum, const odma_lpddr_result *before) {
    sum->requests -= before->requests;
    sum->cycles -= before->cycles;
    sum->row_hits -= before->row_hits;
    sum->activates -= before->activates;
    sum->reads -= before->reads;
    sum->writes -= before->writes;
    sum->precharges -= before->precharges;
    sum->precharges_all -= before->precharges_all;
    sum->refreshes_all -= before->refreshes_all;
    sum->refreshes_bank -= before->refreshes_bank;
    sum->wck_syncs -= before->wck_syncs;
}

/* Play until `most` requests are issued or none is left. The clock of the sum
 * is where the last data moved, or, in the middle of things, where it stopped. */
static void play(struct machine *machine, uint64_t *now, uint64_t *done, uint64_t most,
                 uint64_t *starts_at, odma_lpddr_result *sum) {
    struct source *source = &machine->source;
    uint64_t last_end = *now;
    while (*done < most) {
        uint32_t index = first_channel(machine);
        uint64_t ends_at = first_end(source);
        uint64_t event = ends_at < *starts_at ? ends_at : *starts_at;
        if (event <= machine->next[index]) {
            *now = event;
            if (ends_at == event) end_chunk(source);
            *starts_at = start_chunks(machine, *now);
            if (source->in_flight == 0 && !source->has_waiting) break;
            continue;
        }
        struct channel *channel = &machine->channels[index];
        *now = machine->next[index];
        machine->next[index] = channel_step(channel, *now);
        if (channel->done_block == NONE_DONE) continue;
        (*done)++;
        last_end = *now;
        note_done(source, channel);
        if (source->traffic->window == 0 && channel->piece_count < PIECES_AHEAD / 2)
            *starts_at = start_chunks(machine, *now);
    }
    add_counts(machine, sum);
    sum->cycles = *done < most ? *now : last_end;
}

static void measure(struct machine *machine, odma_lpddr_result *result) {
    const odma_lpddr_traffic *traffic = machine->source.traffic;
    uint64_t now = 0, done = 0, warmup = traffic->warmup_requests, most = NEVER;
    uint64_t starts_at = start_chunks(machine, 0);
    odma_lpddr_result before = {0};
    if (traffic->pattern == ODMA_LPDDR_RUNS)
        warmup = 0;
    else
        most = warmup + traffic->requests;
    if (warmup > 0) play(machine, &now, &done, warmup, &starts_at, &before);
    play(machine, &now, &done, most, &starts_at, result);
    subtract(result, &before);
}

static void summarise(const odma_lpddr_device *device, odma_lpddr_result *result) {
    double clock_seconds = device->timing.clock_ps * 1e-12;
    double burst_bytes = device->organisation.burst_bytes;
    double peak = device->channels * burst_bytes / (device->timing.burst_min * clock_seconds);
    result->seconds = (double)result->cycles * clock_seconds;
    result->bytes_per_second =
        result->cycles > 0 ? (double)result->requests * burst_bytes / result->seconds : 0;
    result->fraction_of_peak = result->bytes_per_second / peak;
}

/* --- checking and memory --- */

static odma_status check_runs(const odma_lpddr_device *device, const odma_lpddr_traffic *traffic,
                              char *reason) {
    uint64_t capacity = channel_bytes(&device->organisation) * device->channels;
    if (traffic->runs == NULL || traffic->run_count < 1)
        return refuse(reason, ODMA_INVALID, "runs: at least one");
    for (uint32_t i = 0; i < traffic->run_count; i++) {
        const odma_run *run = &traffic->runs[i];
        if (run->length_bytes < 1 || run->length_bytes > capacity ||
            run->offset_bytes > capacity - run->length_bytes)
            return refuse(reason, ODMA_INVALID,
                          "runs[%u]: 1 byte or more, inside the device's %llu bytes", i,
                          (unsigned long long)capacity);
    }
    return ODMA_OK;
}

static odma_status check_traffic(const odma_lpddr_device *device,
                                 const odma_lpddr_traffic *traffic, char *reason) {
    if (traffic == NULL) return refuse(reason, ODMA_INVALID, "traffic: missing");
    uint64_t capacity = channel_bytes(&device->organisation) * device->channels;
    if (traffic->pattern < ODMA_LPDDR_SEQUENTIAL || traffic->pattern > ODMA_LPDDR_RUNS)
        return refuse(reason, ODMA_INVALID, "pattern: one of odma_lpddr_pattern");
    if (traffic->window > ODMA_LPDDR_WINDOW)
        return refuse(reason, ODMA_INVALID, "window: 0 to %d", ODMA_LPDDR_WINDOW);
    if (traffic->descriptor_ck > 1000000)
        return refuse(reason, ODMA_INVALID, "descriptor_ck: 0 to 1,000,000");
    if (!(traffic->write_fraction >= 0 && traffic->write_fraction <= 1))
        return refuse(reason, ODMA_INVALID, "write_fraction: 0 to 1");
    if (traffic->pattern == ODMA_LPDDR_RUNS) return check_runs(device, traffic, reason);
    if (traffic->chunk_bytes < 1 || traffic->chunk_bytes > capacity ||
        traffic->chunk_bytes % device->organisation.burst_bytes != 0)
        return refuse(reason, ODMA_INVALID, "chunk_bytes: a multiple of %u, at most %llu",
                      device->organisation.burst_bytes, (unsigned long long)capacity);
    if (traffic->requests < 1 || traffic->requests > (uint64_t)1 << 32)
        return refuse(reason, ODMA_INVALID, "requests: 1 to 2^32");
    if (traffic->warmup_requests > (uint64_t)1 << 32)
        return refuse(reason, ODMA_INVALID, "warmup_requests: 0 to 2^32");
    return ODMA_OK;
}

static void source_init(struct machine *machine, const odma_lpddr_traffic *traffic,
                        uint32_t window) {
    struct source *source = &machine->source;
    source->device = machine->device;
    source->traffic = traffic;
    source->random = traffic->seed * 0x9e3779b97f4a7c15U + 1;
    source->window = window;
    for (uint32_t i = 0; i < window; i++) source->chunks[i].next_free = i + 1;
}

odma_status odma_lpddr_run(const odma_lpddr_device *device, const odma_lpddr_traffic *traffic,
                           odma_lpddr_result *result, char reason[ODMA_REASON_BYTES]) {
    if (result == NULL) return refuse(reason, ODMA_INVALID, "result: missing");
    odma_status status = odma_lpddr_check(device, reason);
    if (status == ODMA_OK) status = check_traffic(device, traffic, reason);
    if (status != ODMA_OK) return status;

    uint32_t window = traffic->window > 0 ? traffic->window : 4 * ODMA_LPDDR_QUEUE;
    uint32_t room = traffic->window > 0 ? traffic->window : LEAST_PIECES;
    struct machine machine = {.device = device};
    machine.channels = calloc(device->channels, sizeof *machine.channels);
    machine.pieces = calloc((size_t)device->channels * room, sizeof *machine.pieces);
    machine.next = calloc(device->channels, sizeof *machine.next);
    machine.source.chunks = calloc(window, sizeof *machine.source.chunks);
    machine.source.ending = calloc(window, sizeof *machine.source.ending);
    if (machine.channels != NULL && machine.pieces != NULL && machine.next != NULL &&
        machine.source.chunks != NULL && machine.source.ending != NULL) {
        decoder_init(&machine.decoder, device);
        for (uint32_t i = 0; i < device->channels; i++)
            channel_init(&machine.channels[i], device, &machine.decoder,
                         machine.pieces + (size_t)i * room, room);
        source_init(&machine, traffic, window);
        measure(&machine, result);
        summarise(device, result);
    } else {
        status = ODMA_NO_SPACE;
        refuse(reason, ODMA_INVALID, "memory: not enough");
    }
    free(machine.channels);
    free(machine.pieces);
    free(machine.next);
    free(machine.source.chunks);
    free(machine.source.ending);
    return status;
}
