/* Memory accesses that a ring needs and C compilers do not promise by themselves (virtio 1.3, 2.7.13 and 2.8.21).
 *
 * Ring indices are two bytes that the other side writes while we read: one access each, never two of one byte.
 * Publishing an index is a release, seeing one is an acquire. Between publishing our index and reading the other
 * side's event index stands a full fence: without it both sides may see the old value and both go to sleep.
 */
#ifndef HCD_ATOMICS_H
#define HCD_ATOMICS_H

#include <stdint.h>
#include <string.h>
#include <time.h>

static inline uint16_t hcd_load16(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED); }
static inline uint16_t hcd_load16_acquire(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE); }
static inline void hcd_store16(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELAXED); }
static inline void hcd_store16_release(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
static inline void hcd_store32(void *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELAXED); }
static inline void hcd_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Flags shared between threads of this process. */
static inline int hcd_flag_load(const int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void hcd_flag_store(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }

/* Counts of changes: made after what they count, read before it, so that nobody takes a new count for an old text. */
static inline uint64_t hcd_load64_acquire(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void hcd_bump(uint64_t *p) { __atomic_store_n(p, *p + 1, __ATOMIC_RELEASE); } /* one writer */
static inline void hcd_add64(uint64_t *p, uint64_t n) { __atomic_fetch_add(p, n, __ATOMIC_RELEASE); } /* any number */

static inline uint16_t hcd_swap16(uint16_t v) { return __builtin_bswap16(v); }
static inline uint32_t hcd_swap32(uint32_t v) { return __builtin_bswap32(v); }
static inline uint64_t hcd_swap64(uint64_t v) { return __builtin_bswap64(v); }

/* Unaligned little-endian loads; hcd runs on little-endian hosts (checked at import). */
static inline uint16_t hcd_le16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static inline uint32_t hcd_le32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint64_t hcd_le64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }

static inline int hcd_log2(uint64_t v) { return 63 - __builtin_clzll(v); }

static inline uint64_t hcd_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void hcd_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

#endif
