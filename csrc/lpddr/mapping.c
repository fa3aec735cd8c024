/* mapping.c - which devices can be, and where an address of a channel lies.
 *
 * A coordinate is made of address bits. Bits that stay side by side are moved
 * together, so that an address takes a few shifts and not one for every bit.
 */
#include <string.h>

static bool is_power(uint64_t value) { return value != 0 && (value & (value - 1)) == 0; }

static uint32_t log2_of(uint64_t power_of_two) { return (uint32_t)__builtin_ctzll(power_of_two); }

static uint64_t channel_bytes(const odma_lpddr_organisation *organisation) {
    return (uint64_t)organisation->bank_groups * organisation->banks_per_group *
           organisation->rows * organisation->row_bytes;
}

static odma_status check_timing(const odma_lpddr_timing *timing, char *reason) {
    const struct {
        const char *name;
        uint32_t value, least;
    } counts[] = {
        {"read_latency", timing->read_latency, 1},
        {"write_latency", timing->write_latency, 1},
        {"burst_min", timing->burst_min, 1},
        {"burst_max", timing->burst_max, timing->burst_min},
        {"rcd", timing->rcd, 1},
        {"rp_pb", timing->rp_pb, 1},
        {"rp_ab", timing->rp_ab, 1},
        {"ras", timing->ras, 1},
        {"rc", timing->rc, timing->ras},
        {"wr", timing->wr, 1},
        {"rtp", timing->rtp, 1},
        {"ppd", timing->ppd, 1},
        {"ccd_s", timing->ccd_s, timing->burst_min},
        {"ccd_l", timing->ccd_l, timing->ccd_s},
        {"rrd_s", timing->rrd_s, 1},
        {"rrd_l", timing->rrd_l, timing->rrd_s},
        {"faw", timing->faw, timing->rrd_s},
        {"wtr_s", timing->wtr_s, 1},
        {"wtr_l", timing->wtr_l, timing->wtr_s},
        {"rtw_gap", timing->rtw_gap, 0},
        {"rfc_ab", timing->rfc_ab, 1},
        {"rfc_pb", timing->rfc_pb, 1},
        {"refi", timing->refi, 0},
        {"refi_pb", timing->refi_pb, 0},
        {"pbr2pbr", timing->pbr2pbr, 1},
        {"pbr2act", timing->pbr2act, 1},
        {"aad", timing->aad, 2},
        {"wck_post", timing->wck_post, 0},
    };
    if (timing->clock_ps < 100 || timing->clock_ps > 100000)
        return refuse(reason, ODMA_INVALID, "timing.clock_ps: 100 to 100,000, not %u",
                      timing->clock_ps);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i].value < counts[i].least || counts[i].value > 65536)
            return refuse(reason, ODMA_INVALID, "timing.%s: %u to 65,536 CK, not %u",
                          counts[i].name, counts[i].least, counts[i].value);
    if (timing->aad >= timing->rcd)
        return refuse(reason, ODMA_INVALID,
                      "timing.aad: below rcd, so that ACT2 comes before data");
    return ODMA_OK;
}

static odma_status check_refresh(const odma_lpddr_device *device, char *reason) {
    const odma_lpddr_timing *timing = &device->timing;
    uint32_t close = timing->rc + timing->rp_ab;
    switch (device->controller.refresh) {
        case ODMA_LPDDR_REFRESH_NONE:
            return ODMA_OK;
        case ODMA_LPDDR_REFRESH_ALL_BANK:
            if (timing->refi > timing->rfc_ab + close) return ODMA_OK;
            return refuse(reason, ODMA_INVALID,
                          "timing.refi: above %u, to leave time between refreshes",
                          timing->rfc_ab + close);
        case ODMA_LPDDR_REFRESH_PER_BANK:
            if (timing->refi_pb > timing->pbr2pbr + close) return ODMA_OK;
            return refuse(reason, ODMA_INVALID,
                          "timing.refi_pb: above %u, to leave time between refreshes",
                          timing->pbr2pbr + close);
        default:
            return refuse(reason, ODMA_INVALID, "controller.refresh: one of odma_lpddr_refresh");
    }
}

