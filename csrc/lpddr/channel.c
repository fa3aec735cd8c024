/* channel.c - one channel: what its controller issues, and when.
 *
 * Time does not tick. A step asks which command may be issued now, issues the
 * one that the controller prefers, and says when the next could be issued; the
 * caller jumps there. So a channel that waits costs nothing.
 *
 *   Rule 1   One command a CK. ACT1 and ACT2 are two; a CAS before data after a
 *            pause is one.
 *   Rule 2   A request waits in its queue until its ACT1, then beside it: it
 *            holds its bank open until its data is read or written. At most one
 *            bank is between ACT1 and ACT2.
 *   Rule 3   First those that opened their bank, then refresh, then the queue,
 *            which waits while a refresh is due; the oldest whose command is
 *            ready. ACT2 fills a CK that nobody wants, or meets its deadline.
 *   Rule 4   In each bank only the oldest request for the open row (hit) and the
 *            oldest for another (miss) can be chosen. Both are kept up to date,
 *            so a step looks at banks and never at queues.
 *
 * Every `_at` is the first cycle that timing allows; constraints are applied
 * when the earlier command is issued.
 */
#include <string.h>

static const uint16_t NO_SLOT = UINT16_MAX;
static const uint32_t NO_BANK = UINT32_MAX;

enum command { NOTHING, OPENER, HIT, ACT1, ACT2, PRE, REFRESH_PRE, PRE_ALL, REF_ALL, REF_BANK };

struct choice {
    uint64_t seq;                 /* of the oldest that is ready; NEVER: none is */
    uint64_t next;                /* when another could be */
    enum command command;
    uint32_t bank;
};

static inline uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

static inline uint32_t group_of(const struct channel *channel, uint32_t bank) {
    return bank >> channel->group_shift;
}

static inline uint64_t bit(uint32_t bank) { return (uint64_t)1 << bank; }

static void channel_init(struct channel *channel, const odma_lpddr_device *device,
                  const struct decoder *decoder, struct piece *pieces, uint32_t piece_room) {
    memset(channel, 0, sizeof *channel);
    channel->device = device;
    channel->decoder = decoder;
    channel->group_shift = log2_of(device->organisation.banks_per_group);
    channel->pieces = pieces;
    channel->piece_room = piece_room;
    channel->activating = NO_BANK;
    uint32_t slots = device->controller.read_entries + device->controller.write_entries +
                     ODMA_LPDDR_BANKS;
    for (uint32_t i = 0; i < slots; i++)
        channel->slots[i].newer = i + 1 < slots ? (uint16_t)(i + 1) : NO_SLOT;
    channel->queues[READ].entries = device->controller.read_entries;
    channel->queues[WRITE].entries = device->controller.write_entries;
    for (uint32_t kind = 0; kind < KINDS; kind++)
        for (uint32_t bank = 0; bank < ODMA_LPDDR_BANKS; bank++)
            channel->queues[kind].head[bank] = channel->queues[kind].tail[bank] = NO_SLOT;
    switch (device->controller.refresh) {
        case ODMA_LPDDR_REFRESH_ALL_BANK:
            channel->refresh_at = device->timing.refi;
            break;
        case ODMA_LPDDR_REFRESH_PER_BANK:
            channel->refresh_at = device->timing.refi_pb;
            break;
        default:
            channel->refresh_at = NEVER;
    }
}

/* --- the queues --- */

static void set_hit(struct channel *channel, struct request_queue *queue, uint32_t bank,
                    uint16_t slot) {
    queue->hit[bank] = slot;
    if (slot == NO_SLOT) {
        queue->hits &= ~bit(bank);
    } else {
        queue->hits |= bit(bank);
        queue->hit_seq[bank] = channel->slots[slot].seq;
    }
}

static void set_miss(struct channel *channel, struct request_queue *queue, uint32_t bank,
                     uint16_t slot) {
    queue->miss[bank] = slot;
    if (slot == NO_SLOT) {
        queue->misses &= ~bit(bank);
    } else {
        queue->misses |= bit(bank);
        queue->miss_seq[bank] = channel->slots[slot].seq;
    }
}

/* The first request from `slot` on whose row is, or is not, the open one. */
static uint16_t first_from(const struct channel *channel, uint32_t bank, uint16_t slot, bool hit) {
    while (slot != NO_SLOT && (channel->slots[slot].row == channel->row[bank]) != hit)
        slot = channel->slots[slot].newer;
    return slot;
}

