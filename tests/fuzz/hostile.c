/* A hostile driver: fills the rings of a guest with chains, sound ones and ones that break every rule, and a model of
 * what a device has to make of them.
 *
 * The fuzzer (rings.py, devices.py) loads this as a shared library. It works on the front end's mapping of guest memory,
 * as a guest would; the device under test reads the same memory through its own. Three parts:
 *
 *   hostile_fill     makes chains available. Each is first sound, then with probability chaos/256 something in it is
 *                    broken: an address, a length, flags, an index, an indirect table, the event fields, even the used
 *                    ring, which a driver has no business to write.
 *   hostile_expect   reads the next available chain by the letter of virtio 1.3 (2.7, 2.8) and says what it holds. It is
 *                    written apart from the device's code on purpose: where both disagree one is wrong.
 *   hostile_race     a thread that goes on changing rings and tables while the device reads them.
 *
 * Everything random comes from one generator with one seed, so that a run can be had again (but for the thread).
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NEXT 1
#define WRITE 2
#define INDIRECT 4
#define AVAIL 0x80
#define USED 0x8000
#define REGIONS 8
#define TEMPLATES 128
#define PIECES 64
#define WRITTEN 4096

typedef struct {
    uint64_t gpa, size;
    uint8_t *host;
} region_t;

typedef struct {
    const uint8_t *data;
    uint32_t size, keep;            /* keep: bytes at the beginning that are mostly left as they are */
} template_t;

typedef struct {                    /* the same in model.py */
    uint64_t random;
    uint64_t filled;                /* chains made so far */
    uint32_t n_regions, n_templates;
    region_t regions[REGIONS];
    template_t templates[TEMPLATES];
    uint32_t size, packed, event_idx, indirect, swap, chaos;
    uint64_t desc, driver, device;  /* guest addresses of the ring's areas */
    uint64_t heap, heap_end;        /* where buffers go when the chain is a request */
    uint32_t room_most;             /* bytes of the writable part of a request, at most */
    /* the driver's position */
    uint32_t avail, wrap;
    /* the model's position in the same ring */
    uint32_t last, seen, last_wrap;
    /* what the model found */
    uint32_t head, slots, n_out, n_in;
    uint64_t out_size, in_size, sum;
    /* the racing thread */
    pthread_t thread;
    volatile int racing;
    uint64_t heap_at;
    uint64_t race_random;
    int truncate_fd;                /* racing: cut this file off at some time; -1: don't */
} hostile_t;

typedef struct {
    uint64_t addr;
    uint32_t len;
    uint16_t a, b;                  /* split: flags, next; packed: id, flags */
} desc_t;

size_t hostile_size(void) { return sizeof(hostile_t); }

/* -- chance */

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    *state = x;
    return x * 0x2545F4914F6CDD1Dull;
}

static uint32_t upto(hostile_t *h, uint32_t n) { return n ? (uint32_t)((next_random(&h->random) >> 32) * n >> 32) : 0; }
static int chance(hostile_t *h, uint32_t of_256) { return (next_random(&h->random) >> 56) < of_256; }

static const uint64_t interesting[] = {
    0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 64, 127, 128, 255, 256, 511, 512, 513, 1023, 4095, 4096, 4097, 0x7fff, 0x8000,
    0x8001, 0xfffe, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff, 0x100000000, 0x7fffffffffffffff,
    0x8000000000000000, 0xfffffffffffff000, 0xfffffffffffffff0, 0xffffffffffffffff,
};

static uint64_t odd_value(hostile_t *h)
{
    uint32_t n = sizeof(interesting) / sizeof(interesting[0]);
    if (chance(h, 64))                                  /* the bounds of the ring, and those of a table */
        return h->size * (chance(h, 128) ? 1 : 16) + upto(h, 3) - 1;
    return chance(h, 64) ? next_random(&h->random) : interesting[upto(h, n)] + upto(h, 3) - 1;
}

/* -- guest memory, the front end's side */

static uint8_t *at(hostile_t *h, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < h->n_regions; i++) {
        region_t *r = &h->regions[i];
        if (gpa >= r->gpa && gpa - r->gpa < r->size && size <= r->size - (gpa - r->gpa))
            return r->host + (gpa - r->gpa);
    }
    return NULL;
}

