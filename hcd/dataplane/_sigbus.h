/* Guest memory whose file was cut short.
 *
 * A front end may truncate the memory that it shared (QEMU's memfd is sealed against that, others' are not). Every
 * access past the new end is then a SIGBUS, in whichever thread touches it. The handler looks the address up in one
 * process-wide table, maps anonymous zero pages over the whole region and marks it poisoned; the access is repeated
 * and hits harmless memory. The session that owns the region ends at its next look at the mark. An address that is
 * not ours goes to the handler that was there before.
 *
 * The table is lock-free because a signal handler reads it: a slot is free while its base is 0, is filled length
 * first and base last, and is emptied base first. mmap(2) is a bare system call here, safe in a handler.
 */
#ifndef HCD_SIGBUS_H
#define HCD_SIGBUS_H

#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define HCD_SIGBUS_SLOTS 8192

typedef struct {
    uintptr_t base;
    size_t length;
    int poisoned;
} hcd_slot_t;

static hcd_slot_t hcd_slots[HCD_SIGBUS_SLOTS];
static int hcd_slots_used;          /* slots at and above this index were never used */
static struct sigaction hcd_sigbus_previous;
static int hcd_sigbus_installed;

static int hcd_map_zero(void *base, size_t length)
{
    void *p = mmap(base, length, PROT_READ | PROT_WRITE,
                   MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? -1 : 0;
}

static void hcd_on_sigbus(int number, siginfo_t *info, void *context)
{
    uintptr_t address = (uintptr_t)info->si_addr;
    int used = __atomic_load_n(&hcd_slots_used, __ATOMIC_ACQUIRE);
    for (int i = 0; i < used; i++) {
        uintptr_t base = __atomic_load_n(&hcd_slots[i].base, __ATOMIC_ACQUIRE);
        if (base == 0 || address < base || address - base >= hcd_slots[i].length)
            continue;
        if (hcd_map_zero((void *)base, hcd_slots[i].length) == 0) {
            __atomic_store_n(&hcd_slots[i].poisoned, 1, __ATOMIC_RELEASE);
            return;
        }
        break;
    }
    if (hcd_sigbus_previous.sa_flags & SA_SIGINFO) {
        if (hcd_sigbus_previous.sa_sigaction) {
            hcd_sigbus_previous.sa_sigaction(number, info, context);
            return;
        }
    } else if (hcd_sigbus_previous.sa_handler != SIG_DFL && hcd_sigbus_previous.sa_handler != SIG_IGN) {
        hcd_sigbus_previous.sa_handler(number);
        return;
    }
    signal(SIGBUS, SIG_DFL);        /* the access is repeated and kills the process, with the usual core dump */
}

static int hcd_sigbus_install(void)
{
    struct sigaction action, current;
    if (sigaction(SIGBUS, NULL, &current) != 0)
        return -1;
    if (hcd_sigbus_installed && (current.sa_flags & SA_SIGINFO) && current.sa_sigaction == hcd_on_sigbus)
        return 0;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = hcd_on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    hcd_sigbus_previous = current;
    hcd_sigbus_installed = 1;
    return sigaction(SIGBUS, &action, NULL);
}

/* Returns the slot, or -1 when the table is full. Callers hold the GIL, so only one fills a slot at a time. */
static int hcd_slot_take(void *base, size_t length)
{
    for (int i = 0; i < HCD_SIGBUS_SLOTS; i++) {
        if (hcd_slots[i].base != 0)
            continue;
        hcd_slots[i].length = length;
        hcd_slots[i].poisoned = 0;
        __atomic_store_n(&hcd_slots[i].base, (uintptr_t)base, __ATOMIC_RELEASE);
        if (i >= hcd_slots_used)
            __atomic_store_n(&hcd_slots_used, i + 1, __ATOMIC_RELEASE);
        return i;
    }
    return -1;
}

static void hcd_slot_release(int slot) { __atomic_store_n(&hcd_slots[slot].base, (uintptr_t)0, __ATOMIC_RELEASE); }
static int hcd_slot_poisoned(int slot) { return __atomic_load_n(&hcd_slots[slot].poisoned, __ATOMIC_ACQUIRE); }

#endif