/* Look again at who is oldest in a bank that was opened or closed. */
static void bank_changed(struct channel *channel, uint32_t bank) {
    bool open = channel->open & bit(bank);
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        struct request_queue *queue = &channel->queues[kind];
        uint16_t head = queue->head[bank];
        if (channel->activating == bank || head == NO_SLOT) {
            set_hit(channel, queue, bank, NO_SLOT);
            set_miss(channel, queue, bank, NO_SLOT);
        } else if (open) {
            set_hit(channel, queue, bank, first_from(channel, bank, head, true));
            set_miss(channel, queue, bank, first_from(channel, bank, head, false));
        } else {
            set_hit(channel, queue, bank, NO_SLOT);
            set_miss(channel, queue, bank, head);
        }
    }
}

static void enqueue(struct channel *channel, uint64_t address, uint32_t block, uint32_t kind) {
    uint32_t bank = bank_of(channel->decoder, address);
    uint16_t index = channel->free_slot;
    struct waiting *slot = &channel->slots[index];
    channel->free_slot = slot->newer;
    struct request_queue *queue = &channel->queues[kind];
    *slot = (struct waiting){channel->seq++, row_of(channel->decoder, address), block,
                             queue->tail[bank], NO_SLOT, (uint8_t)bank, (uint8_t)kind, false};
    if (slot->older == NO_SLOT)
        queue->head[bank] = index;
    else
        channel->slots[slot->older].newer = index;
    queue->tail[bank] = index;
    queue->count++;
    if (channel->activating == bank) return;
    if ((channel->open & bit(bank)) && slot->row == channel->row[bank]) {
        if (!(queue->hits & bit(bank))) set_hit(channel, queue, bank, index);
    } else if (!(queue->misses & bit(bank))) {
        set_miss(channel, queue, bank, index);
    }
}

/* Take a request out of its queue; the slot stays its own. */
static void unlink_slot(struct channel *channel, uint16_t index) {
    struct waiting *slot = &channel->slots[index];
    struct request_queue *queue = &channel->queues[slot->kind];
    if (slot->older == NO_SLOT)
        queue->head[slot->bank] = slot->newer;
    else
        channel->slots[slot->older].newer = slot->newer;
    if (slot->newer == NO_SLOT)
        queue->tail[slot->bank] = slot->older;
    else
        channel->slots[slot->newer].older = slot->older;
    queue->count--;
}

/* Accept from the source, in order, so many a CK; a full queue blocks it.
 * Returns whether the source could go on in the next CK. */
static bool fill(struct channel *channel, uint64_t now) {
    uint64_t credit = channel->device->controller.accepts;
    if (now > channel->filled_at) {
        uint64_t most = (uint64_t)channel->queues[READ].entries + channel->queues[WRITE].entries;
        uint64_t cycles = now - channel->filled_at;
        credit = cycles > most ? most : credit * cycles;
    }
    channel->filled_at = now;
    while (channel->piece_count > 0) {
        struct piece *piece = &channel->pieces[channel->piece_first];
        struct request_queue *queue = &channel->queues[piece->kind];
        if (queue->count >= queue->entries) return false;
        if (credit-- == 0) return true;
        enqueue(channel, piece->address, piece->block, piece->kind);
        piece->address += channel->device->organisation.burst_bytes;
        if (--piece->requests > 0) continue;
        channel->piece_count--;
        if (++channel->piece_first == channel->piece_room) channel->piece_first = 0;
    }
    return false;
}

/* --- choosing --- */

static inline void offer(struct choice *choice, uint64_t now, uint64_t at, uint64_t seq,
                         enum command command, uint32_t bank) {
    if (at > now) {
        if (at < choice->next) choice->next = at;
    } else if (seq < choice->seq) {
        choice->seq = seq;
        choice->command = command;
        choice->bank = bank;
    }
}

static void offer_openers(const struct channel *channel, uint64_t now, struct choice *choice) {
    for (uint64_t left = channel->active; left != 0; left &= left - 1) {
        uint32_t bank = (uint32_t)__builtin_ctzll(left);
        const struct waiting *slot = &channel->slots[channel->opener[bank]];
        uint64_t at = later(channel->cas_at[bank], channel->rank_cas_at[slot->kind]);
        at = later(at, channel->group_cas_at[slot->kind][group_of(channel, bank)]);
        offer(choice, now, at, slot->seq, OPENER, bank);
    }
}