static uint16_t to16(hostile_t *h, uint16_t v) { return h->swap ? __builtin_bswap16(v) : v; }
static uint32_t to32(hostile_t *h, uint32_t v) { return h->swap ? __builtin_bswap32(v) : v; }
static uint64_t to64(hostile_t *h, uint64_t v) { return h->swap ? __builtin_bswap64(v) : v; }

static void put16(hostile_t *h, uint64_t gpa, uint16_t v)
{
    uint8_t *p = at(h, gpa, 2);
    v = to16(h, v);
    if (p != NULL && !((uintptr_t)p & 1))
        __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE);
}

static uint16_t get16(hostile_t *h, uint64_t gpa)
{
    uint16_t v = 0;
    uint8_t *p = at(h, gpa, 2);
    if (p != NULL)
        memcpy(&v, p, 2);
    return to16(h, v);
}

static void put_desc(hostile_t *h, uint64_t gpa, uint64_t addr, uint32_t len, uint16_t a, uint16_t b)
{
    desc_t d = {to64(h, addr), to32(h, len), to16(h, a), to16(h, b)};
    for (uint32_t i = 0; i < sizeof(d); i++) {         /* byte by byte: a table may lie across two regions */
        uint8_t *p = at(h, gpa + i, 1);
        if (p != NULL)
            *p = ((uint8_t *)&d)[i];
    }
}

static int get_desc(hostile_t *h, uint64_t gpa, desc_t *d)
{
    for (uint32_t i = 0; i < sizeof(*d); i++) {
        uint8_t *p = at(h, gpa + i, 1);
        if (p == NULL)
            return -1;
        ((uint8_t *)d)[i] = *p;
    }
    d->addr = to64(h, d->addr);
    d->len = to32(h, d->len);
    d->a = to16(h, d->a);
    d->b = to16(h, d->b);
    return 0;
}

/* -- chains */

typedef struct {
    uint64_t gpa;
    uint32_t len;
    int write;
} piece_t;

/* An address where `len` bytes are, mostly. */
static uint64_t some_address(hostile_t *h, uint32_t len)
{
    region_t *r = &h->regions[upto(h, h->n_regions)];
    uint32_t kind = upto(h, 256);
    if (!h->chaos && r == &h->regions[0])               /* sound: what the device writes stays off the ring */
        return h->heap + upto(h, (uint32_t)(h->heap_end - h->heap - len));
    if (kind < 200)
        return r->gpa + upto(h, (uint32_t)(r->size > len ? r->size - len : 1));
    if (kind < 232)                                     /* across the end of a region: the next may begin there */
        return r->gpa + r->size - upto(h, len < r->size ? len + 1 : (uint32_t)r->size);
    if (kind < 240 && h->chaos)                         /* in the ring itself */
        return (kind & 1 ? h->desc : kind & 2 ? h->driver : h->device) + upto(h, 64);
    if (chance(h, 256 - h->chaos))
        return r->gpa;
    return kind < 248 ? r->gpa + r->size : odd_value(h);
}

static uint32_t some_pieces(hostile_t *h, piece_t *pieces)
{
    uint32_t most = h->size < PIECES ? h->size : PIECES, n = 1 + upto(h, chance(h, 240) ? (most < 6 ? most : 6) : most);
    uint32_t n_out = upto(h, n + 1);
    for (uint32_t i = 0; i < n; i++) {
        pieces[i].len = chance(h, 200) ? 1 + upto(h, 600) : 1 + upto(h, 20000);
        pieces[i].gpa = some_address(h, pieces[i].len);
        pieces[i].write = i >= n_out;
    }
    return n;
}

static uint64_t take_heap(hostile_t *h, uint32_t size)
{
    if (h->heap_at + size + 16 > h->heap_end || h->heap_at < h->heap)
        h->heap_at = h->heap;
    uint64_t gpa = h->heap_at;
    h->heap_at += size + upto(h, 16);
    return gpa;
}

/* Cut `size` bytes into up to `most` pieces; `data` is stored in them where it is not NULL. */
static uint32_t cut(hostile_t *h, piece_t *pieces, uint32_t most, uint32_t size, const uint8_t *data, int write)
{
    uint32_t n = 0, whole = upto(h, 3);
    while (size && n < most) {
        uint32_t len = n + 1 == most || whole == 0 ? size : 1 + upto(h, whole == 1 ? size : size < 32 ? size : 32);
        pieces[n].gpa = take_heap(h, len);
        pieces[n].len = len;
        pieces[n].write = write;
        uint8_t *p = at(h, pieces[n].gpa, len);
        if (p != NULL && data != NULL) {
            memcpy(p, data, len);
            data += len;
        }
        n++;
        size -= len;
    }
    return n;
}