static odma_status check_organisation(const odma_lpddr_organisation *organisation, char *reason) {
    const struct {
        const char *name;
        uint32_t value, least, most;
    } powers[] = {
        {"bank_groups", organisation->bank_groups, 1, ODMA_LPDDR_GROUPS},
        {"banks_per_group", organisation->banks_per_group, 1, ODMA_LPDDR_BANKS},
        {"rows", organisation->rows, 1, 1U << 24},
        {"burst_bytes", organisation->burst_bytes, 8, 256},
        {"row_bytes", organisation->row_bytes, organisation->burst_bytes, 1U << 16},
    };
    for (size_t i = 0; i < sizeof powers / sizeof *powers; i++)
        if (!is_power(powers[i].value) || powers[i].value < powers[i].least ||
            powers[i].value > powers[i].most)
            return refuse(reason, ODMA_INVALID,
                          "organisation.%s: a power of two from %u to %u, not %u", powers[i].name,
                          powers[i].least, powers[i].most, powers[i].value);
    if (organisation->bank_groups * organisation->banks_per_group > ODMA_LPDDR_BANKS)
        return refuse(reason, ODMA_INVALID,
                      "organisation.banks_per_group: at most %d banks in all, not %u",
                      ODMA_LPDDR_BANKS, organisation->bank_groups * organisation->banks_per_group);
    if (channel_bytes(organisation) > (uint64_t)1 << 36)
        return refuse(reason, ODMA_INVALID, "organisation.rows: at most 64 GiB in a channel");
    return ODMA_OK;
}

static odma_status check_controller(const odma_lpddr_controller *controller, char *reason) {
    if (controller->scheduler != ODMA_LPDDR_FRFCFS &&
        controller->scheduler != ODMA_LPDDR_FRFCFS_ROW_HIT)
        return refuse(reason, ODMA_INVALID, "controller.scheduler: one of odma_lpddr_scheduler");
    if (controller->read_entries < 1 || controller->read_entries > ODMA_LPDDR_QUEUE)
        return refuse(reason, ODMA_INVALID, "controller.read_entries: 1 to %d", ODMA_LPDDR_QUEUE);
    if (controller->write_entries < 1 || controller->write_entries > ODMA_LPDDR_QUEUE)
        return refuse(reason, ODMA_INVALID, "controller.write_entries: 1 to %d", ODMA_LPDDR_QUEUE);
    if (controller->accepts < 1 || controller->accepts > 64)
        return refuse(reason, ODMA_INVALID, "controller.accepts: 1 to 64 requests a CK");
    if (controller->wck_always_on > 1)
        return refuse(reason, ODMA_INVALID, "controller.wck_always_on: 0 or 1");
    if (!(controller->write_low >= 0 && controller->write_low < controller->write_high &&
          controller->write_high <= 1))
        return refuse(reason, ODMA_INVALID, "controller.write_high: above write_low, both 0 to 1");
    return ODMA_OK;
}

struct field {
    const char *name;
    const uint8_t *bits;
    uint32_t count;
};

static odma_status check_mapping(const odma_lpddr_device *device, char *reason) {
    const odma_lpddr_organisation *organisation = &device->organisation;
    const odma_lpddr_mapping *mapping = &device->mapping;
    const struct field fields[] = {
        {"column", mapping->column, log2_of(organisation->row_bytes / organisation->burst_bytes)},
        {"group", mapping->group, log2_of(organisation->bank_groups)},
        {"bank", mapping->bank, log2_of(organisation->banks_per_group)},
        {"row", mapping->row, log2_of(organisation->rows)},
    };
    uint32_t lowest = log2_of(organisation->burst_bytes);
    uint32_t end = log2_of(channel_bytes(organisation));
    const char *owner[64] = {NULL};
    for (size_t i = 0; i < 4; i++) {
        for (uint32_t j = 0; j < ODMA_LPDDR_BITS; j++) {
            uint32_t bit = fields[i].bits[j];
            if (j >= fields[i].count && bit == ODMA_LPDDR_NO_BIT) continue;
            if (j >= fields[i].count || bit == ODMA_LPDDR_NO_BIT)
                return refuse(reason, ODMA_INVALID,
                              "mapping.%s: %u bits, for the organisation given", fields[i].name,
                              fields[i].count);
            if (bit < lowest || bit >= end)
                return refuse(reason, ODMA_INVALID, "mapping.%s: address bits %u to %u, not %u",
                              fields[i].name, lowest, end - 1, bit);
            if (owner[bit] != NULL)
                return refuse(reason, ODMA_INVALID, "mapping.%s: address bit %u is in %s already",
                              fields[i].name, bit, owner[bit]);
            owner[bit] = fields[i].name;
        }
    }
    const struct field others[] = {{"group", mapping->group_xor, fields[1].count},
                                   {"bank", mapping->bank_xor, fields[2].count},
                                   {"row", mapping->row_xor, fields[3].count}};
    for (size_t i = 0; i < 3; i++) {
        for (uint32_t j = 0; j < ODMA_LPDDR_BITS; j++) {
            uint32_t bit = others[i].bits[j];
            if (bit == ODMA_LPDDR_NO_BIT) continue;
            bool in_range = bit >= lowest && bit < end;
            bool column = in_range && owner[bit] == fields[0].name;
            bool row = in_range && owner[bit] == fields[3].name;
            if (j >= others[i].count || !(column || (row && i < 2)))
                return refuse(reason, ODMA_INVALID,
                              "mapping.%s_xor: a column%s bit for each of %u bits", others[i].name,
                              i < 2 ? " or row" : "", others[i].count);
        }
    }
    return ODMA_OK;
}

