/* The record of requests in flight: its layout and the stores whose order matters.
 *
 * vhost-user.rst, "Inflight I/O tracking". The record lies in memory that outlives this process, so that the next one
 * can take up what this one left unfinished. Process death is a cut between two instructions of the thread that owns
 * the ring, and what was stored before the cut stays: the order of the program is all that counts, not the order in
 * which other processors see it. So the compiler alone has to be held back, by hcd_step(). Fields that must change
 * together are one store: hcd_put_heads() and hcd_put_used().
 */
#ifndef HCD_INFLIGHT_H
#define HCD_INFLIGHT_H

#include <stddef.h>
#include <stdint.h>

typedef struct {                    /* split: one for each descriptor, used for the heads of chains */
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;                  /* the completion before this one */
    uint64_t counter;               /* when it was taken, compared with the others */
} hcd_split_state;

typedef struct {
    uint64_t features;              /* 0 */
    uint16_t version;               /* 0: nothing is recorded yet */
    uint16_t desc_num;
    uint16_t last_batch_head;       /* the completion before all others */
    uint16_t used_idx;              /* of the used ring, when all of its completions were recorded */
    hcd_split_state desc[];
} hcd_split_record;

typedef struct {                    /* packed: a copy of one descriptor; its slot may be overwritten */
    uint8_t inflight;               /* these five: in the head of a chain only */
    uint8_t padding;
    uint16_t next;                  /* in its chain, or in the free list */
    uint16_t last;
    uint16_t num;
    uint64_t counter;
    uint16_t id;
    uint16_t flags;
    uint32_t len;
    uint64_t addr;
} hcd_packed_state;

typedef struct {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t free_head;             /* of the list of states that hold no chain */
    uint16_t old_free_head;
    uint16_t used_idx;              /* where the next used descriptor goes */
    uint16_t old_used_idx;          /* the same before the batch that is being published */
    uint8_t used_wrap;
    uint8_t old_used_wrap;
    uint16_t ahead;                 /* padding in the standard: see hcd_put_used() */
    uint8_t padding[8];
    hcd_packed_state desc[];
} hcd_packed_record;

_Static_assert(sizeof(hcd_split_state) == 16 && offsetof(hcd_split_state, counter) == 8, "split state");
_Static_assert(sizeof(hcd_split_record) == 16, "split record");
_Static_assert(sizeof(hcd_packed_state) == 32 && offsetof(hcd_packed_state, addr) == 24, "packed state");
_Static_assert(sizeof(hcd_packed_record) == 32 && offsetof(hcd_packed_record, free_head) == 12 &&
               offsetof(hcd_packed_record, used_idx) == 16, "packed record");

typedef uint32_t __attribute__((may_alias)) hcd_word32;
typedef uint64_t __attribute__((may_alias)) hcd_word64;

/* Everything before this is stored before everything behind it. */
static inline void hcd_step(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

static inline void hcd_put_heads(hcd_packed_record *r, uint16_t head, uint16_t old_head)
{
    __atomic_store_n((hcd_word32 *)&r->free_head, head | (uint32_t)old_head << 16, __ATOMIC_RELAXED);
}

/* ``ahead``: ring slots between the used and the available position that no chain in flight accounts for. */
static inline void hcd_put_used(hcd_packed_record *r, uint16_t used, int wrap, uint16_t old_used, int old_wrap,
                                uint16_t ahead)
{
    uint64_t word = used | (uint64_t)old_used << 16 | (uint64_t)(wrap & 1) << 32 | (uint64_t)(old_wrap & 1) << 40 |
                    (uint64_t)ahead << 48;
    __atomic_store_n((hcd_word64 *)&r->used_idx, word, __ATOMIC_RELAXED);
}

#endif