/* A request: a template, mutated, and room for an answer. */
static uint32_t request_pieces(hostile_t *h, piece_t *pieces)
{
    static const uint32_t rooms[] = {0, 1, 2, 4, 12, 13, 16, 21, 64, 512, 513, 1025, 4096, 4097, 8193, 65562, 70000};
    static uint8_t data[1 << 17];
    uint32_t most = h->size < PIECES ? h->size : PIECES, n, room;
    template_t *t = &h->templates[upto(h, h->n_templates)];
    uint32_t size = t->size;
    memcpy(data, t->data, size);
    if (chance(h, 128)) {
        uint32_t times = 1 + upto(h, 4);
        for (uint32_t i = 0; i < times && size; i++) {
            uint32_t low = chance(h, 128) && t->keep < size ? t->keep : 0, where = low + upto(h, size - low);
            uint64_t value = odd_value(h);
            uint32_t width = 1u << upto(h, 4);
            memcpy(data + where, &value, width < size - where ? width : size - where);
        }
    }
    if (chance(h, 40))
        size = upto(h, size + 1);
    else if (chance(h, 40))
        size += upto(h, 1200);
    if (size > sizeof(data))
        size = sizeof(data);
    room = rooms[upto(h, sizeof(rooms) / sizeof(rooms[0]))];
    if (chance(h, 80))
        room += upto(h, 40);
    if (room > h->room_most)
        room = h->room_most;
    if (most < 2)
        return size ? cut(h, pieces, 1, size, data, 0) : cut(h, pieces, 1, room ? room : 1, NULL, 1);
    n = cut(h, pieces, most / 2, size, data, 0);
    n += cut(h, pieces + n, most - n, room, NULL, 1);
    return n ? n : cut(h, pieces, 1, 1, NULL, 1);
}

/* Where the table of an indirect chain goes. */
static uint64_t table_place(hostile_t *h, uint32_t n)
{
    if (h->n_templates || chance(h, 220))
        return take_heap(h, 16 * n) & ~(uint64_t)(chance(h, 200) ? 15 : 0);
    return some_address(h, 16 * n);
}

/* Of a descriptor table of `n` entries: entry `i`. */
static void break_desc(hostile_t *h, uint64_t gpa, uint32_t i, uint32_t n)
{
    desc_t d;
    if (get_desc(h, gpa + 16 * i, &d) != 0)
        return;
    switch (upto(h, 5)) {
    case 0: d.addr = odd_value(h); break;
    case 1: d.len = (uint32_t)odd_value(h); break;
    case 2: d.a = (uint16_t)odd_value(h); break;
    case 3: d.b = (uint16_t)(chance(h, 64) ? n : odd_value(h)); break;
    default:
        if (h->packed)
            d.b ^= 1u << upto(h, 16);
        else
            d.a ^= 1u << upto(h, 4);
    }
    put_desc(h, gpa + 16 * i, d.addr, d.len, d.a, d.b);
}

/* Something in the ring, in half of the cases in the chain that was made last: `n` descriptors from `first` on. */
static void break_ring(hostile_t *h, uint64_t table, uint32_t first, uint32_t step, uint32_t n)
{
    int here = chance(h, 128);
    uint32_t entry = here ? (first + step * upto(h, table ? 1 : n)) % h->size : upto(h, h->size);
    switch (upto(h, 8)) {
    case 0: case 1: case 2: break_desc(h, h->desc, entry, h->size); break;
    case 3: break_desc(h, table ? table : h->desc, table ? upto(h, n) : entry, table ? n : h->size); break;
    case 4:
        put16(h, h->driver + (upto(h, 2) ? 0 : 4 + 2 * (h->packed ? 0 : h->size)), (uint16_t)odd_value(h));
        break;
    case 5:
        entry = here && !h->packed ? 2 + (h->avail + h->size - 1) % h->size : upto(h, h->packed ? 2 : 2 + h->size);
        put16(h, h->driver + 2 * entry, (uint16_t)odd_value(h));
        break;
    case 6:
        put16(h, h->device + 2 * upto(h, h->packed ? 2 : 2 + 4 * h->size), (uint16_t)odd_value(h));
        break;
    default:
        if (h->packed)
            h->wrap ^= 1;
        else
            put16(h, h->driver + 2, (uint16_t)(h->avail + odd_value(h)));
    }
}