odma_status odma_lpddr_check(const odma_lpddr_device *device, char reason[ODMA_REASON_BYTES]) {
    if (device == NULL) return refuse(reason, ODMA_INVALID, "device: missing");
    odma_status status = check_timing(&device->timing, reason);
    if (status == ODMA_OK) status = check_organisation(&device->organisation, reason);
    if (status == ODMA_OK) status = check_controller(&device->controller, reason);
    if (status == ODMA_OK) status = check_refresh(device, reason);
    if (status == ODMA_OK) status = check_mapping(device, reason);
    if (status != ODMA_OK) return status;
    if (device->channels < 1 || device->channels > ODMA_LPDDR_CHANNELS)
        return refuse(reason, ODMA_INVALID, "channels: 1 to %d, not %u", ODMA_LPDDR_CHANNELS,
                      device->channels);
    if (!is_power(device->interleave_bytes) ||
        device->interleave_bytes < device->organisation.burst_bytes ||
        device->interleave_bytes > channel_bytes(&device->organisation))
        return refuse(reason, ODMA_INVALID,
                      "interleave_bytes: a power of two from %u to the channel's size",
                      device->organisation.burst_bytes);
    return ODMA_OK;
}

static void add_bit(struct segment *segments, uint32_t *count, uint32_t from, uint32_t to) {
    if (*count > 0) {
        struct segment *last = &segments[*count - 1];
        uint32_t width = (uint32_t)__builtin_popcount(last->mask);
        if (last->shift + width == from && last->to + width == to) {
            last->mask = last->mask << 1 | 1;
            return;
        }
    }
    segments[(*count)++] = (struct segment){from, 1, to};
}

static void add_bits(struct segment *segments, uint32_t *count, const uint8_t *bits, uint32_t to) {
    for (uint32_t i = 0; i < ODMA_LPDDR_BITS; i++)
        if (bits[i] != ODMA_LPDDR_NO_BIT) add_bit(segments, count, bits[i], to + i);
}

static void decoder_init(struct decoder *decoder, const odma_lpddr_device *device) {
    memset(decoder, 0, sizeof *decoder);
    const odma_lpddr_mapping *mapping = &device->mapping;
    uint32_t bank_bits = log2_of(device->organisation.banks_per_group);
    add_bits(decoder->flat, &decoder->flat_count, mapping->bank, 0);
    add_bits(decoder->flat, &decoder->flat_count, mapping->group, bank_bits);
    add_bits(decoder->flat, &decoder->flat_count, mapping->bank_xor, 0);
    add_bits(decoder->flat, &decoder->flat_count, mapping->group_xor, bank_bits);
    add_bits(decoder->row, &decoder->row_count, mapping->row, 0);
    add_bits(decoder->row, &decoder->row_count, mapping->row_xor, 0);
}

static uint32_t gather(const struct segment *segments, uint32_t count, uint64_t address) {
    uint32_t value = 0;
    for (uint32_t i = 0; i < count; i++)
        value ^= ((uint32_t)(address >> segments[i].shift) & segments[i].mask) << segments[i].to;
    return value;
}

static uint32_t bank_of(const struct decoder *decoder, uint64_t address) {
    return gather(decoder->flat, decoder->flat_count, address);
}

static uint32_t row_of(const struct decoder *decoder, uint64_t address) {
    return gather(decoder->row, decoder->row_count, address);
}

odma_status odma_lpddr_locate(const odma_lpddr_device *device, uint64_t address, uint32_t *group,
                              uint32_t *bank, uint32_t *row, uint32_t *column) {
    if (group == NULL || bank == NULL || row == NULL || column == NULL) return ODMA_INVALID;
    odma_status status = odma_lpddr_check(device, NULL);
    if (status != ODMA_OK) return status;
    if (address >= channel_bytes(&device->organisation)) return ODMA_INVALID;
    struct decoder decoder;
    decoder_init(&decoder, device);
    uint32_t flat = bank_of(&decoder, address), bank_bits;
    bank_bits = log2_of(device->organisation.banks_per_group);
    *group = flat >> bank_bits;
    *bank = flat & (device->organisation.banks_per_group - 1);
    *row = row_of(&decoder, address);
    *column = 0;
    for (uint32_t i = 0; i < ODMA_LPDDR_BITS; i++)
        if (device->mapping.column[i] != ODMA_LPDDR_NO_BIT)
            *column |= (uint32_t)(address >> device->mapping.column[i] & 1) << i;
    return ODMA_OK;
}