static void offer_refresh_all(const struct channel *channel, uint64_t now,
                              struct choice *choice) {
    if (channel->activating != NO_BANK || channel->active != 0) return;
    if (channel->open != 0)
        offer(choice, now, later(channel->all_pre_at, channel->rank_pre_at), 0, PRE_ALL, 0);
    else
        offer(choice, now, channel->all_ref_at, 0, REF_ALL, 0);
}

static void offer_refresh_bank(const struct channel *channel, uint64_t now,
                               struct choice *choice) {
    uint32_t bank = channel->refresh_bank;
    if (channel->activating == bank || (channel->active & bit(bank))) return;
    if (channel->open & bit(bank))
        offer(choice, now, later(channel->pre_at[bank], channel->rank_pre_at), 0, REFRESH_PRE,
              bank);
    else
        offer(choice, now, later(channel->ref_at[bank], channel->bank_ref_at), 0, REF_BANK, bank);
}

static void offer_hits(const struct channel *channel, const struct request_queue *queue,
                       uint32_t kind, uint64_t now, struct choice *choice) {
    if (queue->hits == 0) return;
    if (channel->rank_cas_at[kind] > now) {
        offer(choice, now, channel->rank_cas_at[kind], 0, HIT, 0);
        return;
    }
    const uint64_t *group_cas_at = channel->group_cas_at[kind];
    for (uint64_t left = queue->hits; left != 0; left &= left - 1) {
        uint32_t bank = (uint32_t)__builtin_ctzll(left);
        uint64_t at = later(channel->cas_at[bank], group_cas_at[group_of(channel, bank)]);
        offer(choice, now, at, queue->hit_seq[bank], HIT, bank);
    }
}

static void offer_acts(const struct channel *channel, const struct request_queue *queue,
                       uint64_t now, struct choice *choice) {
    uint64_t closed = queue->misses & ~channel->open;
    if (closed == 0 || channel->activating != NO_BANK) return;
    if (channel->rank_act_at > now) {
        offer(choice, now, channel->rank_act_at, 0, ACT1, 0);
        return;
    }
    for (uint64_t left = closed; left != 0; left &= left - 1) {
        uint32_t bank = (uint32_t)__builtin_ctzll(left);
        uint64_t at = later(channel->act_at[bank], channel->group_act_at[group_of(channel, bank)]);
        offer(choice, now, at, queue->miss_seq[bank], ACT1, bank);
    }
}

static void offer_pres(const struct channel *channel, const struct request_queue *queue,
                       uint64_t now, struct choice *choice) {
    bool hits_first = channel->device->controller.scheduler == ODMA_LPDDR_FRFCFS_ROW_HIT;
    for (uint64_t left = queue->misses & channel->open & ~channel->active; left != 0;
         left &= left - 1) {
        uint32_t bank = (uint32_t)__builtin_ctzll(left);
        if (hits_first && (queue->hits & bit(bank)) &&
            queue->hit_seq[bank] < queue->miss_seq[bank])
            continue;
        offer(choice, now, later(channel->pre_at[bank], channel->rank_pre_at),
              queue->miss_seq[bank], PRE, bank);
    }
}

static void set_draining(struct channel *channel) {
    const odma_lpddr_controller *controller = &channel->device->controller;
    const struct request_queue *writes = &channel->queues[WRITE];
    double share = writes->count;
    if (!channel->draining)
        channel->draining = share > controller->write_high * controller->write_entries ||
                            channel->queues[READ].count == 0;
    else
        channel->draining = share >= controller->write_low * controller->write_entries ||
                            channel->queues[READ].count == 0;
}

static struct choice choose(struct channel *channel, uint64_t now) {
    struct choice choice = {NEVER, NEVER, NOTHING, 0};
    if (channel->activating != NO_BANK && channel->act2_deadline <= now) {
        choice.command = ACT2;
        return choice;
    }
    offer_openers(channel, now, &choice);
    if (choice.command != NOTHING) return choice;
    if (channel->refreshes_due > 0) {
        if (channel->device->controller.refresh == ODMA_LPDDR_REFRESH_ALL_BANK)
            offer_refresh_all(channel, now, &choice);
        else
            offer_refresh_bank(channel, now, &choice);
    } else {
        set_draining(channel);
        uint32_t kind = channel->draining ? WRITE : READ;
        const struct request_queue *queue = &channel->queues[kind];
        offer_hits(channel, queue, kind, now, &choice);
        offer_acts(channel, queue, now, &choice);
        offer_pres(channel, queue, now, &choice);
    }
    if (choice.command == NOTHING && channel->activating != NO_BANK) choice.command = ACT2;
    return choice;
}