static uint16_t packed_flags(hostile_t *h, uint16_t flags) { return flags | (h->wrap ? AVAIL : USED); }

static void packed_step(uint32_t size, uint32_t *slot, uint32_t *wrap, uint32_t by)
{
    *slot += by;
    if (*slot >= size) {
        *slot -= size;
        *wrap ^= 1;
    }
}

/* A sound descriptor where none should be looked for: one behind the end of a table. */
static void put_decoy(hostile_t *h, uint64_t gpa)
{
    put_desc(h, gpa, h->heap, 64, h->packed ? 0 : WRITE, h->packed ? WRITE : 0);
}

static uint64_t write_table(hostile_t *h, const piece_t *pieces, uint32_t n)
{
    uint64_t table = table_place(h, n + 1);
    for (uint32_t i = 0; i < n; i++) {
        uint16_t flags = (pieces[i].write ? WRITE : 0) | (i + 1 < n ? NEXT : 0);
        if (h->packed)
            put_desc(h, table + 16 * i, pieces[i].gpa, pieces[i].len, 0, flags);
        else
            put_desc(h, table + 16 * i, pieces[i].gpa, pieces[i].len, flags, (uint16_t)(i + 1 < n ? i + 1 : 0));
    }
    put_decoy(h, table + 16 * n);
    return table;
}

static void emit_split(hostile_t *h, const piece_t *pieces, uint32_t n, uint64_t table, uint32_t first, uint32_t step)
{
    uint32_t i = first;
    if (table) {
        put_desc(h, h->desc + 16 * i, table, 16 * n, INDIRECT, 0);
    } else {
        for (uint32_t k = 0; k < n; k++) {
            uint32_t next = (i + step) % h->size;
            uint16_t flags = (pieces[k].write ? WRITE : 0) | (k + 1 < n ? NEXT : 0);
            put_desc(h, h->desc + 16 * i, pieces[k].gpa, pieces[k].len, flags, (uint16_t)next);
            i = next;
        }
    }
    put16(h, h->driver + 4 + 2 * (h->avail % h->size), (uint16_t)first);
    h->avail = (h->avail + 1) & 0xffff;
    put16(h, h->driver + 2, (uint16_t)h->avail);
}

static void emit_packed(hostile_t *h, const piece_t *pieces, uint32_t n, uint64_t table)
{
    uint32_t slot = h->avail, wrap = h->wrap, first = slot;
    uint16_t id = (uint16_t)upto(h, h->size), first_flags = 0;
    if (table) {
        put_desc(h, h->desc + 16 * slot, table, 16 * n, id, packed_flags(h, INDIRECT));
        packed_step(h->size, &h->avail, &h->wrap, 1);
        return;
    }
    for (uint32_t k = 0; k < n; k++) {
        uint16_t flags = packed_flags(h, (pieces[k].write ? WRITE : 0) | (k + 1 < n ? NEXT : 0));
        put_desc(h, h->desc + 16 * h->avail, pieces[k].gpa, pieces[k].len, id, k ? flags : 0);
        if (k == 0)
            first_flags = flags;
        packed_step(h->size, &h->avail, &h->wrap, 1);
    }
    (void)wrap;
    put16(h, h->desc + 16 * first + 14, first_flags);
}

/* Make `count` chains available. */
void hostile_fill(hostile_t *h, uint32_t count)
{
    piece_t pieces[PIECES];
    for (uint32_t i = 0; i < count; i++) {
        uint32_t n = h->n_templates ? request_pieces(h, pieces) : some_pieces(h, pieces);
        uint64_t table = h->indirect && chance(h, 90) ? write_table(h, pieces, n) : 0;
        uint32_t first = h->packed ? h->avail : upto(h, h->size), step = h->packed ? 1 : 1 + 2 * upto(h, 4);
        if (h->packed)
            emit_packed(h, pieces, n, table);
        else
            emit_split(h, pieces, n, table, first, step);
        while (chance(h, h->chaos))
            break_ring(h, table, first, step, n);
        h->filled++;
    }
}

