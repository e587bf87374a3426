/* Guest memory that is not there any more, and copies that may fail.
 *
 * Two things end a mapping under its users. A front end may truncate the memory that it shared (QEMU's memfd is sealed
 * against that, others' are not): every access past the new end is then a SIGBUS, in whichever thread touches it. And
 * hcd itself revokes memory, when a session ends while requests are in flight: it maps the range without access, so
 * that system calls on it fail with EFAULT (a late write to a disk does not happen at all), while an access by the
 * processor is a SIGSEGV.
 *
 * The handler looks the address up in one process-wide table and maps zero pages there: over the whole region for a
 * truncated one, which is marked poisoned and whose session hears of it by an eventfd; over the one page for
 * a revoked one. The access is repeated and hits harmless memory. An address that is not ours goes to the handler that
 * was there before.
 *
 * hcd_guarded_copy is for memory where a fault is an answer, a mapped file whose disk is full or whose end was cut off:
 * the copy is given up and says so, whichever side it was that faulted.
 *
 * The table is lock-free because a signal handler reads it: a slot is free while its base is 0, is filled length
 * first and base last, and is emptied base first. mmap(2) is a bare system call here, safe in a handler.
 */
#ifndef HCD_FAULTS_H
#define HCD_FAULTS_H

#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HCD_SLOTS 8192

typedef struct {
    uintptr_t base;
    size_t length;
    int poisoned;
    int revoked;
    int alarm;                      /* eventfd that hears of poisoning, or -1 */
} hcd_slot_t;

static hcd_slot_t hcd_slots[HCD_SLOTS];
static int hcd_slots_used;          /* slots at and above this index were never used */
static struct sigaction hcd_previous[2];     /* of SIGBUS and SIGSEGV */
static int hcd_installed[2];

static int hcd_map_over(void *base, size_t length, int protection)
{
    void *p = mmap(base, length, protection, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? -1 : 0;
}

static int hcd_heal(int number, hcd_slot_t *slot, uintptr_t base, uintptr_t address)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (number == SIGSEGV) {
        if (!__atomic_load_n(&slot->revoked, __ATOMIC_ACQUIRE))
            return -1;                       /* a defect of ours, not the guest's: let it be seen */
        return hcd_map_over((void *)(address & ~(page - 1)), page, PROT_READ | PROT_WRITE);
    }
    if (hcd_map_over((void *)base, slot->length, PROT_READ | PROT_WRITE) != 0)
        return -1;
    __atomic_store_n(&slot->poisoned, 1, __ATOMIC_RELEASE);
    if (slot->alarm >= 0) {
        uint64_t one = 1;
        ssize_t ignored = write(slot->alarm, &one, sizeof(one));
        (void)ignored;
    }
    return 0;
}

/* In the handler's reach without a look-up that could allocate. */
static __thread volatile sig_atomic_t hcd_guarded __attribute__((tls_model("initial-exec")));
static __thread sigjmp_buf hcd_guard __attribute__((tls_model("initial-exec")));

/* 0, or -1 when either side faulted; some of the bytes may have been copied then. */
static int hcd_guarded_copy(void *to, const void *from, size_t n)
{
    if (sigsetjmp(hcd_guard, 0)) {
        hcd_guarded = 0;
        return -1;
    }
    hcd_guarded = 1;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    memcpy(to, from, n);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    hcd_guarded = 0;
    return 0;
}

static void hcd_on_fault(int number, siginfo_t *info, void *context)
{
    struct sigaction *previous = &hcd_previous[number == SIGSEGV];
    uintptr_t address = (uintptr_t)info->si_addr;
    int used = __atomic_load_n(&hcd_slots_used, __ATOMIC_ACQUIRE);
    if (hcd_guarded)
        siglongjmp(hcd_guard, 1);
    for (int i = 0; i < used; i++) {
        uintptr_t base = __atomic_load_n(&hcd_slots[i].base, __ATOMIC_ACQUIRE);
        if (base == 0 || address < base || address - base >= hcd_slots[i].length)
            continue;
        if (hcd_heal(number, &hcd_slots[i], base, address) == 0)
            return;
        break;
    }
    if (previous->sa_flags & SA_SIGINFO) {
        if (previous->sa_sigaction) {
            previous->sa_sigaction(number, info, context);
            return;
        }
    } else if (previous->sa_handler != SIG_DFL && previous->sa_handler != SIG_IGN) {
        previous->sa_handler(number);
        return;
    }
    signal(number, SIG_DFL);        /* the access is repeated and kills the process, with the usual core dump */
}

static int hcd_install_one(int number)
{
    struct sigaction action, current;
    int which = number == SIGSEGV;
    if (sigaction(number, NULL, &current) != 0)
        return -1;
    if (hcd_installed[which] && (current.sa_flags & SA_SIGINFO) && current.sa_sigaction == hcd_on_fault)
        return 0;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = hcd_on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    hcd_previous[which] = current;
    hcd_installed[which] = 1;
    return sigaction(number, &action, NULL);
}

static int hcd_faults_install(void)
{
    return hcd_install_one(SIGBUS) != 0 || hcd_install_one(SIGSEGV) != 0 ? -1 : 0;
}

/* Returns the slot, or -1 when the table is full. Callers hold the GIL, so only one fills a slot at a time. */
static int hcd_slot_take(void *base, size_t length)
{
    for (int i = 0; i < HCD_SLOTS; i++) {
        if (hcd_slots[i].base != 0)
            continue;
        hcd_slots[i].length = length;
        hcd_slots[i].poisoned = 0;
        hcd_slots[i].revoked = 0;
        hcd_slots[i].alarm = -1;
        __atomic_store_n(&hcd_slots[i].base, (uintptr_t)base, __ATOMIC_RELEASE);
        if (i >= hcd_slots_used)
            __atomic_store_n(&hcd_slots_used, i + 1, __ATOMIC_RELEASE);
        return i;
    }
    return -1;
}

static void hcd_slot_release(int slot) { __atomic_store_n(&hcd_slots[slot].base, (uintptr_t)0, __ATOMIC_RELEASE); }

static int hcd_slot_revoke(int slot)
{
    __atomic_store_n(&hcd_slots[slot].revoked, 1, __ATOMIC_RELEASE);
    /* What takes long is done first, in a way that lets other threads have pages of other memory meanwhile. */
    madvise((void *)hcd_slots[slot].base, hcd_slots[slot].length, MADV_DONTNEED);
    return hcd_map_over((void *)hcd_slots[slot].base, hcd_slots[slot].length, PROT_NONE);
}

static void hcd_slot_alarm(int slot, int fd) { __atomic_store_n(&hcd_slots[slot].alarm, fd, __ATOMIC_RELEASE); }
static int hcd_slot_poisoned(int slot) { return __atomic_load_n(&hcd_slots[slot].poisoned, __ATOMIC_ACQUIRE); }

#endif