/* --- issuing --- */

static void touch(struct channel *channel, uint32_t bank) {
    channel->slots[channel->queues[channel->draining ? WRITE : READ].miss[bank]].touched = true;
}

static void close_bank(struct channel *channel, uint32_t bank, uint64_t now) {
    const odma_lpddr_timing *timing = &channel->device->timing;
    channel->open &= ~bit(bank);
    channel->act_at[bank] = later(channel->act_at[bank], now + timing->rp_pb);
    channel->ref_at[bank] = later(channel->ref_at[bank], now + timing->rp_pb);
    channel->rank_pre_at = now + timing->ppd;
    channel->all_ref_at = later(channel->all_ref_at, now + timing->rp_pb);
    channel->counts.precharges++;
    bank_changed(channel, bank);
}

static void close_all(struct channel *channel, uint64_t now) {
    const odma_lpddr_timing *timing = &channel->device->timing;
    uint64_t closed = channel->open;
    channel->open = 0;
    for (uint64_t left = closed; left != 0; left &= left - 1)
        bank_changed(channel, (uint32_t)__builtin_ctzll(left));
    channel->rank_act_at = later(channel->rank_act_at, now + timing->rp_ab);
    channel->rank_pre_at = now + timing->ppd;
    channel->all_ref_at = later(channel->all_ref_at, now + timing->rp_pb);
    channel->counts.precharges_all++;
}

static void refresh_all(struct channel *channel, uint64_t now) {
    const odma_lpddr_timing *timing = &channel->device->timing;
    channel->rank_act_at = later(channel->rank_act_at, now + timing->rfc_ab);
    channel->all_ref_at = later(channel->all_ref_at, now + timing->rfc_ab);
    channel->counts.refreshes_all++;
    channel->refreshes_due--;
}

static void refresh_bank(struct channel *channel, uint64_t now) {
    const odma_lpddr_timing *timing = &channel->device->timing;
    const odma_lpddr_organisation *organisation = &channel->device->organisation;
    uint32_t bank = channel->refresh_bank;
    channel->act_at[bank] = later(channel->act_at[bank], now + timing->rfc_pb);
    channel->rank_act_at = later(channel->rank_act_at, now + timing->pbr2act);
    channel->bank_ref_at = now + timing->pbr2pbr;
    channel->counts.refreshes_bank++;
    channel->refreshes_due--;
    channel->refresh_bank =
        (bank + 1) % (organisation->bank_groups * organisation->banks_per_group);
}

static void activate(struct channel *channel, uint32_t bank, uint64_t now) {
    const odma_lpddr_timing *timing = &channel->device->timing;
    uint16_t index = channel->queues[channel->draining ? WRITE : READ].miss[bank];
    touch(channel, bank);
    unlink_slot(channel, index);
    channel->opener[bank] = index;
    channel->row[bank] = channel->slots[index].row;
    channel->activating = bank;
    channel->act2_deadline = now + timing->aad;
    bank_changed(channel, bank);

    channel->last_acts[channel->oldest_act] = now + timing->faw;
    channel->oldest_act = (channel->oldest_act + 1) % 4;
    channel->rank_act_at = later(channel->rank_act_at, now + timing->rrd_s);
    channel->rank_act_at = later(channel->rank_act_at, channel->last_acts[channel->oldest_act]);
    channel->group_act_at[group_of(channel, bank)] = now + timing->rrd_l;
    channel->act_at[bank] = now + timing->rc;
    channel->cas_at[bank] = now + timing->rcd;
    channel->pre_at[bank] = later(channel->pre_at[bank], now + timing->ras);
    channel->ref_at[bank] = later(channel->ref_at[bank], now + timing->rc);
    channel->all_pre_at = later(channel->all_pre_at, now + timing->ras);
    channel->all_ref_at = later(channel->all_ref_at, now + timing->rc);
    channel->counts.activates++;
}

static void finish_activate(struct channel *channel) {
    uint32_t bank = channel->activating;
    channel->activating = NO_BANK;
    channel->open |= bit(bank);
    channel->active |= bit(bank);
    bank_changed(channel, bank);
}