/* Start at the beginning of a ring whose memory is clean; `base` as SET_VRING_BASE has it. */
void hostile_reset(hostile_t *h, uint32_t base)
{
    uint64_t areas[3] = {h->desc, h->driver, h->device};
    uint64_t sizes[3] = {16 * (uint64_t)h->size, h->packed ? 4 : 6 + 2 * (uint64_t)h->size,
                         h->packed ? 4 : 6 + 8 * (uint64_t)h->size};
    for (int i = 0; i < 3; i++) {
        uint8_t *p = at(h, areas[i], sizes[i]);
        if (p != NULL)
            memset(p, 0, sizes[i]);
    }
    if (h->packed) {
        h->avail = h->last = base & 0x7fff;
        h->wrap = h->last_wrap = base >> 15 & 1;
        /* what is in the ring must not look available: as if the lap before had been used up */
        for (uint32_t i = 0; i < h->size; i++) {
            int before = i < h->avail ? (int)h->wrap : !h->wrap;
            put16(h, h->desc + 16 * i + 14, before ? AVAIL | USED : 0);
        }
    } else {
        h->avail = h->last = h->seen = base & 0xffff;
        put16(h, h->driver + 2, (uint16_t)h->avail);
        put16(h, h->device + 2, (uint16_t)h->avail);
        put_decoy(h, h->desc + 16 * h->size);
    }
}

/* -- the model */

typedef struct {
    uint32_t n, written;
    uint64_t total;
} tally_t;

/* Every byte must be in a region, regions may touch. The readable bytes go into a sum. */
static int model_buffer(hostile_t *h, uint64_t gpa, uint32_t len, int write)
{
    uint64_t left = len, here = gpa;
    if (len == 0 || (!write && h->in_size) || gpa + len < gpa)
        return -1;
    while (left) {
        region_t *r = NULL;
        for (uint32_t i = 0; i < h->n_regions && r == NULL; i++)
            if (here >= h->regions[i].gpa && here - h->regions[i].gpa < h->regions[i].size)
                r = &h->regions[i];
        if (r == NULL)
            return -1;
        uint64_t part = r->size - (here - r->gpa);
        if (part > left)
            part = left;
        if (h->n_out + h->n_in == 2 * h->size + h->n_regions)
            return -1;
        if (write)
            h->n_in++;
        else
            h->n_out++;
        if (!write && h->out_size < WRITTEN) {
            uint8_t *p = r->host + (here - r->gpa);
            for (uint64_t i = 0; i < part && h->out_size + i < WRITTEN; i++)
                h->sum = h->sum * 31 + p[i];
        }
        if (write)
            h->in_size += part;
        else
            h->out_size += part;
        here += part;
        left -= part;
    }
    return h->out_size + h->in_size > 0xffffffffull ? -1 : 0;
}

static int model_table(hostile_t *h, uint64_t table, uint32_t len)
{
    uint32_t n = len / 16, i = 0, steps;
    desc_t d;
    if (!h->indirect || len == 0 || len % 16 || n > h->size)
        return -1;
    for (steps = 0; steps < n; steps++) {
        uint16_t flags;
        if (table + 16ull * i < table || get_desc(h, table + 16ull * i, &d) != 0)
            return -1;
        flags = h->packed ? d.b : d.a;
        if (flags & INDIRECT || model_buffer(h, d.addr, d.len, flags & WRITE) != 0)
            return -1;
        if (h->packed) {
            i++;
            continue;
        }
        if (!(flags & NEXT))
            return 0;
        i = d.b;
        if (i >= n)
            return -1;
    }
    return h->packed ? 0 : -1;
}

static int model_split(hostile_t *h)
{
    desc_t d;
    uint32_t i, steps;
    if (h->seen == h->last) {
        h->seen = get16(h, h->driver + 2);
        uint16_t behind = (uint16_t)(h->seen - h->last);
        if (behind == 0)
            return 0;
        if (behind > h->size)
            return -1;
    }
    h->head = i = get16(h, h->driver + 4 + 2 * (h->last % h->size));
    if (i >= h->size)
        return -1;
    for (steps = 0; steps < h->size; steps++) {
        get_desc(h, h->desc + 16 * i, &d);
        if (d.a & INDIRECT) {
            if (d.a & NEXT || model_table(h, d.addr, d.len) != 0)
                return -1;
            break;
        }
        if (model_buffer(h, d.addr, d.len, d.a & WRITE) != 0)
            return -1;
        if (!(d.a & NEXT))
            break;
        i = d.b;
        if (i >= h->size)
            return -1;
    }
    if (steps == h->size)
        return -1;
    h->slots = 1;
    h->last = (h->last + 1) & 0xffff;
    return 1;
}

