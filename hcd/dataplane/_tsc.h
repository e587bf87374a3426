/* The time-stamp counter: what a guest stamps its rings with. Only x86 has one that a guest reads without an exit and
 * that the host can convert (KVM_VCPU_TSC_OFFSET). */
#ifndef HCD_TSC_H
#define HCD_TSC_H

#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__)
#define HCD_HAS_TSC 1
static inline uint64_t hcd_tsc(void) { return __builtin_ia32_rdtsc(); }
#else
#define HCD_HAS_TSC 0
static inline uint64_t hcd_tsc(void) { return 0; }
#endif

static inline uint64_t hcd_load64(const void *p) { return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE); }

#endif