static void constrain_columns(struct channel *channel, uint32_t bank, uint32_t kind,
                              uint64_t now) {
    const odma_lpddr_timing *timing = &channel->device->timing;
    uint32_t group = group_of(channel, bank);
    uint64_t *rank = channel->rank_cas_at, close;
    rank[kind] = later(rank[kind], now + timing->ccd_s);
    channel->group_cas_at[kind][group] = now + timing->ccd_l;
    if (kind == READ) {
        uint32_t data = timing->read_latency + timing->burst_min + timing->rtw_gap;
        uint32_t gap = data > timing->write_latency ? data - timing->write_latency : 1;
        rank[WRITE] = later(rank[WRITE], now + gap);
        close = now + timing->rtp;
    } else {
        uint64_t data = now + timing->write_latency;
        rank[READ] = later(rank[READ], data + timing->burst_min + timing->wtr_s);
        channel->group_cas_at[READ][group] = later(channel->group_cas_at[READ][group],
                                                   data + timing->burst_max + timing->wtr_l);
        close = data + timing->burst_min + timing->wr;
    }
    channel->pre_at[bank] = later(channel->pre_at[bank], close);
    channel->all_pre_at = later(channel->all_pre_at, close);
}

/* Read or write a request and forget it. */
static void access_column(struct channel *channel, uint16_t index, uint64_t now) {
    const odma_lpddr_timing *timing = &channel->device->timing;
    struct waiting *slot = &channel->slots[index];
    uint32_t kind = slot->kind;
    uint32_t latency = kind == READ ? timing->read_latency : timing->write_latency;
    constrain_columns(channel, slot->bank, kind, now);
    channel->wck_until = later(channel->wck_until,
                               now + latency + timing->burst_min + timing->wck_post);
    channel->counts.requests++;
    channel->counts.row_hits += !slot->touched;
    if (kind == READ)
        channel->counts.reads++;
    else
        channel->counts.writes++;
    channel->done_block = slot->block;
    channel->done_at = now + latency + timing->burst_min;
    slot->newer = channel->free_slot;
    channel->free_slot = index;
}

/* Wake the data clock if it sleeps: a CAS now, the access in the next CK.
 * Returns whether there is time before ACT2 has to be issued. */
static bool wake_wck(struct channel *channel, uint64_t *now) {
    if (channel->device->controller.wck_always_on || *now < channel->wck_until) return true;
    if (channel->activating != NO_BANK && channel->act2_deadline <= *now + 1) return false;
    channel->counts.wck_syncs++;
    (*now)++;
    return true;
}

static void access_hit(struct channel *channel, uint32_t bank, uint64_t now) {
    struct request_queue *queue = &channel->queues[channel->draining ? WRITE : READ];
    uint16_t index = queue->hit[bank], next = channel->slots[index].newer;
    unlink_slot(channel, index);
    set_hit(channel, queue, bank, first_from(channel, bank, next, true));
    access_column(channel, index, now);
}

static void issue(struct channel *channel, struct choice choice, uint64_t *now) {
    if ((choice.command == OPENER || choice.command == HIT) && !wake_wck(channel, now))
        choice.command = ACT2;
    switch (choice.command) {
        case OPENER:
            channel->active &= ~bit(choice.bank);
            access_column(channel, channel->opener[choice.bank], *now);
            break;
        case HIT:
            access_hit(channel, choice.bank, *now);
            break;
        case ACT1:
            activate(channel, choice.bank, *now);
            break;
        case ACT2:
            finish_activate(channel);
            break;
        case PRE:
            touch(channel, choice.bank);
            close_bank(channel, choice.bank, *now);
            break;
        case REFRESH_PRE:
            close_bank(channel, choice.bank, *now);
            break;
        case PRE_ALL:
            close_all(channel, *now);
            break;
        case REF_ALL:
            refresh_all(channel, *now);
            break;
        case REF_BANK:
            refresh_bank(channel, *now);
            break;
        default:
            break;
    }
}

/* Issue at most one command at `now`; returns when to come again, NEVER if only
 * the source can change anything. */
static uint64_t channel_step(struct channel *channel, uint64_t now) {
    const odma_lpddr_device *device = channel->device;
    channel->done_block = NONE_DONE;
    bool more = fill(channel, now);
    if (now >= channel->refresh_at) {
        channel->refreshes_due++;
        bool all = device->controller.refresh == ODMA_LPDDR_REFRESH_ALL_BANK;
        channel->refresh_at += all ? device->timing.refi : device->timing.refi_pb;
    }
    struct choice choice = choose(channel, now);
    if (choice.command != NOTHING) {
        issue(channel, choice, &now);
        return now + 1;
    }
    uint64_t next = choice.next < channel->refresh_at ? choice.next : channel->refresh_at;
    return more && now + 1 < next ? now + 1 : next;
}