static int model_packed(hostile_t *h)
{
    desc_t d;
    uint32_t slot = h->last, steps;
    get_desc(h, h->desc + 16 * slot, &d);
    if (!!(d.b & AVAIL) != (int)h->last_wrap || !!(d.b & USED) == (int)h->last_wrap)
        return 0;
    for (steps = 1; steps <= h->size; steps++) {
        get_desc(h, h->desc + 16 * slot, &d);
        if (d.b & INDIRECT) {
            if (d.b & NEXT || model_table(h, d.addr, d.len) != 0)
                return -1;
        } else if (model_buffer(h, d.addr, d.len, d.b & WRITE) != 0) {
            return -1;
        }
        slot = (slot + 1) % h->size;
        if (!(d.b & NEXT))
            break;
    }
    if (steps > h->size || d.a >= h->size)
        return -1;
    h->head = d.a;
    h->slots = steps;
    packed_step(h->size, &h->last, &h->last_wrap, steps);
    return 1;
}

/* What the device has to make of the ring now: 1 a chain (its sizes are in `h`), 0 nothing, -1 the ring is broken. */
int hostile_expect(hostile_t *h)
{
    h->n_out = h->n_in = h->slots = 0;
    h->out_size = h->in_size = h->sum = 0;
    return h->packed ? model_packed(h) : model_split(h);
}

/* The device put the last chain back. */
void hostile_back(hostile_t *h, uint32_t slots)
{
    if (!h->packed) {
        h->last = (h->last - 1) & 0xffff;
    } else if (h->last >= slots) {
        h->last -= slots;
    } else {
        h->last += h->size - slots;
        h->last_wrap ^= 1;
    }
}

/* Of bytes that the device read, as the model sums them. */
uint64_t hostile_sum(const uint8_t *data, uint64_t size)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size && i < WRITTEN; i++)
        sum = sum * 31 + data[i];
    return sum;
}

/* -- changes behind the device's back */

static void race_once(hostile_t *h)
{
    uint64_t r = next_random(&h->race_random);
    uint64_t value = interesting[(r >> 8) % (sizeof(interesting) / sizeof(interesting[0]))];
    uint64_t areas[4] = {h->desc, h->driver, h->device, h->heap};
    uint64_t sizes[4] = {16 * (uint64_t)h->size, h->packed ? 4 : 6 + 2 * (uint64_t)h->size,
                         h->packed ? 4 : 6 + 8 * (uint64_t)h->size, 4096};
    uint32_t which = r & 3;
    uint64_t offset = (r >> 32) % sizes[which];
    uint8_t *p = at(h, areas[which] + (offset & ~7ull), 8);
    if (p == NULL)
        return;
    if ((r >> 4 & 3) == 0) {
        /* a sound descriptor, for a moment */
        if (which == 0)
            put_desc(h, h->desc + (offset & ~15ull), h->heap, 64, h->packed ? 0 : WRITE, h->packed ? AVAIL | WRITE : 0);
    } else if (r & 0x80) {
        __atomic_fetch_xor(p + (offset & 7), (uint8_t)(1u << (r >> 60 & 7)), __ATOMIC_RELAXED);
    } else {
        __atomic_store_n((uint16_t *)(p + (offset & 6)), (uint16_t)value, __ATOMIC_RELAXED);
    }
}

static void *race_main(void *arg)
{
    hostile_t *h = arg;
    for (uint64_t i = 0; h->racing; i++) {
        race_once(h);
        if (h->truncate_fd >= 0 && i == 3000 + (h->race_random >> 52)) {
            if (ftruncate(h->truncate_fd, 0) != 0)
                return NULL;
            return NULL;                    /* our own mapping is cut off too: hands off */
        }
        if (i % 64 == 0 && !h->packed)
            put16(h, h->driver + 2, (uint16_t)(get16(h, h->driver + 2) + 1));
    }
    return NULL;
}

int hostile_race(hostile_t *h, int truncate_fd)
{
    h->racing = 1;
    h->truncate_fd = truncate_fd;
    h->race_random = h->random | 1;
    return pthread_create(&h->thread, NULL, race_main, h);
}

void hostile_rest(hostile_t *h)
{
    h->racing = 0;
    pthread_join(h->thread, NULL);
}
